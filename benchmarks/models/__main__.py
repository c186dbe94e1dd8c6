"""Models of numpyro as targets, beside the same by hand and beside NUTS of numpyro.

    python -m benchmarks.models [--models NAME ...] [--densities]

Of each model: the largest relative difference of the log density from the one by hand, at 100
points in double precision; KL(q || p) in nats of both fits; and how far means and standard
deviations are from those of four chains of NUTS, in its standard deviations and as a ratio.
Those of PyMC are compared in the slow tests. One line a model, printed as it is done.
"""

import argparse
import time
import warnings

import jax
import numpy as np
from numpyro.infer import MCMC, NUTS

import flowvi as fv
from benchmarks.models.by_numpyro import CASES, Case

jax.config.update("jax_enable_x64", True)


def density_error(one: fv.Target, other: fv.Target) -> float:
    u = np.random.default_rng(0).normal(size=(100, one.event_size))
    expected, got = np.asarray(one(u)), np.asarray(other(u))
    return float(np.max(np.abs(got - expected) / np.abs(expected)))


def gap(posterior: fv.Posterior) -> float:
    """KL(q || p), by the log evidence of importance weights."""
    key = jax.random.key(5)
    return posterior.log_evidence(key, 20_000).value - posterior.elbo(key, 20_000).value


def fit(target: fv.Target) -> tuple[fv.Posterior, bool]:
    """The posterior of the recipe, and whether it warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = fv.fit_posterior(target, key=jax.random.key(0), progress=False)
    return posterior, bool(posterior.diagnosis.messages)


def beside_nuts(case: Case, posterior: fv.Posterior) -> tuple[float, float]:
    """The largest difference of means, in standard deviations, and ratio of these less one."""
    options = {"num_warmup": 1000, "num_samples": 2500, "num_chains": 4, "progress_bar": False}
    # NUTS takes all rows where a plate takes a subsample.
    whole = {} if posterior.target.num_rows is None else {"size": None}
    sampler = MCMC(NUTS(case.model), chain_method="vectorized", **options)
    sampler.run(jax.random.key(1), *case.args, **whole)
    theirs = sampler.get_samples()
    ours = posterior.resample(jax.random.key(2), 20_000)
    means, ratios = [], []
    for name in case.parameters:
        x, y = np.asarray(ours[name], float), np.asarray(theirs[name], float)
        sd = y.std(0)
        free = sd > 1e-9
        means.append(np.max(np.abs(x.mean(0) - y.mean(0))[free] / sd[free], initial=0))
        ratios.append(np.max(np.abs(x.std(0)[free] / sd[free] - 1), initial=0))
    return float(max(means)), float(max(ratios))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(CASES))
    parser.add_argument("--densities", action="store_true", help="compare densities alone")
    arguments = parser.parse_args()
    heads = "| model | D | density | KL, by hand | KL, numpyro | mean, sd | sd - 1 | warned | s |"
    print(heads + "\n|---|---:|---:|---:|---:|---:|---:|---|---:|", flush=True)
    for name in arguments.models:
        begin = time.perf_counter()
        case = CASES[name]()
        by_hand, by_numpyro = case.by_hand(), case.by_numpyro()
        cells = [str(by_hand.event_size), f"{density_error(by_hand, by_numpyro):.1e}"]
        if not arguments.densities:
            (one, _), (two, warned) = fit(by_hand), fit(by_numpyro)
            means, ratios = beside_nuts(case, two)
            cells += [f"{gap(one):.4f}", f"{gap(two):.4f}", f"{means:.3f}", f"{ratios:.3f}"]
            cells.append("yes" if warned else "no")
        cells.append(f"{time.perf_counter() - begin:.0f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    main()
