"""numpyro. Its transform is an IAF; a MAF is its inverse."""

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.example_libraries import stax
from numpyro.distributions.flows import InverseAutoregressiveTransform
from numpyro.distributions.transforms import PermuteTransform
from numpyro.nn.auto_reg_nn import AutoregressiveNN
from protocol import jax_task, serve


def build(task, size):
    event_size = size["event_size"]
    init, apply = AutoregressiveNN(
        event_size,
        list(size["hidden"]),
        nonlinearity=stax.elementwise(getattr(jax.nn, size["activation"])),
    )
    keys = jax.random.split(jax.random.key(0), size["layers"])
    params = [init(key, (event_size,))[1] for key in keys]
    reverse = jnp.arange(event_size)[::-1]

    def flow(params):
        transforms = []
        for layer in params:
            transform = InverseAutoregressiveTransform(lambda x, layer=layer: apply(layer, x))
            transforms += [
                transform.inv if task.startswith("maf") else transform,
                PermuteTransform(reverse),
            ]
        base = dist.Normal(jnp.zeros(event_size), 1.0).to_event(1)
        return dist.TransformedDistribution(base, transforms)

    def log_prob(params, x):
        return flow(params).log_prob(x)

    def sample(params, key):
        return flow(params).sample(key, (size["batch"],))

    return jax_task(task, size, params, log_prob, sample)


if __name__ == "__main__":
    serve(["numpyro", "jax", "jaxlib"], build)
