"""From a simulator to posteriors of any observation, and to a picture of whether to trust them.

    python examples/two_moons_simulator.py [--short] [--output two_moons_simulator.png]

The simulator draws a point of a half moon, whose place two parameters shift: by the absolute value
of their sum, so that each observation has two posterior moons. Nothing but the simulator is used;
its likelihood, which is known here, only judges the result.
"""

import argparse
import warnings

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist

import flowvi as fv

PRIOR = dist.Uniform(-1.0, 1.0).expand([2])


def place(theta):
    """Where the middle of the circle is."""
    return jnp.stack([0.25 - jnp.abs(theta[0] + theta[1]) / 2**0.5, (theta[1] - theta[0]) / 2**0.5])


def simulator(key, theta):
    """One point of the half moon at parameters theta."""
    angle_key, radius_key = jax.random.split(key)
    angle = jax.random.uniform(angle_key, minval=-jnp.pi / 2, maxval=jnp.pi / 2)
    radius = 0.1 + 0.01 * jax.random.normal(radius_key)
    return radius * jnp.stack([jnp.cos(angle), jnp.sin(angle)]) + place(theta)


def log_likelihood(theta, x):
    """What the simulator does not tell."""
    first, second = x - place(theta)
    radius = jnp.sqrt(first**2 + second**2 + 1e-12)
    log_density = jax.scipy.stats.norm.logpdf(radius, 0.1, 0.01) - jnp.log(jnp.pi * radius)
    return jnp.where(first > 0, log_density, -jnp.inf)


def main():
    """Fit, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="few steps, for a quick check")
    parser.add_argument(
        "--output", default="two_moons_simulator.png", help="where the picture goes"
    )
    arguments = parser.parse_args()

    options = {"num_simulations": 2000, "num_steps": 300} if arguments.short else {}
    posterior = fv.fit_amortized(PRIOR, simulator, key=jax.random.key(0), **options)
    print(posterior)

    observed = np.array([0.0, 0.0])
    draws = posterior.sample(observed, jax.random.key(1), 5000)
    print(f"share of the upper moon: {(draws.sum(1) > 0).mean():.3f} (0.5)")

    # Pairs that it was not trained on.
    theta_key, x_key = jax.random.split(jax.random.key(2))
    theta = PRIOR.sample(theta_key, (500 if arguments.short else 1000,))
    x = jax.vmap(simulator)(jax.random.split(x_key, len(theta)), theta)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fv.CalibrationWarning)  # which is printed below
        found = fv.calibrate(posterior, theta, x, key=jax.random.key(3))
    print(found)

    figure, panels = plt.subplots(1, 4, figsize=(13, 3.3), layout="constrained")
    places = np.linspace(-0.5, 0.5, 301)
    grid = np.stack(np.meshgrid(places, places), -1)
    truth = jax.vmap(jax.vmap(lambda each: log_likelihood(each, jnp.asarray(observed))))(grid)
    panels[0].contourf(places, places, np.exp(truth), levels=8, cmap="Blues")
    panels[0].plot(*draws[:1500].T, ".", markersize=1.5, color="C1", alpha=0.5)
    panels[0].set(title="posterior: truth, draws", xlabel="theta[0]", ylabel="theta[1]")
    panels[0].set(xlim=(-0.5, 0.5), ylim=(-0.5, 0.5), aspect="equal")
    for panel, (name, part) in zip(panels[1:], found.parts.items(), strict=True):
        at, lower, upper = part.band
        panel.fill_between(at, lower - at, upper - at, alpha=0.3, linewidth=0)
        for column in part.values.T:
            below = np.searchsorted(np.sort(column), at, "right") / len(column)
            panel.plot(at, below - at)
        panel.axhline(0, color="black", linewidth=0.6)
        panel.set(title=f"{name}, p = {part.p_value:.2f}", xlabel="u")
    figure.savefig(arguments.output, dpi=120)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
