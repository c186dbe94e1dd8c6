"""numpyro. Its transform is an IAF; a MAF is its inverse."""

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.example_libraries import stax
from numpyro.distributions.flows import InverseAutoregressiveTransform
from numpyro.distributions.transforms import PermuteTransform
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.nn.auto_reg_nn import AutoregressiveNN
from protocol import TRAIN, Absent, jax_task, serve, train_target


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


def train(what, steps):
    if what == "density":
        raise Absent("it has no fit of a density to data")

    def model():
        flat = dist.ImproperUniform(dist.constraints.real_vector, (), (TRAIN["posterior_size"],))
        numpyro.factor("target", train_target(numpyro.sample("x", flat)))

    # An unconstrained vector without a prior of its own, as the others have it.
    svi = SVI(
        model,
        AutoNormal(model),
        numpyro.optim.Adam(TRAIN["rate"]),
        Trace_ELBO(num_particles=TRAIN["draws"]),
    )
    return lambda: jax.block_until_ready(svi.run(jax.random.key(0), steps).params)


if __name__ == "__main__":
    serve(["numpyro", "jax", "jaxlib"], build, train=train)
