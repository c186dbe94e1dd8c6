"""What the training loop costs, and what it saves.

python -m benchmarks.training [--quick] [--output benchmarks/results/training.json]

    the loop with progress, history and validation, against a bare compiled loop of the same step
    a density fit, against flowjax `fit_to_data` and a jitted step in a Python loop
    a posterior fit, against numpyro `SVI.run` and flowjax's variational fit, progress bars on
    memory of a fit from a file of 2 GiB, against one from 20 MiB

Environments of the peers: `python -m benchmarks.peers setup`.
"""

import argparse
import contextlib
import functools
import json
import os
import pathlib
import pty
import subprocess
import sys
import tempfile
import threading
import time

from benchmarks import timing
from benchmarks.peers.client import Failure, Worker

log = functools.partial(print, flush=True)


# ------------------------------------------------------------------------------- overhead


@contextlib.contextmanager
def terminal():
    """A terminal as standard error, so that there is a bar to be drawn."""
    leader, follower = pty.openpty()
    reader = threading.Thread(target=_drain, args=(leader,), daemon=True)
    reader.start()
    before = sys.stderr
    with os.fdopen(follower, "w") as stream:
        sys.stderr = stream
        try:
            yield
        finally:
            sys.stderr = before
    reader.join(1)
    os.close(leader)


def _drain(leader):
    with contextlib.suppress(OSError):
        while os.read(leader, 65536):
            pass


def short_step():
    """A step of about 50 microseconds: (loss, validation loss, parameters, rows, batch size)."""
    import jax

    import flowvi as fv
    from flowvi.objectives import NegativeLogLikelihood

    family = fv.maf(2, num_layers=1, hidden_sizes=[64, 64], transformer="affine")
    losses = NegativeLogLikelihood(family), NegativeLogLikelihood(family, training=False)
    return (*losses, family.init(jax.random.key(2)), (10_000, 2), 192, 40_000)


def default_step():
    """The step of the default flow in two coordinates."""
    import jax

    import flowvi as fv
    from flowvi.objectives import NegativeLogLikelihood

    family = fv.maf(2)
    losses = NegativeLogLikelihood(family), NegativeLogLikelihood(family, training=False)
    return (*losses, family.init(jax.random.key(2)), (10_000, 2), 256, 1_000)


def model_step():
    """The step of a VAE of the size of MNIST."""
    import jax

    import flowvi as fv
    from flowvi.networks import MLP

    vae = fv.VAE(
        prior=fv.standard_normal(128),
        likelihood=fv.conditional(fv.bernoulli(784), MLP(128, (512, 512), 784)),
        posterior=fv.conditional(fv.gaussian(128), MLP(784, (512, 512), 256)),
    )
    loss = vae.loss()
    return loss, loss, vae.init(jax.random.key(2)), (2_000, 784), 128, 400


#: Steps and what `fit` has to reach of the steps a second of a bare loop.
STEPS = {
    "a step of 50 microseconds": (short_step, 0.80),
    "the default fv.maf(2)": (default_step, 0.95),
    "a VAE of the size of MNIST": (model_step, 0.97),
}


def overhead(quick):
    """Steps a second of `fit`, with bar, history and validation, and of bare loops."""
    return {name: ratio(make, quick) for name, (make, _) in STEPS.items()}


def ratio(make, quick):
    import jax
    import numpy as np
    import optax

    import flowvi as fv

    loss_fn, validate, params, shape, batch, num_steps = make()
    num_steps = max(num_steps // 20, 100) if quick else num_steps
    rng, rows = np.random.default_rng(0), shape[0]
    numbers = rng.normal(size=shape) if shape[1] == 2 else rng.integers(0, 2, shape)
    x = jax.numpy.asarray(numbers, np.float32)
    optimizer = optax.adam(1e-3)
    order = jax.random.permutation(jax.random.key(4), rows)

    def step(index, carry):
        # The bare loop: a batch of random rows, the gradient, the update, and nothing else.
        params, opt_state = carry
        key = jax.random.fold_in(jax.random.key(3), index)
        start = (index * batch) % (rows - batch)
        picked = jax.lax.dynamic_slice_in_dim(order, start, batch)

        def scalar(params):
            output = loss_fn(params, key, {"x": x[picked]})
            return output[0] if isinstance(output, tuple) else output

        gradient = jax.grad(scalar)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    @jax.jit
    def bare(params):
        return jax.lax.fori_loop(0, num_steps, step, (params, optimizer.init(params)))

    def fit():
        fv.fit(
            loss_fn,
            params,
            optimizer,
            key=jax.random.key(0),
            num_steps=num_steps,
            data={"x": x},
            batch_size=batch,
            validate=validate,
            validation_data={"x": x[: rows // 10]},
            validate_every=100,
        )

    calls = {"bare loop": lambda: jax.block_until_ready(bare(params)), "fit": fit}
    with terminal():
        times = timing.interleaved(calls, budget=3 if quick else 30, most=15)
    median = {name: value["median"] for name, value in times.items()}
    return {
        "microseconds": {name: 1e6 * value / num_steps for name, value in median.items()},
        "ratio": median["bare loop"] / median["fit"],
    }


def python_loop(quick):
    """Seconds of `fit_density` and of the same steps jitted one by one in a Python loop."""
    import jax
    import numpy as np
    import optax

    import flowvi as fv
    from flowvi.objectives import NegativeLogLikelihood

    num_steps, batch = (450 if quick else 9000), 100
    family = fv.maf(2, num_layers=2, hidden_sizes=[16], transformer="affine", activation="relu")
    rows = np.random.default_rng(0).normal(size=(10_000, 2)).astype(np.float32)
    optimizer, loss_fn = optax.adam(1e-3), NegativeLogLikelihood(family)
    held_out_loss = jax.jit(NegativeLogLikelihood(family, training=False))

    @jax.jit
    def step(params, opt_state, key, x):
        loss, gradient = jax.value_and_grad(loss_fn)(params, key, {"x": x})
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    def loop():
        rng, key = np.random.default_rng(0), jax.random.key(0)
        train, held_out = rows[:9000], rows[9000:]
        params = family.init(key)
        opt_state = optimizer.init(params)
        for _ in range(num_steps * batch // 9000):
            order, losses = rng.permutation(9000), []
            for start in range(0, 9000, batch):
                key, own = jax.random.split(key)
                picked = train[order[start : start + batch]]
                params, opt_state, loss = step(params, opt_state, own, picked)
                losses.append(loss)
            float(held_out_loss(params, key, {"x": held_out}))

    def fit():
        fv.fit_density(
            family,
            rows,
            key=jax.random.key(0),
            num_steps=num_steps,
            batch_size=batch,
            optimizer=optimizer,
            patience=None,
            combine=False,
        )

    with terminal():
        times = timing.interleaved({"fit": fit, "Python loop": loop}, budget=10, most=7)
    median = {name: value["median"] for name, value in times.items()}
    return {"seconds": median, "ratio": median["Python loop"] / median["fit"]}


# ---------------------------------------------------------------------------------- peers


def against_peers(quick):
    """Seconds of the same fits in flowvi, flowjax and numpyro, in turn."""
    results = {}
    for what in ("density", "posterior"):
        steps = 450 if quick else 9000
        log(f"{what} ...")
        with contextlib.ExitStack() as stack:
            calls = {}
            for name in ("flowvi", "flowjax", "numpyro"):
                try:
                    worker = stack.enter_context(Worker(name))
                    worker.ask(do="train", what=what, steps=steps)
                except Failure as failure:
                    log(f"  {name}: {failure}")
                    continue
                calls[name] = functools.partial(worker.ask, do="train", what=what, steps=steps)
            times = timing.interleaved(
                calls, budget=10, most=7, time_call=lambda call: call()["seconds"]
            )
        median = {name: value["median"] for name, value in times.items()}
        ratios = {name: median[name] / median["flowvi"] for name in median if name != "flowvi"}
        results[what] = {"steps": steps, "seconds": median, "ratios": ratios}
    return results


# --------------------------------------------------------------------------------- memory


def anonymous_memory():
    """Bytes of anonymous memory of this process."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    return 0


def fit_file(path, num_rows, event_size):
    """Fits a density to a mapped file; prints the largest anonymous memory meanwhile."""
    import jax
    import numpy as np

    import flowvi as fv

    largest, done = [0], threading.Event()

    def watch():
        while not done.wait(0.01):
            largest[0] = max(largest[0], anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    x = np.memmap(path, np.float32, "r", shape=(num_rows, event_size))
    family = fv.maf(event_size, num_layers=2, hidden_sizes=[32], transformer="affine")
    result = fv.fit_density(
        family,
        x,
        key=jax.random.key(0),
        num_steps=2000,
        batch_size=256,
        combine=False,
        progress=False,
    )
    done.set()
    watcher.join()
    print(json.dumps({"bytes": largest[0], "seconds": result.seconds, "steps": result.num_steps}))


def memory(quick):
    """Anonymous memory of a fit from a small and from a large file."""
    import numpy as np

    event_size, results = 16, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, size in (("20 MiB", 20 * 2**20), ("2 GiB", (2**26 if quick else 2**31))):
            path, num_rows = pathlib.Path(folder) / "rows.bin", size // (4 * event_size)
            rng = np.random.default_rng(0)
            with open(path, "wb") as file:
                left = num_rows
                while left:
                    count = min(left, 2**16)
                    file.write(rng.normal(size=(count, event_size)).astype(np.float32).tobytes())
                    left -= count
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.training", "--file"]
            output = subprocess.run(
                [*command, str(path), str(num_rows), str(event_size)],
                stdout=subprocess.PIPE,
                check=True,
                text=True,
            ).stdout
            results[name] = json.loads(output.splitlines()[-1])
            log(f"  {name}: {results[name]}")
            path.unlink()
    return results | {"difference": results["2 GiB"]["bytes"] - results["20 MiB"]["bytes"]}


def bars(results):
    """Dicts of "what", "value", "bar", "met"."""
    rows = [
        (f"steps/s against a bare loop, {name}", results["overhead"][name]["ratio"], bar)
        for name, (_, bar) in STEPS.items()
    ]
    rows.append(("density fit, against a Python loop", results["python_loop"]["ratio"], 2.0))
    for what, result in results["peers"].items():
        for name, ratio in result["ratios"].items():
            rows.append((f"{what} fit, times faster than {name}", ratio, 2.0))
    table = [
        {"what": what, "value": value, "bar": f"≥ {bar:g}", "met": value >= bar}
        for what, value, bar in rows
    ]
    extra = results["memory"]["difference"] / 2**20
    what = "MiB of anonymous memory, 2 GiB against 20 MiB"
    return [*table, {"what": what, "value": extra, "bar": "≤ 300", "met": extra <= 300}]


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that all runs")
    parser.add_argument("--output", default="benchmarks/results/training.json")
    parser.add_argument("--file", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=["overhead"], help="one part, printed alone")
    args = parser.parse_args()
    if args.only:
        log(overhead(args.quick))
        return
    if args.file:
        fit_file(args.file[0], int(args.file[1]), int(args.file[2]))
        return
    begun = time.perf_counter()
    results = {"environment": timing.environment("flowvi", "jax", "jaxlib", "optax")}
    for name, measure in {
        "overhead": overhead,
        "python_loop": python_loop,
        "peers": against_peers,
        "memory": memory,
    }.items():
        log(f"{name} ...")
        results[name] = measure(args.quick)
        log(f"  {results[name]}")
    results["bars"] = bars(results)
    results["seconds"] = time.perf_counter() - begun
    rows = [
        [row["what"], timing.number(row["value"]), row["bar"], "yes" if row["met"] else "no"]
        for row in results["bars"]
    ]
    text = "\n".join(
        [
            "# Training\n",
            timing.environment_line(results["environment"]) + "\n",
            "Medians, ratios within one run.\n",
            timing.table(["", "measured", "bar", "met"], rows),
            "Steps take "
            + ", ".join(
                f"{timing.number(each['microseconds']['bare loop'])} ({name})"
                for name, each in results["overhead"].items()
            )
            + " microseconds.\n",
        ]
    )
    timing.write(args.output, results, text)
    log(text)


if __name__ == "__main__":
    main()
