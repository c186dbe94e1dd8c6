"""Posteriors from simulators, against reference draws.

    python -m benchmarks.simulators --data FOLDER [--tasks two_moons slcp] [--sizes 10000 30000]
        [--seeds 1] [--peers sbi] [--calibration] [--output FILE.md]

FOLDER holds NAME.npz of each task, with reference draws of five observations. Of each task and
number of simulations one line says the mean C2ST, that of each observation, and how long the fit
took, compilation included. A peer is given the same simulations, in an environment of its own that
`python -m benchmarks.peers setup --only sbi` makes. With --calibration, ranks, coverage and TARP
over 1,000 fresh simulations follow.
"""

import argparse
import pathlib
import subprocess
import tempfile
import time
import warnings

import jax
import numpy as np

import flowvi as fv
from benchmarks.peers import environments
from benchmarks.simulators.measures import c2st
from benchmarks.simulators.tasks import Task, references, simulations, tasks

#: Draws that are compared with the reference, of which there are as many.
NUM_DRAWS = 10_000

#: Pairs of a calibration.
NUM_FRESH = 1_000


def fitted(task: Task, size: int, seed: int) -> tuple[fv.AmortizedPosterior, float]:
    """(what a fit with no settings gives, its seconds)."""
    pairs = simulations(task, size, seed)
    began = time.perf_counter()
    posterior = fv.fit_amortized(task.prior, pairs=pairs, key=jax.random.key(seed), progress=False)
    return posterior, time.perf_counter() - began


def calibration(posterior: fv.AmortizedPosterior, task: Task, seed: int) -> fv.PosteriorCalibration:
    """What fresh simulations say."""
    pairs = simulations(task, NUM_FRESH, 10_000 + seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fv.CalibrationWarning)  # it is printed
        return fv.calibrate(posterior, *pairs, key=jax.random.key(seed))


def by_peer(
    peer: str, task: Task, observations: list[np.ndarray], size: int, seed: int
) -> tuple[list[np.ndarray], float]:
    """(draws at each observation, seconds) of a peer at the same simulations."""
    theta, x = simulations(task, size, seed)
    with tempfile.TemporaryDirectory() as folder:
        given, found = pathlib.Path(folder) / "given.npz", pathlib.Path(folder) / "found.npz"
        bound = np.nan if task.support is None else task.support[1]
        np.savez(given, theta=theta, x=x, observations=np.stack(observations), bound=bound)
        worker = pathlib.Path(__file__).parent / f"{peer}_worker.py"
        command = [str(environments.python(peer)), "-W", "ignore", str(worker)]
        subprocess.run([*command, str(given), str(found), str(seed)], check=True)
        with np.load(found) as loaded:
            return list(loaded["draws"]), float(loaded["seconds"])


def line(
    method: str, name: str, size: int, seed: int, scores: list[float], outside: int, seconds: float
) -> str:
    """One row of the table."""
    each = " ".join(f"{score:.3f}" for score in scores)
    what = f"{method} | {name} | {size} | {seed} | {np.mean(scores):.3f} | {each}"
    return f"| {what} | {outside} | {seconds:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(tasks()), choices=list(tasks()))
    parser.add_argument("--sizes", nargs="+", type=int, default=[10_000, 30_000])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--peers", nargs="+", default=[], choices=["sbi"])
    parser.add_argument("--calibration", action="store_true")
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    head = "| method | task | simulations | seed | C2ST | of each observation | outside | seconds |"
    rows = [head, "|---|---|---:|---:|---:|---|---:|---:|"]
    print("\n".join(rows), flush=True)
    places = [
        (name, size, seed)
        for name in arguments.tasks
        for size in arguments.sizes
        for seed in range(arguments.seeds)
    ]
    for name, size, seed in places:
        task = tasks()[name]
        observations, truth = zip(*references(arguments.data, name), strict=True)
        for method in ["flowvi", *arguments.peers]:
            if method == "flowvi":
                posterior, seconds = fitted(task, size, seed)
                key = jax.random.key(100 + seed)
                draws = [posterior.sample(x, key, NUM_DRAWS) for x in observations]
            else:
                draws, seconds = by_peer(method, task, list(observations), size, seed)
            low, high = task.support or (-np.inf, np.inf)
            outside = sum(int(((d < low) | (d > high)).any(1).sum()) for d in draws)
            scores = [c2st(*pair) for pair in zip(truth, draws, strict=True)]
            rows.append(line(method, name, size, seed, scores, outside, seconds))
            print(rows[-1], flush=True)
        if arguments.calibration:
            print(calibration(posterior, task, seed), flush=True)
    if arguments.output is not None:
        arguments.output.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
