"""Densities fitted with no settings: flowvi, textbook methods, and the flows of its peers.

python -m benchmarks.densities [--only NAME ...] [--seeds 3] [--peers flowjax ...] [--quick]

Each method is given the same rows, in raw units, and scored on the same new ones. Scores are mean
log densities below the truth in nats; of tables, where there is no truth, negative log densities.

    flowvi      fit_density(x, key=key)
    normal      maximum likelihood
    mixture     scikit-learn's, full covariances, up to 30 components by BIC, of standardised rows
    kernel      scikit-learn's, bandwidth by cross-validation, of standardised rows
    flowjax, zuko, normflows    in environments made by `python -m benchmarks.peers setup`

A method is as good as another where the mean difference is at most twice its standard error.
"""

import argparse
import functools
import pathlib
import statistics
import tempfile
import time
import warnings

import numpy as np

from benchmarks import timing
from benchmarks.densities.problems import problems

log = functools.partial(print, flush=True)

COMPONENTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30)
BANDWIDTHS = np.geomspace(0.02, 2, 15)
TEXTBOOK = ("normal", "mixture", "kernel")


def flowvi(train, test, count, seed, options):
    """(scores, seconds of the fit, what was chosen)."""
    import jax

    import flowvi as fv

    split = lambda rows: (rows[:, count:], rows[:, :count] if count else None)  # noqa: E731
    x, context = split(train)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        key = jax.random.key(seed)
        density = fv.fit_density(x, context=context, key=key, progress=False, **options)
    seconds = time.perf_counter() - start
    chosen = {each.name: round(each.weight, 3) for each in density.scores if each.name != "all"}
    return np.asarray(density.log_prob(*split(test)), float), seconds, chosen


def textbook(name, train, test):
    """(scores, seconds)."""
    from sklearn.mixture import GaussianMixture
    from sklearn.model_selection import GridSearchCV
    from sklearn.neighbors import KernelDensity

    start = time.perf_counter()
    shift, scale = train.mean(0), train.std(0)
    x, new = (train - shift) / scale, (test - shift) / scale
    if name == "normal":
        model = GaussianMixture(1, reg_covar=1e-9).fit(x)
    elif name == "mixture":
        fits = []
        for k in COMPONENTS:
            if k < len(x) / 2:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    fits.append(GaussianMixture(k, random_state=0).fit(x))
        model = min(fits, key=lambda fit: fit.bic(x))
    else:
        grid = GridSearchCV(KernelDensity(rtol=1e-4), {"bandwidth": BANDWIDTHS}, cv=5)
        rows = x[np.random.default_rng(0).permutation(len(x))[:2000]]
        bandwidth = grid.fit(rows).best_params_["bandwidth"]
        # The best bandwidth of fewer rows, by the normal rule for as many as there are.
        bandwidth *= (len(x) / len(rows)) ** (-1 / (4 + x.shape[1]))
        model = KernelDensity(bandwidth=bandwidth, rtol=1e-4).fit(x)
    seconds = time.perf_counter() - start
    return model.score_samples(new) - np.log(scale).sum(), seconds


def peer(worker, train, test, count, seed):
    """(scores, seconds)."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(pathlib.Path(folder) / "rows.npz")
        np.savez(path, train=train, test=test, num_context=count)
        answer = worker.ask(do="density", path=path, seed=seed)
        return np.load(path + ".npy"), answer["seconds"]


def rows_of(problem, seed):
    """(rows to fit, rows to score, true scores or None)."""
    generator = np.random.default_rng(seed)
    if problem.log_prob is None:
        rows = problem.draw(generator, 0)
        return rows[: problem.num_rows], rows[problem.num_rows :], None
    train = problem.draw(generator, problem.num_rows)
    test = problem.draw(generator, problem.num_test)
    return train, test, problem.log_prob(test)


def measure(name, problem, seed, workers, options):
    """One row of results for each method."""
    from benchmarks.peers.client import Failure

    train, test, truth = rows_of(problem, seed)
    count, found = problem.num_context, {}
    scores, seconds, chosen = flowvi(train, test, count, seed, options)
    all_scores = {"flowvi": scores}
    found["flowvi"] = {"seconds": seconds, "chosen": chosen}
    for method in () if count else TEXTBOOK:
        all_scores[method], seconds = textbook(method, train, test)
        found[method] = {"seconds": seconds}
    for method, worker in workers.items():
        try:
            all_scores[method], seconds = peer(worker, train, test, count, seed)
        except Failure as failure:
            found[method] = {"failure": str(failure)[-200:]}
            continue
        found[method] = {"seconds": seconds}
    truth = np.zeros(len(test)) if truth is None else truth
    for method, scores in all_scores.items():
        found[method]["gap"] = float(np.mean(truth - scores))
        ahead = all_scores["flowvi"] - scores
        found[method]["behind"] = float(np.mean(ahead))
        found[method]["error"] = float(np.std(ahead) / np.sqrt(len(ahead)))
    line = ", ".join(f"{m} {r['gap']:.4f}" for m, r in found.items() if "gap" in r)
    log(f"{name} (seed {seed}): {line}; {found['flowvi']['seconds']:.1f} s, {chosen}")
    return found


def median(results, name, method, field):
    """The median over seeds, or None where a method failed."""
    values = [run[method].get(field) for run in results[name] if method in run]
    values = [value for value in values if value is not None]
    return statistics.median(values) if values else None


def report(results):
    """Markdown."""
    runs = results["runs"]
    methods = list(dict.fromkeys(m for name in runs for run in runs[name] for m in run))
    show = lambda value: "-" if value is None else f"{value:.4f}" if value < 100 else f"{value:.3g}"  # noqa: E731
    rows = [
        [
            name,
            *(show(median(runs, name, m, "gap")) for m in methods),
            f"{median(runs, name, 'flowvi', 'seconds'):.1f}",
        ]
        for name in runs
    ]
    parts = [
        "# Densities with no settings\n",
        timing.environment_line(results["environment"]) + "\n",
        f"Mean log density below the truth, of tables negative, in nats; medians of "
        f"{results['seeds']} seeds.\n",
        timing.table(["", *methods, "seconds"], rows),
    ]
    behind = []
    for name in runs:
        for method in methods[1:]:
            ahead, error = (median(runs, name, method, f) for f in ("behind", "error"))
            if ahead is not None and ahead < -max(0.01, error if "table" in name else 0.01):
                behind.append([name, method, f"{-ahead:.4f}", f"{error:.4f}"])
    parts.append("\nWhere flowvi is behind by more than 0.01 nats:\n")
    parts.append(timing.table(["", "method", "nats", "error"], behind) if behind else "nowhere.\n")
    return "\n".join(parts)


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.densities", description=__doc__)
    parser.add_argument("--only", nargs="*", default=None)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--peers", nargs="*", default=[])
    parser.add_argument("--quick", action="store_true", help="few steps, to see that all runs")
    parser.add_argument("--output", default="benchmarks/results/densities.json")
    args = parser.parse_args()
    from benchmarks.peers.client import Worker

    workers = {name: Worker(name) for name in args.peers}
    results = {
        "environment": timing.environment("flowvi", "jax", "jaxlib", "scikit-learn"),
        "seeds": args.seeds,
        "runs": {},
    }
    chosen = {n: p for n, p in problems().items() if args.only is None or n in args.only}
    for name, problem in chosen.items():
        results["runs"][name] = []
        for seed in range(args.seeds):
            options = {"num_steps": 20} if args.quick else {}
            found = measure(name, problem, seed, workers, options)
            results["runs"][name].append(found)
        timing.write(args.output, results, report(results))
    log(report(results))


if __name__ == "__main__":
    main()
