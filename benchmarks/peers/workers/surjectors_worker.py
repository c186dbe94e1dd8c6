"""surjectors."""

import distrax
import haiku as hk
import jax
import jax.numpy as jnp
from protocol import Absent, jax_task, serve
from surjectors import Chain, MaskedAutoregressive, Permutation, TransformedDistribution
from surjectors.nn import MADE
from surjectors.util import unstack


def build(task, size):
    if task.startswith("iaf"):
        raise Absent("its autoregressive layer has no direction with cheap samples")
    event_size = size["event_size"]

    def scalar(params):
        shift, log_scale = unstack(params, -1)
        return distrax.ScalarAffine(shift, log_scale=log_scale)

    def flow():
        layers = []
        for _ in range(size["layers"]):
            made = MADE(
                event_size,
                list(size["hidden"]),
                2,
                w_init=hk.initializers.TruncatedNormal(stddev=0.01),
                activation=getattr(jax.nn, size["activation"]),
            )
            layers += [
                MaskedAutoregressive(made, scalar),
                Permutation(jnp.arange(event_size)[::-1], 1),
            ]
        base = distrax.Independent(distrax.Normal(jnp.zeros(event_size), 1.0), 1)
        return TransformedDistribution(base, Chain(layers))

    log_prob = hk.without_apply_rng(hk.transform(lambda x: flow().log_prob(x)))
    sample = hk.transform(lambda: flow().sample((size["batch"],)))
    params = jax.jit(log_prob.init)(jax.random.key(0), jnp.zeros((2, event_size)))
    return jax_task(task, size, params, log_prob.apply, sample.apply)


if __name__ == "__main__":
    serve(["surjectors", "jax", "jaxlib", "distrax", "dm-haiku"], build)
