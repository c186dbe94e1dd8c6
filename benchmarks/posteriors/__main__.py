"""The default recipe on targets with a known normalising constant, beside other libraries.

python -m benchmarks.posteriors [--data FOLDER] [--targets funnel,banana] [--seeds 3] [--quick]
python -m benchmarks.posteriors [--data FOLDER] --seeds 10 --resume       only what is missing yet
python -m benchmarks.posteriors --hard [--single] --output FILE           modes, ridges, tails, cuts

`--data` (or FLOWVI_DATA) is a folder with `posteriordb` and `targets`; without it the targets that
ship with the project are run. Results of other libraries are read from `--peers`, a JSON file that
`python -m benchmarks.posteriors.peers` writes.
"""

import argparse
import functools
import itertools
import json
import os
import pathlib
import statistics
import time
import warnings

from benchmarks import timing
from benchmarks.posteriors import measures, targets

log = functools.partial(print, flush=True)

#: Families that may be fitted instead of the default one, all of `flowvi`.
FAMILIES = ("mean_field", "full_rank", "iaf", "maf", "coupling")

#: Column -> heading.
COLUMNS = {
    "gap": "gap, nats",
    "log_z_error": "log Z error",
    "ess": "IS-ESS",
    "khat": "k-hat",
    "mean_error": "mean error, sd",
    "log_sd_error": "log sd error",
    "wasserstein": "Wasserstein ratio",
    "seconds": "seconds",
    "gradients": "gradients",
}

#: Beyond these a posterior is wrong: nats, means and sds in posterior sds, weights of modes.
WRONG = {"gap": 0.5, "mean_error": 0.15, "log_sd_error": 0.14, "mode_error": 0.03}


def pause():
    """Waits while the file named by FLOWVI_BENCH_PAUSE exists."""
    path = os.environ.get("FLOWVI_BENCH_PAUSE")
    while path and os.path.exists(path):
        time.sleep(2)


def run(name, case, seed, num_draws, options):
    """One fit: a dict of what `COLUMNS` names, and more."""
    import jax
    import numpy as np

    import flowvi as fv

    target = fv.Target(case.log_density, case.size)
    if "family" in options:
        options = {**options, "family": getattr(fv, options["family"])(case.size)}
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        posterior = fv.fit_posterior(target, key=jax.random.key(seed), progress=False, **options)
    seconds = time.perf_counter() - start
    warned = any(issubclass(w.category, fv.PosteriorWarning) for w in caught)
    key = jax.random.key(1000 + seed)
    weights = posterior.log_weights(key, num_draws)
    # Without a known log Z the gap is that to the evidence by importance weights.
    log_z = posterior.diagnosis.log_evidence.value if case.log_z is None else case.log_z
    result = measures.of_weights(weights, log_z)
    result |= {
        "khat": posterior.psis(jax.random.key(2000 + seed), 10_000).khat,
        "seconds": seconds,
        "warned": warned,
        "messages": list(posterior.diagnosis.messages),
        "start_gap": log_z - posterior.start.elbo,
        "origin": posterior.start.origin,
        "steps": posterior.num_steps,
        "gradients": posterior.diagnosis.cost.num_gradients,
    }
    if case.mean is not None:
        u, _ = posterior.sample_and_log_prob(key, num_draws)
        values = np.asarray(jax.jit(jax.vmap(case.constrain))(u))
        result |= measures.of_moments(values, case.mean, case.sd)
        if case.draws is not None:
            result["wasserstein"] = measures.wasserstein_ratio(
                values, case.draws, case.mean, case.sd
            )
    if case.modes is not None:
        u, _ = posterior.sample_and_log_prob(key, num_draws)
        place, shares = case.modes
        found = np.bincount(place(np.asarray(u)), minlength=len(shares)) / len(u)
        result["mode_error"] = float(np.abs(found - shares).max())
    result["wrong"] = any(result.get(each, 0.0) > most for each, most in WRONG.items())
    if name == "many_well":
        u, _ = posterior.sample_and_log_prob(key, 50_000)
        share = (np.asarray(u)[:, 0::2] > 0).mean(0)
        result["mode_weights"] = [float(share.min()), float(share.max())]
    return result


def judge(case, runs):
    """ "yes" or "no" by the bar, with three standard errors; a dash without a bar or runs."""
    if case.bar is None or not runs:
        return "–"
    allowed = [bar + 3 * run["gap_error"] for run, bar in ((r, case.bar) for r in runs)]
    gaps = [run["gap"] for run in runs]
    median = statistics.median(g - a for g, a in zip(gaps, allowed, strict=True)) <= 0
    worst = all(g <= a + case.bar for g, a in zip(gaps, allowed, strict=True))
    return "yes" if median and worst else "no"


def summary(results):
    """How many fits are right or wrong, quiet or warned, in one line."""
    counts = dict.fromkeys(itertools.product((False, True), repeat=2), 0)
    for entry in results["targets"].values():
        for run in entry["runs"]:
            if "wrong" in run:
                counts[run["wrong"], run["warned"]] += 1
    return (
        f"Right and quiet {counts[False, False]}, right but warned {counts[False, True]}, wrong "
        f"and warned {counts[True, True]}, wrong and silent {counts[True, False]}. Wrong: a gap "
        "above 0.5 nats, a mean off by 0.15 sd, an sd by 15 %, or the weight of a mode by 0.03.\n"
    )


def markdown(results, cases):
    rows = []
    for name, entry in results["targets"].items():
        runs = [run for run in entry["runs"] if "error" not in run]
        cells = []
        for column in COLUMNS:
            values = [abs(run[column]) for run in runs if column in run]
            if not values:
                cells.append("–")
                continue
            worst = min(values) if column == "ess" else max(values)
            cells.append(f"{timing.number(statistics.median(values))} ({timing.number(worst)})")
        bar = "–" if entry["bar"] is None else f"{entry['bar']:g}"
        failed = len(entry["runs"]) - len(runs)
        warned = sum(run.get("warned", False) for run in runs)
        met = "no" if failed else judge(cases[name], runs)
        wrong = sum(run.get("wrong", False) for run in runs)
        counts = f"{wrong}/{len(runs)}", f"{warned}/{len(runs)}"
        rows.append([f"{name} ({entry['size']})", *cells, bar, met, *counts])
    header = ["target (d)", *COLUMNS.values(), "bar", "met", "wrong", "warned"]
    given = ", ".join(f"{name} {value}" for name, value in results.get("options", {}).items())
    recipe = f"The recipe with {given}" if given else "The default recipe"
    precision = results.get("precision", "double")
    parts = [
        "# Posteriors\n",
        timing.environment_line(results["environment"]) + "\n",
        f"{recipe}, {precision} precision, compilation counted; the median over seeds and, in "
        "brackets, the worst. The gap is log Z - ELBO = KL(q || p).\n",
        timing.table(header, rows),
        summary(results),
    ]
    if results.get("peers"):
        names = sorted(
            {method for entry in results["peers"]["targets"].values() for method in entry}
        )
        rows = []
        for name, entry in results["targets"].items():
            ours = [run["gap"] for run in entry["runs"] if "gap" in run]
            theirs = results["peers"]["targets"].get(name, {})
            cells = []
            for method in names:
                gaps = [run["gap"] for run in theirs.get(method, []) if run.get("gap") is not None]
                cells.append(timing.number(statistics.median(gaps)) if gaps else "–")
            rows.append([name, timing.number(statistics.median(ours)) if ours else "–", *cells])
        versions = ", ".join(f"{k} {v}" for k, v in results["peers"]["versions"].items())
        parts += [
            f"Gaps of others, median over their seeds ({versions}):\n",
            timing.table(["target", "flowvi", *names], rows),
        ]
    return "\n".join(parts)


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.posteriors", description=__doc__)
    parser.add_argument("--data", default=os.environ.get("FLOWVI_DATA"), help="the data folder")
    parser.add_argument("--targets", help="names, separated by commas; all but cox by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=200_000, help="draws that measure the gap")
    parser.add_argument("--tempering", type=float, help="as in `fit_posterior`")
    parser.add_argument("--family", choices=FAMILIES, help="fit this one instead of the default")
    parser.add_argument("--hard", action="store_true", help="the targets of `hard.py`")
    parser.add_argument("--single", action="store_true", help="single precision")
    parser.add_argument("--quick", action="store_true", help="few steps, to see that all runs")
    parser.add_argument("--resume", action="store_true", help="keep the runs that the output holds")
    parser.add_argument("--peers", default="benchmarks/results/posteriors_peers.json")
    parser.add_argument("--output", default="benchmarks/results/posteriors.json")
    args = parser.parse_args()

    import jax

    from benchmarks.posteriors.hard import HARD

    jax.config.update("jax_enable_x64", not args.single)
    known = list(HARD) if args.hard else targets.names(args.data)
    names = args.targets.split(",") if args.targets else [n for n in known if n != "cox"]
    unknown = set(names) - set(known)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    given = {"tempering": args.tempering, "family": args.family}
    options = {name: value for name, value in given.items() if value is not None}
    if args.quick:
        options["num_steps"] = 100
    results = {
        "environment": timing.environment("flowvi", "jax", "jaxlib"),
        "draws": args.draws,
        "precision": "single" if args.single else "double",
        "options": options,
        "targets": {},
        "peers": None,
    }
    if pathlib.Path(args.peers).exists():
        results["peers"] = json.loads(pathlib.Path(args.peers).read_text())
    cases = {}
    if args.resume and pathlib.Path(args.output).exists():
        before = json.loads(pathlib.Path(args.output).read_text())
        if before["draws"] != args.draws:
            parser.error(f"{args.output} holds runs of {before['draws']} draws, not {args.draws}")
        results["targets"] = before["targets"]
        cases = {name: targets.load(name, args.data) for name in before["targets"]}
    for name in names:
        case = cases[name] = targets.load(name, args.data)
        fresh = {"bar": case.bar, "size": case.size, "runs": []}
        entry = results["targets"].setdefault(name, fresh)
        for seed in range(len(entry["runs"]), args.seeds):
            pause()
            try:
                result = run(name, case, seed, 4_000 if args.quick else args.draws, options)
            except Exception as error:  # a benchmark goes on
                result = {"error": repr(error)}
                log(f"{name}, seed {seed}: {error!r}")
            else:
                log(
                    f"{name}, seed {seed}: gap {result['gap']:.4f} +- {result['gap_error']:.4f}, "
                    f"ess {result['ess']:.3f}, k-hat {result['khat']:.2f}, "
                    f"{result['seconds']:.1f} s" + (", warned" if result["warned"] else "")
                )
            entry["runs"].append(result)
            timing.write(args.output, results, markdown(results, cases))
    timing.write(args.output, results, markdown(results, cases))
    log(markdown(results, cases))


if __name__ == "__main__":
    main()
