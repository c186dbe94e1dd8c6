"""Stops fits at random moments, resumes them, and compares what they give with uninterrupted runs.

python -m benchmarks.kill [--times 50] [--seed 0] [--output benchmarks/results/kill.json]

Fits of a density, a posterior and a model are stopped by SIGKILL, SIGTERM and SIGINT in turn. Half
of the signals come at any moment from the first checkpoint on, the other half while a checkpoint
is being written. Every resumed run must end with the same bits.
"""

import argparse
import hashlib
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from benchmarks import timing

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def fit_density(options):
    """Of data from a normal distribution."""
    import jax
    import numpy as np

    import flowvi as fv

    x = 2.0 + jax.random.normal(jax.random.key(0), (500, 2)) @ np.array([[1.0, 0.5], [0.0, 1.0]])
    return fv.fit_density(
        fv.full_rank(2), x, key=jax.random.key(1), num_steps=4_000, patience=None, **options
    )


def fit_posterior(options):
    """Of a banana."""
    import jax

    import flowvi as fv

    target = fv.Target(lambda u: -0.5 * (u[0] ** 2 + (u[1] - 0.5 * u[0] ** 2) ** 2 / 0.1), 2)
    return fv.fit_posterior(
        target,
        key=jax.random.key(1),
        family=fv.full_rank(2),
        num_steps=3_000,
        plateau=None,
        **options,
    )


def fit_vae(options):
    """Of coins that depend on one latent number."""
    import jax
    import numpy as np

    import flowvi as fv
    from flowvi.networks import MLP

    x = np.random.default_rng(0).integers(0, 2, (500, 8)).astype(np.float32)
    vae = fv.VAE(
        prior=fv.standard_normal(2),
        likelihood=fv.conditional(fv.bernoulli(8), MLP(2, (16,), 8)),
        posterior=fv.conditional(fv.gaussian(2), MLP(8, (16,), 4)),
    )
    return fv.fit_vae(vae, x, key=jax.random.key(1), num_steps=3_000, **options)


FITS = {"density": fit_density, "posterior": fit_posterior, "model": fit_vae}


def fit(name, directory):
    """One run; prints a digest of everything that came out."""
    import jax
    import numpy as np

    result = FITS[name](
        {
            "progress": False,
            "checkpoint_dir": directory,
            "checkpoint_every": 100,
            "resume": True,
        }
    )
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves((result.params, result.history)):
        digest.update(np.asarray(leaf).tobytes())
    print(f"digest {digest.hexdigest()} after {result.num_steps} steps", flush=True)


def start(name, directory):
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.kill",
        "--fit",
        name,
        str(directory),
    ]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


def finish(name, directory):
    process = start(name, directory)
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
    found = [re.fullmatch(r"step_(\d+)\.flowvi", name) for name in names]
    return [int(each[1]) for each in found if each], any(name.endswith(".part") for name in names)


def stop_once(name, number, directory, moment, while_saving):
    """Stops a run; returns the last whole checkpoint, and whether one was being written."""
    process = start(name, directory)
    while process.poll() is None and not steps(directory)[0]:
        time.sleep(0.001)
    time.sleep(moment)
    deadline = time.monotonic() + 5
    while while_saving and not steps(directory)[1] and time.monotonic() < deadline:
        time.sleep(0.0002)
    process.send_signal(number)
    process.communicate()
    whole, saving = steps(directory)
    return max(whole, default=0), saving


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kill", description=__doc__)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="benchmarks/results/kill.json")
    parser.add_argument("--fit", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.fit:
        fit(*args.fit)
        return
    rng = random.Random(args.seed)
    root = pathlib.Path(tempfile.mkdtemp(prefix="flowvi-kill-"))
    expected, lengths = {}, {}
    for name in FITS:
        begun = time.perf_counter()
        expected[name] = finish(name, root / f"whole-{name}")
        lengths[name] = time.perf_counter() - begun
    kills = []
    for index in range(args.times):
        name, number = list(FITS)[index % 3], SIGNALS[index // 3 % 3]
        directory = root / str(index)
        while_saving = index % 2 == 1
        # The fit itself takes about half of a run; the rest is imports and compilation.
        moment = rng.uniform(0, lengths[name] / 2)
        last, saving = stop_once(name, number, directory, moment, while_saving)
        same = finish(name, directory) == expected[name]
        kills.append(
            {
                "fit": name,
                "signal": number.name,
                "checkpoint": last,
                "while_saving": saving,
                "identical": same,
            }
        )
        print(f"{index + 1}: {kills[-1]}", flush=True)
        shutil.rmtree(directory)
    shutil.rmtree(root)
    identical = sum(kill["identical"] for kill in kills)
    saving = sum(kill["while_saving"] for kill in kills)
    results = {
        "environment": timing.environment("flowvi", "jax"),
        "kills": kills,
        "identical": identical,
    }
    text = (
        "# Stop and resume\n\n"
        f"{timing.environment_line(results['environment'])}\n\n"
        f"{identical} of {len(kills)} fits of a density, a posterior and a model that were stopped "
        "by SIGKILL, SIGTERM or SIGINT and resumed ended with the bits of the uninterrupted one; "
        f"{saving} were stopped while a checkpoint was being written.\n"
    )
    timing.write(args.output, results, text)
    print(text)
    raise SystemExit(identical != len(kills))


if __name__ == "__main__":
    main()
