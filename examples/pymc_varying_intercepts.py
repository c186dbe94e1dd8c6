"""A model of PyMC, from its context to ArviZ's tables and pictures.

    python examples/pymc_varying_intercepts.py [--short] [--output pymc_varying_intercepts.png]

Counts in six regions, each with a rate of its own that is drawn towards the mean of all. The data
are made up, so the truth is known and drawn.
"""

import argparse
import logging
import warnings

import jax

warnings.filterwarnings("ignore", category=FutureWarning, module="arviz")
import arviz as az  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pymc as pm  # noqa: E402

import flowvi as fv  # noqa: E402

jax.config.update("jax_enable_x64", True)
logging.getLogger("pytensor").setLevel(logging.CRITICAL)  # rewrites that need a BLAS

REGIONS = ["north", "east", "south", "west", "centre", "isles"]


def make_data():
    """Regions and values of the covariate, counts, and the truth."""
    rng = np.random.default_rng(0)
    region, x = np.repeat(np.arange(6), [40, 30, 20, 10, 5, 2]), rng.normal(size=107)
    truth = {"slope": 0.4, "intercept": 1.0 + 0.5 * rng.normal(size=6)}
    y = rng.poisson(np.exp(truth["intercept"][region] + truth["slope"] * x))
    return region, x, y, truth


def main():
    """Fit, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="few steps, for a quick check")
    parser.add_argument("--output", default="pymc_varying_intercepts.png", help="of the picture")
    arguments = parser.parse_args()
    options = {"num_steps": 200} if arguments.short else {}

    region, x, y, truth = make_data()
    with pm.Model(coords={"region": REGIONS, "row": np.arange(len(x))}) as model:
        mean = pm.Normal("mean", 0, 2)
        spread = pm.HalfNormal("spread", 1)
        intercept = pm.Normal("intercept", mean, spread, dims="region")
        slope = pm.Normal("slope", 0, 1)
        pm.Poisson("y", pm.math.exp(intercept[region] + slope * x), observed=y, dims="row")

    target = fv.Target.from_pymc(model)
    posterior = fv.fit_posterior(target, key=jax.random.key(0), **options)
    data = posterior.to_arviz(jax.random.key(1), predictive=not arguments.short)

    print(az.summary(data, kind="stats"))
    print(posterior.diagnosis)

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
    az.plot_forest(data, var_names=["intercept"], combined=True, ax=axes[0])
    axes[0].plot(truth["intercept"], axes[0].get_yticks()[::-1], "kx", label="truth")
    axes[0].set_title("intercept, with 94 % of its posterior")
    axes[0].legend()
    kind = {"kind": "kde", "ax": axes[1], "kde_kwargs": {"contourf_kwargs": {"cmap": "Blues"}}}
    az.plot_pair(data, var_names=["mean", "spread"], **kind)
    axes[1].plot(1.0, 0.5, "kx", label="truth")
    axes[1].set(xlim=(-0.4, 2.2), ylim=(0, 1.8))  # a few draws are far out
    axes[1].legend()
    figure.tight_layout()
    figure.savefig(arguments.output, dpi=70)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
