"""Posteriors from simulators, against reference draws.

    python -m benchmarks.simulators --data FOLDER [--tasks two_moons slcp] [--sizes 10000 30000]
        [--seeds 1] [--peers lampe] [--output FILE.md]

FOLDER holds NAME.npz of each task, with reference draws of five observations. Of each task and
number of simulations one line says the C2ST of the five observations, their mean, and how long the
fit took, compilation included; a peer is given the same simulations, in its own environment.
"""

import argparse
import pathlib
import time

import jax
import numpy as np

import flowvi as fv
from benchmarks.simulators.measures import c2st
from benchmarks.simulators.tasks import Task, references, simulations, tasks

#: Draws that are compared with the reference, of which there are as many.
NUM_DRAWS = 10_000


def measure(task: Task, name: str, data: pathlib.Path, size: int, seed: int) -> dict:
    """One fit with no settings, and its C2ST at each observation."""
    theta, x = simulations(task, size, seed)
    began = time.perf_counter()
    posterior = fv.fit_amortized(
        task.prior, pairs=(theta, x), key=jax.random.key(seed), progress=False
    )
    seconds = time.perf_counter() - began
    scores, outside = [], 0
    for observation, reference in references(data, name):
        draws = posterior.sample(observation, jax.random.key(100 + seed), NUM_DRAWS)
        if task.support is not None:
            low, high = task.support
            outside += int(((draws < low) | (draws > high)).any(1).sum())
        scores.append(c2st(reference, draws))
    return {
        "method": "flowvi",
        "task": name,
        "size": size,
        "seed": seed,
        "scores": scores,
        "seconds": seconds,
        "steps": posterior.num_steps,
        "outside": outside,
    }


def line(found: dict) -> str:
    """One row of the table."""
    each = " ".join(f"{score:.3f}" for score in found["scores"])
    mean = np.mean(found["scores"])
    what = f"{found['method']} | {found['task']} | {found['size']} | {found['seed']}"
    return f"| {what} | {mean:.3f} | {each} | {found['seconds']:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(tasks()), choices=list(tasks()))
    parser.add_argument("--sizes", nargs="+", type=int, default=[10_000, 30_000])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    head = "| method | task | simulations | seed | C2ST | of each observation | seconds |"
    rows = [head, "|---|---|---:|---:|---:|---|---:|"]
    print("\n".join(rows), flush=True)
    for name in arguments.tasks:
        for size in arguments.sizes:
            for seed in range(arguments.seeds):
                found = measure(tasks()[name], name, arguments.data, size, seed)
                rows.append(line(found))
                print(rows[-1], flush=True)
    if arguments.output is not None:
        arguments.output.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
