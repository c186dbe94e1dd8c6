"""Kills a fit at random moments, resumes it, and compares the parameters with an uninterrupted run.

python -m benchmarks.kill [--times 50] [--seed 0] [--output benchmarks/results/kill.json]

Half of the kills come at any moment from the first checkpoint on, the other half while a checkpoint
is being written. Every resumed run must end with the same bits.
"""

import argparse
import hashlib
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

from benchmarks import timing

NUM_STEPS, EVERY = 30_000, 200


def fit(directory):
    """One run of a density fit; prints a digest of everything that came out."""
    import jax
    import numpy as np

    import flowvi as fv

    x = 2.0 + jax.random.normal(jax.random.key(0), (500, 2)) @ np.array([[1.0, 0.5], [0.0, 1.0]])
    result = fv.fit_density(
        fv.full_rank(2),
        x,
        key=jax.random.key(1),
        num_steps=NUM_STEPS,
        patience=None,
        progress=False,
        checkpoint_dir=directory,
        checkpoint_every=EVERY,
        resume=True,
    )
    digest = hashlib.sha256()
    leaves = jax.tree.leaves((result.params, result.last_params, result.history))
    for leaf in leaves:
        digest.update(np.asarray(leaf).tobytes())
    print(f"digest {digest.hexdigest()} after {result.num_steps} steps", flush=True)


def start(directory):
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.kill", "--fit", str(directory)]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


def finish(directory):
    process = start(directory)
    output, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"A run ended with code {process.returncode}.")
    return output.strip().splitlines()[-1]


def steps(directory):
    """Steps of the whole checkpoints, and whether one is being written."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return [], False
    return [int(name) for name in names if name.isdigit()], not all(n.isdigit() for n in names)


def kill_once(directory, moment, while_saving):
    """Kills a run; returns the last whole checkpoint, and whether one was being written."""
    process = start(directory)
    while process.poll() is None and not steps(directory)[0]:
        time.sleep(0.001)
    time.sleep(moment)
    deadline = time.monotonic() + 5
    while while_saving and not steps(directory)[1] and time.monotonic() < deadline:
        time.sleep(0.0002)
    process.kill()
    process.communicate()
    whole, saving = steps(directory)
    return max(whole, default=0), saving


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kill", description=__doc__)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="benchmarks/results/kill.json")
    parser.add_argument("--fit", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fit:
        fit(args.fit)
        return
    rng = random.Random(args.seed)
    root = pathlib.Path(tempfile.mkdtemp(prefix="flowvi-kill-"))
    begun = time.perf_counter()
    expected = finish(root / "whole")
    length = time.perf_counter() - begun
    kills = []
    for index in range(args.times):
        directory = root / str(index)
        while_saving = index % 2 == 1
        # The fit itself takes about half of a run; the rest is imports and compilation.
        last, saving = kill_once(directory, rng.uniform(0, length / 2), while_saving)
        got = finish(directory)
        kills.append({"checkpoint": last, "while_saving": saving, "identical": got == expected})
        print(f"{index + 1}: {kills[-1]}", flush=True)
        shutil.rmtree(directory)
    shutil.rmtree(root)
    identical = sum(kill["identical"] for kill in kills)
    saving = sum(kill["while_saving"] for kill in kills)
    interrupted = sum(0 < kill["checkpoint"] < NUM_STEPS for kill in kills)
    results = {
        "environment": timing.environment("flowvi", "jax", "orbax-checkpoint"),
        "num_steps": NUM_STEPS,
        "checkpoint_every": EVERY,
        "kills": kills,
        "identical": identical,
    }
    text = (
        "# Kill and resume\n\n"
        f"{timing.environment_line(results['environment'])}\n\n"
        f"{identical} of {len(kills)} runs that were killed and resumed ended with the bits of the "
        f"uninterrupted one; {interrupted} were killed in the middle, {saving} of all while a "
        "checkpoint was being written.\n"
    )
    timing.write(args.output, results, text)
    print(text)
    raise SystemExit(identical != len(kills))


if __name__ == "__main__":
    main()
