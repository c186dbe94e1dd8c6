"""flowvi beside other libraries of normalizing flows, on the same work, interleaved in one call.

python -m benchmarks.peers setup [--only flowjax,zuko]
python -m benchmarks.peers [--quick] [--only flowjax,zuko] [--tasks maf_sample,moons]
"""

import argparse
import contextlib
import functools
import statistics
import time

from benchmarks import timing
from benchmarks.peers import environments
from benchmarks.peers.client import Failure, Worker

TASKS = {
    "maf_log_prob": "log_prob of a MAF",
    "maf_gradient": "gradient of its NLL",
    "maf_sample": "samples of a MAF",
    "iaf_log_prob": "log_prob of an IAF",
    "iaf_gradient": "gradient of its NLL",
}
SIZE = {"layers": 5, "event_size": 64, "hidden": [512, 512], "batch": 1000}
QUICK_SIZE = {"layers": 2, "event_size": 8, "hidden": [32, 32], "batch": 50}

#: What is to be reached: task -> (library or None for the fastest, times as fast).
BARS = {
    "maf_log_prob": (None, 1.2),
    "maf_gradient": (None, 1.3),
    "maf_sample": (None, 15.0),
    "iaf_log_prob": ("flowjax", 15.0),
    "iaf_gradient": ("flowjax", 15.0),
}
MOONS_NLL, MOONS_BAR = 1.164, 1.5

#: Learning rates of flowjax's fit of two moons; the best of them counts.
FLOWJAX_RATES = (5e-4, 1e-3, 2e-3)

#: Seconds between two libraries.
PAUSE = 0.25

log = functools.partial(print, flush=True)


def compare_task(task, workers, size, budget):
    """Times one task in all libraries, in turn: name -> {"median", ...} or {"reason"}."""
    results, ready = {}, {}
    for name, worker in workers.items():
        try:
            prepared = worker.ask(do="prepare", task=task, size=size)
        except Failure as failure:
            results[name] = {"reason": str(failure)}
            log(f"  {name}: {failure}")
            continue
        ready[name] = worker
        results[name] = {"first_run": prepared["seconds"]}
    calls = {
        name: functools.partial(worker.ask, do="run", task=task) for name, worker in ready.items()
    }

    def time_call(call):
        # Threads of the library before still spin for a while, and would slow this one down.
        time.sleep(PAUSE)
        # The worker's own clock: what the pipe takes is no part of the work.
        return call()["seconds"]

    times = timing.interleaved(calls, budget=budget, most=40, least=3, time_call=time_call)
    for name, value in times.items():
        results[name] |= value
        log(f"  {name}: {1e3 * value['median']:.3g} ms")
        ready[name].ask(do="forget", task=task)
    return results


def compare_moons(names, repeats, quick):
    """Seconds to reach the bar on two moons, each fit in a fresh process, in turn."""
    runs = {"flowvi": ("flowvi", {})} if "flowvi" in names else {}
    if "flowjax" in names:
        for rate in FLOWJAX_RATES:
            runs[f"flowjax, rate {rate:g}"] = ("flowjax", {"learning_rate": rate})
    results = {name: {"runs": []} for name in runs}
    for repeat in range(repeats):
        for name, (library, settings) in runs.items():
            if "reason" in results[name]:
                continue
            try:
                with Worker(library) as worker:
                    # An answer says that all is imported.
                    worker.ask(do="describe")
                    request = {"seed": repeat, "bar": MOONS_NLL, "quick": quick}
                    fit = worker.ask(do="moons", **request, **settings)
            except Failure as failure:
                results[name]["reason"] = str(failure)
                log(f"  {name}: {failure}")
                continue
            results[name]["runs"].append(fit)
            log(f"  {name}: {fit}")
    for result in results.values():
        # A fit that never arrives takes for ever.
        times = [run["seconds"] if run["reached"] else float("inf") for run in result["runs"]]
        median = statistics.median(times) if times else float("inf")
        result["median"] = median if median < float("inf") else None
    return results


def bar_rows(tasks, moons):
    """Dicts of "what", "against", "ratio", "bar", "met"."""
    rows = []
    for task, results in tasks.items():
        library, bar = BARS[task]
        medians = {name: r["median"] for name, r in results.items() if "median" in r}
        ours = medians.pop("flowvi", None)
        if library is None and medians:
            library = min(medians, key=medians.get)
        ratio = medians[library] / ours if ours and library in medians else None
        what = f"{TASKS[task]} ({task})"
        rows.append({"what": what, "against": library, "ratio": ratio, "bar": bar})
    if moons is not None:
        ours = moons.get("flowvi", {}).get("median")
        # Where the peer misses in most runs, its best one counts.
        seconds = {
            name: result["median"]
            or min(run["seconds"] for run in result["runs"] if run["reached"])
            for name, result in moons.items()
            if name != "flowvi" and any(run["reached"] for run in result["runs"])
        }
        best = min(seconds, key=seconds.get) if seconds else None
        ratio = seconds[best] / ours if ours and best else None
        what = f"time to fit two moons to a test NLL of {MOONS_NLL}"
        rows.append({"what": what, "against": best, "ratio": ratio, "bar": MOONS_BAR})
    for row in rows:
        row["met"] = row["ratio"] is not None and row["ratio"] >= row["bar"]
    return rows


def markdown(results):
    size, tasks, moons = results["size"], results["tasks"], results["moons"]
    names = list(results["libraries"])
    rows, notes = [], []
    for name in names:
        cells = []
        for task, by_name in tasks.items():
            result, ours = by_name.get(name, {}), by_name.get("flowvi", {})
            if "median" not in result:
                cells.append("–")
                if "reason" in result:
                    notes.append(f"- {name}, {task}: {result['reason']}")
                continue
            cell = timing.number(1e3 * result["median"])
            if name != "flowvi" and "median" in ours:
                cell += f" ({timing.number(result['median'] / ours['median'])}x)"
            cells.append(cell)
        rows.append([name, *cells])
    hidden = " and ".join(map(str, size["hidden"]))
    parts = [
        "# flowvi and its peers\n",
        timing.environment_line(results["environment"]) + "\n",
        f"{size['layers']} affine layers, D={size['event_size']}, hidden {hidden}, batch "
        f"{size['batch']}, {size['activation']}, single precision; medians in milliseconds, all "
        "libraries in turn in one run. In brackets: times as long as flowvi. JAX libraries are "
        "compiled, torch libraries run eagerly.\n",
        timing.table(["", *(f"{TASKS[task]}" for task in tasks)], rows),
    ]
    parts += ["\n".join(sorted(set(notes))) + "\n"] if notes else []
    if moons is not None:
        parts += [
            f"Two moons to a test NLL of {MOONS_NLL}: 10,000 points, spline MAF, compile time "
            "counted, evaluations of the test set and imports not; seconds, each fit in a fresh "
            "process.\n",
            timing.table(
                ["", "median", "runs", "test NLL at the end"],
                [
                    [
                        name,
                        result.get("reason") or timing.number(result["median"]),
                        ", ".join(
                            timing.number(run["seconds"]) + ("" if run["reached"] else " (missed)")
                            for run in result["runs"]
                        ),
                        ", ".join(f"{run['test_nll']:.4f}" for run in result["runs"]),
                    ]
                    for name, result in moons.items()
                ],
            ),
        ]
    parts.append(
        timing.table(
            ["times as fast as", "", "measured", "bar", "met"],
            [
                [
                    row["what"],
                    row["against"] or "–",
                    timing.number(row["ratio"]),
                    f"≥ {row['bar']:g}",
                    "yes" if row["met"] else "no",
                ]
                for row in results["bars"]
            ],
        )
    )
    versions = [
        [name, ", ".join(f"{key} {value}" for key, value in library.get("versions", {}).items())]
        if "versions" in library
        else [name, library["reason"]]
        for name, library in results["libraries"].items()
    ]
    parts.append(timing.table(["library", "environment"], versions))
    return "\n".join(parts)


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("command", nargs="?", choices=["run", "setup"], default="run")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that all runs")
    parser.add_argument("--only", help="peers, separated by commas; flowvi always runs")
    parser.add_argument(
        "--tasks", help="tasks, separated by commas: " + ", ".join(BARS) + ", moons"
    )
    parser.add_argument("--activation", default="silu", choices=["silu", "relu", "tanh"])
    parser.add_argument("--output", default="benchmarks/results/peers.json")
    args = parser.parse_args()
    peers = args.only.split(",") if args.only else list(environments.PEERS)
    tasks = args.tasks.split(",") if args.tasks else [*TASKS, "moons"]
    known = {*environments.PEERS, *(environments.OF_SIMULATORS if args.command == "setup" else ())}
    unknown = (set(peers) - known) | (set(tasks) - {*TASKS, "moons"})
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if args.command == "setup":
        raise SystemExit(1 if environments.setup(peers) else 0)

    names = ["flowvi", *peers]
    size = (QUICK_SIZE if args.quick else SIZE) | {"activation": args.activation}
    results = {"environment": timing.environment(), "size": size, "quick": args.quick}
    results |= {"libraries": {}, "tasks": {}, "moons": None}
    with contextlib.ExitStack() as stack:
        workers = {}
        for name in names:
            try:
                worker = stack.enter_context(Worker(name))
                results["libraries"][name] = worker.ask(do="describe")
                workers[name] = worker
            except Failure as failure:
                results["libraries"][name] = {"reason": str(failure)}
                log(f"{name}: {failure}")
        for task in TASKS:
            if task in tasks:
                log(f"{task} ...")
                results["tasks"][task] = compare_task(
                    task, workers, size, 0.2 if args.quick else 10.0
                )
    if "moons" in tasks:
        log("moons ...")
        alive = [name for name in names if "versions" in results["libraries"][name]]
        results["moons"] = compare_moons(alive, 1 if args.quick else 3, args.quick)
    results["bars"] = bar_rows(results["tasks"], results["moons"])
    text = markdown(results)
    timing.write(args.output, results, text)
    log(text)


if __name__ == "__main__":
    main()
