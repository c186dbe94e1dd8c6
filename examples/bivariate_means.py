"""The mean of 10,000 points in the plane, from subsamples of 128, against the closed form.

    python examples/bivariate_means.py [--short] [--output bivariate_means.png]

The points are N((0, 10), I) and the prior is N(0, I), so the posterior is
N(sum of points / (n + 1), I / (n + 1)). Each step sees 128 rows, whose likelihood counts n / 128
times.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import flowvi as fv
from flowvi import plotting


def log_prior(mean):
    """N(0, I)."""
    return jnp.sum(-0.5 * jnp.log(2 * jnp.pi) - 0.5 * mean**2)


def log_likelihood(mean, rows):
    """N(mean, I), one number for each row."""
    return jnp.sum(-0.5 * jnp.log(2 * jnp.pi) - 0.5 * (rows - mean) ** 2, axis=-1)


def main():
    """Fit, compare, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="few steps, for a quick check")
    parser.add_argument("--output", default="bivariate_means.png", help="where the picture goes")
    arguments = parser.parse_args()

    count = 10_000
    x = np.array([0.0, 10.0]) + np.random.default_rng(0).normal(size=(count, 2))
    target = fv.Target.from_likelihood(log_prior, log_likelihood, x, event_size=2)
    posterior = fv.fit_posterior(
        target,
        key=jax.random.key(0),
        batch_size=128,
        num_samples=32,
        num_steps=200 if arguments.short else 2_000,
    )

    draws = np.asarray(posterior.sample(jax.random.key(1), 20_000), np.float64)
    mean, sd = x.sum(0) / (count + 1), (count + 1) ** -0.5
    print(f"{'':12}{'mean':>24}{'standard deviation':>28}")
    for name, m, s in (("fit", draws.mean(0), draws.std(0)), ("closed form", mean, [sd, sd])):
        print(f"{name:12}{m[0]:12.5f}{m[1]:12.5f}{s[0]:14.5f}{s[1]:14.5f}")
    error = np.abs(draws.mean(0) - mean).max() / sd
    print(f"worst error of a mean: {error:.3f} standard deviations")
    print(posterior.diagnosis)

    exact = mean + sd * np.random.default_rng(1).normal(size=(4_000, 2))
    figure = plotting.pairs(posterior, jax.random.key(2), reference=exact)
    figure.savefig(arguments.output, dpi=120)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
