"""The posterior of eight schools, from its log joint density to a picture and a diagnosis.

    python examples/eight_schools.py [--short] [--output eight_schools.png]

The effects stand in units of their own scale: theta = mu + tau z. With theta itself as a parameter
the density has a funnel, for where the scale is small all effects are drawn together; that costs a
flow, as it does samplers, more than it is worth, and the k-hat of the diagnosis says so.
"""

import argparse

import jax
import jax.numpy as jnp

import flowvi as fv
from flowvi import plotting

# Density ratios near the funnel's neck want double precision.
jax.config.update("jax_enable_x64", True)

Y = jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
LOG_EVIDENCE = -32.00449  # by quadrature


def normal(x, mean, sd):
    """Log density of a normal distribution."""
    return -0.5 * jnp.log(2 * jnp.pi) - jnp.log(sd) - 0.5 * ((x - mean) / sd) ** 2


def log_density(p):
    """Log joint density of the effects, their mean and their scale."""
    half_cauchy = -jnp.log(jnp.pi * 5.0) - jnp.log1p((p["tau"] / 5.0) ** 2)
    prior = normal(p["mu"], 0.0, 5.0) + half_cauchy + normal(p["z"], 0.0, 1.0).sum()
    return prior + normal(Y, p["mu"] + p["tau"] * p["z"], SIGMA).sum()


def main():
    """Fit, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="few steps, for a quick check")
    parser.add_argument("--output", default="eight_schools.png", help="where the picture goes")
    arguments = parser.parse_args()

    target = fv.Target.from_named(
        log_density,
        {"mu": ((), "real"), "tau": ((), "positive"), "z": ((8,), "real")},
    )
    options = {"num_steps": 200} if arguments.short else {}
    posterior = fv.fit_posterior(target, key=jax.random.key(0), **options)

    print(posterior.summary(jax.random.key(1)))
    draws = posterior.resample(jax.random.key(1), 10_000)
    theta = draws["mu"][:, None] + draws["tau"][:, None] * draws["z"]
    for index, effect in enumerate(theta.T):
        print(f"theta[{index}]   {effect.mean():15.4g}{effect.std():15.4g}")
    print()
    print(posterior.diagnosis)
    print(f"log evidence by quadrature: {LOG_EVIDENCE}")

    figure = plotting.pairs(posterior, jax.random.key(2), names=["mu", "tau", "z[0]", "z[6]"])
    figure.savefig(arguments.output, dpi=60)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
