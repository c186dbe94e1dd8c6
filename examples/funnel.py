"""Neal's funnel, whose scale changes by e^9 over its width: a picture and a diagnosis.

python examples/funnel.py [--short] [--output funnel.png]
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import flowvi as fv
from flowvi import plotting

jax.config.update("jax_enable_x64", True)

SIZE = 10


def log_density(u):
    """x_0 ~ N(0, 3), the others ~ N(0, exp(x_0 / 2)). It is normalised: log Z = 0."""
    scale = jnp.exp(u[0] / 2)
    constant = -0.5 * SIZE * jnp.log(2 * jnp.pi) - jnp.log(3.0) - (SIZE - 1) * u[0] / 2
    return constant - 0.5 * (u[0] / 3) ** 2 - 0.5 * jnp.sum((u[1:] / scale) ** 2)


def exact_draws(count, seed=0):
    """Draws of the funnel itself."""
    rng = np.random.default_rng(seed)
    first = 3 * rng.normal(size=(count, 1))
    return np.concatenate([first, np.exp(first / 2) * rng.normal(size=(count, SIZE - 1))], 1)


def main():
    """Fit, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="few steps, for a quick check")
    parser.add_argument("--output", default="funnel.png", help="where the picture goes")
    arguments = parser.parse_args()

    target = fv.Target(log_density, SIZE)
    options = {"num_steps": 200} if arguments.short else {}
    posterior = fv.fit_posterior(target, key=jax.random.key(0), **options)

    print(f"best normal distribution found: {posterior.start.elbo:.3f} nats below log Z = 0")
    print(posterior.diagnosis)
    print("lower half of the picture: the fit; upper half, in black: exact draws")

    reference = exact_draws(4_000)[:, :3]
    figure = plotting.pairs(
        posterior, jax.random.key(1), names=["u[0]", "u[1]", "u[2]"], reference=reference
    )
    figure.savefig(arguments.output, dpi=80)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
