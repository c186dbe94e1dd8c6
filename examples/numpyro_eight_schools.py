"""A model of numpyro, from its function to ArviZ's tables and pictures.

    python examples/numpyro_eight_schools.py [--short] [--output numpyro_eight_schools.png]

Effects of coaching at eight schools (Rubin, 1981). Three lines lead from the model to `az.summary`.
"""

import argparse
import warnings

import jax

# ArviZ 0.23 says once a day that the next version differs.
warnings.filterwarnings("ignore", category=FutureWarning, module="arviz")
import arviz as az  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import numpyro  # noqa: E402
import numpyro.distributions as dist  # noqa: E402

import flowvi as fv  # noqa: E402

jax.config.update("jax_enable_x64", True)

SCHOOLS = ["Choate", "Deerfield", "Andover", "Exeter", "Hotchkiss", "Lawrence", "Paul", "Hermon"]
Y = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def model(y, sigma):
    """Effects around a common mean, in units of their own scale."""
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("school", len(y)):
        z = numpyro.sample("z", dist.Normal(0, 1))
        theta = numpyro.deterministic("theta", mu + tau * z)
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def main():
    """Fit, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="few steps, for a quick check")
    parser.add_argument("--output", default="numpyro_eight_schools.png", help="of the picture")
    arguments = parser.parse_args()
    options = {"num_steps": 200} if arguments.short else {}

    target = fv.Target.from_numpyro(model, Y, SIGMA)
    posterior = fv.fit_posterior(target, key=jax.random.key(0), **options)
    draws = {"num_draws": 250 if arguments.short else 1000, "coords": {"school": SCHOOLS}}
    data = posterior.to_arviz(jax.random.key(1), **draws)

    print(az.summary(data, var_names=["mu", "tau", "theta"], kind="stats"))
    print(posterior.diagnosis)
    print(az.loo(data))

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), gridspec_kw={"width_ratios": [3, 2]})
    az.plot_forest(data, var_names=["theta"], combined=True, ax=axes[0])
    axes[0].axvline(0, color="black", linewidth=0.6)
    axes[0].set_title("effect, with 94 % of its posterior")
    kind = {"kind": "kde", "ax": axes[1], "kde_kwargs": {"contourf_kwargs": {"cmap": "Blues"}}}
    az.plot_pair(data, var_names=["mu", "tau"], **kind)
    axes[1].set(xlim=(-6, 15), ylim=(0, 14))  # a few draws are far out
    figure.tight_layout()
    figure.savefig(arguments.output, dpi=70)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
