"""More than one device, more than one process, many fits, and many rows.

python -m benchmarks.scale [--quick] [--large] [--only devices ...] [--kills 20]

Devices are those that XLA_FLAGS=--xla_force_host_platform_device_count makes of one processor: they
share its cores, so that steps do not get faster, and what is compared are results and bytes.
"""

import argparse
import functools
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time

from benchmarks import programs, timing
from benchmarks.training import anonymous_memory

PARTS = ("devices", "processes", "kills", "ensemble", "rows", "inverse")


def log(*words):
    print(*words, file=sys.stderr, flush=True)


def fits():
    """{name: (loss, parameters, data, batch size)} of plain fits."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import flowvi as fv
    from flowvi.networks import MLP

    key, rng = jax.random.key(0), np.random.default_rng(0)
    density = fv.maf(8, num_layers=3, hidden_sizes=[32, 32])
    flow = fv.iaf(8, num_layers=3, hidden_sizes=[32, 32], transformer="affine")

    def log_joint(params, key, z, batch):
        return -0.5 * jnp.sum((z - 1) ** 2, -1) - 0.1 * jnp.sum(z**4, -1)

    def model(posterior):
        return fv.VAE(
            prior=fv.standard_normal(4),
            likelihood=fv.conditional(fv.bernoulli(16), MLP(4, (32,), 16)),
            posterior=posterior,
        )

    likelihood = fv.objectives.NegativeLogLikelihood(density)
    path = fv.objectives.ELBO(flow, log_joint, num_samples=64, path=True)
    weighted = fv.objectives.IWELBO(flow, log_joint, num_samples=64)
    amortized = model(fv.conditional(fv.gaussian(4), MLP(16, (32,), 8)))
    local = model(fv.local(fv.gaussian(4), 1000))
    x = rng.normal(size=(1000, 8))
    bits = rng.integers(0, 2, (1000, 16)).astype(float)
    rows = {"x": bits, "row": np.arange(1000, dtype=np.int32)}
    return {
        "density": (likelihood, density.init(key), {"x": x}, 128),
        "posterior, path gradient": (path, path.init(key), None, None),
        "posterior, IWELBO": (weighted, weighted.init(key), None, None),
        "VAE": (amortized.loss(), amortized.init(key), {"x": bits}, 128),
        "local parameters": (local.loss(), local.init(key), rows, 128),
    }


def flat(tree):
    import jax
    import numpy as np

    return np.concatenate([np.ravel(np.asarray(leaf, float)) for leaf in jax.tree.leaves(tree)])


def one_fit(name, mesh, num_steps):
    """Parameters, losses and steps/s of one fit, and the bytes of its step."""
    import jax
    import numpy as np
    import optax

    import flowvi as fv
    from flowvi import devices
    from flowvi.params import partition
    from flowvi.training import program

    loss_fn, params, data, batch_size = fits()[name]
    optimizer = optax.adam(1e-3)
    fit = functools.partial(fv.fit, loss_fn, params, optimizer, key=jax.random.key(1))
    fit = functools.partial(fit, data=data, batch_size=batch_size, progress=False, mesh=mesh)
    fit(num_steps=2)
    result = fit(num_steps=num_steps)
    compiled = program.build(program.Program(loss_fn, optimizer))
    with devices.over(devices.as_mesh(mesh)):
        state = compiled.begin(devices.put(params))
        rows = None if data is None else devices.put(np.zeros((1, batch_size), np.int32))
        numbers = np.zeros(3, np.int32)
        key = devices.put(jax.random.key(0))
        program_of_step = compiled.run.lower(state, key, devices.put(data), rows, *numbers)
        text = program_of_step.compile().as_text()
    leaves = jax.tree.leaves(partition(params)[0])
    shared = [leaf for leaf in leaves if batch_size is None or leaf.shape[:1] != (1000,)]
    gradient = sum(leaf.nbytes for leaf in shared)
    if len(shared) < len(leaves):  # the rows of a batch, of those that each has for itself
        others = [leaf for leaf in leaves if leaf.shape[:1] == (1000,)]
        gradient += sum(leaf.nbytes * batch_size // 1000 for leaf in others)
    return {
        "params": flat(result.params).tolist(),
        "loss": float(result.history["loss"][-1]),
        "steps_per_second": num_steps / result.seconds,
        "exchanged": programs.exchanged(text),
        "gradient": gradient,
    }


def child(count, *args, wait=True):
    """One call of this file in a process with so many devices."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.scale", "--child", *map(str, args)]
    # A file: processes that end together must not wait for somebody to read what one has said.
    output = tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.DEVNULL)
    process.said = output
    return answer(process) if wait else process


def answer(process):
    if process.wait():
        raise RuntimeError(f"A process ended with code {process.returncode}.")
    process.said.seek(0)
    return json.loads(process.said.read().splitlines()[-1])


def compared(found, alone):
    """How far a fit is from the one on one device, and what its step exchanges."""
    import numpy as np

    one, two = np.array(alone["params"]), np.array(found["params"])
    return {
        "distance": float(np.max(np.abs(one - two) / np.maximum(np.abs(one), 1))),
        "loss": found["loss"],
        "steps_per_second": found["steps_per_second"],
        "reduced": found["exchanged"]["all-reduce"] / found["gradient"],
        "others": sum(found["exchanged"].values()) - found["exchanged"]["all-reduce"],
        "gradient": found["gradient"],
    }


def over_devices(quick):
    counts = (1, 4) if quick else (1, 2, 4)
    found = {count: child(count, "devices", count, 20 if quick else 200) for count in counts}
    return {
        name: {count: compared(found[count][name], found[1][name]) for count in counts}
        for name in found[1]
    }


def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def over_processes(quick):
    steps, place = 20 if quick else 200, address()
    alone = child(1, "devices", 1, steps)
    two = [child(2, "processes", place, number, 2, steps, wait=False) for number in range(2)]
    found = [answer(process) for process in two]
    return {
        name: {f"process {i}": compared(found[i][name], alone[name]) for i in range(2)}
        for name in found[0]
    }


def kills(count):
    """Kills one of two processes in turn; resumes both."""
    with tempfile.TemporaryDirectory() as root:
        whole = pathlib.Path(root) / "whole"
        place = address()
        pair = [child(2, "kill", place, number, 2, whole, wait=False) for number in range(2)]
        expected, results = answer(pair[0]), []
        answer(pair[1])
        for index in range(count):
            folder, place = pathlib.Path(root) / str(index), address()
            pair = [child(2, "kill", place, number, 2, folder, wait=False) for number in range(2)]
            while not list(folder.glob("*.flowvi")) and pair[0].poll() is None:
                time.sleep(0.05)
            time.sleep(random.Random(index).uniform(0, 2))
            victim, other = pair[index % 2], pair[1 - index % 2]
            victim.send_signal(signal.SIGKILL)
            begun = time.perf_counter()
            victim.wait()
            other.wait()
            seconds, code = time.perf_counter() - begun, other.returncode
            place = address()
            pair = [child(2, "kill", place, number, 2, folder, wait=False) for number in range(2)]
            same = [answer(process) == expected for process in pair]
            results.append({"seconds": seconds, "code": code, "identical": all(same)})
            log(f"  {index + 1}: {results[-1]}")
    return results


def of_ensembles(quick):
    """Seconds of 16 fits in turn and together, in one process, compiled before."""
    return child(1, "ensemble", 200 if quick else 3_000)


def many_fits(num_steps):
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import flowvi as fv

    x = np.random.default_rng(0).normal(size=(500, 2)) @ np.array([[1.0, 0.5], [0.0, 1.0]])
    target = fv.Target(lambda u: -0.5 * (u[0] ** 2 + (u[1] - u[0] ** 2) ** 2), 2)
    options = {"num_steps": num_steps, "progress": False}
    # At a larger rate rounding alone takes spline flows apart, whatever is done together.
    optimizer = optax.adam(1e-3)
    options["optimizer"] = optimizer
    fitted = {"batch_size": 64, "patience": None, "combine": False, **options}
    affine = fv.maf(2, num_layers=2, hidden_sizes=[16], transformer="affine")
    spline = fv.maf(2, num_layers=2, hidden_sizes=[16])
    kinds = {
        "normal": lambda key: fv.fit_density(fv.full_rank(2), x, key=key, **fitted),
        "affine flow": lambda key: fv.fit_density(affine, x, key=key, **fitted),
        "spline flow": lambda key: fv.fit_density(spline, x, key=key, **fitted),
        "posterior": lambda key: fv.fit(elbo, elbo.init(key), key=key, **options),
    }
    flow = fv.iaf(2, num_layers=2, hidden_sizes=[16], transformer="affine")
    log_joint = target.log_joint
    elbo = fv.objectives.ELBO(flow, log_joint, num_samples=16, path=True)
    found = {}
    for name, fit in kinds.items():
        keys = jax.random.split(jax.random.key(3), 16)
        fv.ensemble(fit, keys), fit(keys[0])
        begun = time.perf_counter()
        members = fv.ensemble(fit, keys).members
        between = time.perf_counter()
        alone = [fit(key) for key in keys]
        ended = time.perf_counter()
        pairs = [(flat(a.params), flat(b.params)) for a, b in zip(alone, members, strict=True)]
        distance = max(float(jnp.max(abs(a - b) / np.maximum(abs(a), 1))) for a, b in pairs)
        seconds = {"together": between - begun, "in turn": ended - between}
        ratio = seconds["together"] / seconds["in turn"]
        found[name] = {**seconds, "ratio": ratio, "distance": distance}
    return found


def over_rows(quick, large):
    """A fit from a file of 10 columns: anonymous memory, and rows/s against rows at hand."""
    sizes = [10**4, 10**5] if quick else [10**4, 10**5, 10**6, 10**7] + [10**8] * large
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "rows.bin"
        for size in sizes:
            write_rows(path, size)
            found[size] = child(1, "rows", path, size)
            log(f"  {size}: {found[size]}")
    return found


def write_rows(path, size, columns=10):
    import numpy as np

    rng = np.random.default_rng(0)
    with open(path, "wb") as file:
        for begin in range(0, size, 2**18):
            count = min(size - begin, 2**18)
            file.write(rng.normal(size=(count, columns)).astype(np.float32).tobytes())


def fit_rows(path, size):
    import jax
    import numpy as np
    import optax

    import flowvi as fv

    mapped = np.memmap(path, np.float32, "r", shape=(size, 10))
    family = fv.maf(10, num_layers=2, hidden_sizes=[32], transformer="affine")
    loss_fn = fv.objectives.NegativeLogLikelihood(family)
    batch_size, num_steps, optimizer = 512, 1000, optax.adam(1e-3)
    params = family.init(jax.random.key(0))
    largest = [0]

    def watch(seen):
        largest[0] = max(largest[0], anonymous_memory())

    def seconds(data):
        times = []
        for steps in (2, num_steps):
            result = fv.fit(
                loss_fn,
                params,
                optimizer,
                key=jax.random.key(1),
                num_steps=steps,
                batch_size=batch_size,
                data={"x": data},
                progress=False,
                check_finite=False,
                callback=watch,
            )
            times.append(result.seconds)
        return times[1]

    from_file = seconds(mapped)
    memory = largest[0]
    at_hand = seconds(np.asarray(mapped[: min(size, 10**6)]))
    rate = batch_size * num_steps / from_file
    return {"bytes": memory, "rows_per_second": rate, "ratio": at_hand / from_file}


def of_inverse(quick):
    """Dependent iterations of draws of a flow and of their log density, by layers and columns."""
    del quick
    import jax

    import flowvi as fv

    found = {}
    for layers, size in ((1, 16), (5, 16), (5, 64)):
        family = fv.maf(size, num_layers=layers, hidden_sizes=[2 * size] * 2)
        params = jax.eval_shape(family.init, jax.random.key(0))

        def draw(params, key, family=family):
            return family.distribution(params).sample(seed=key, sample_shape=100)

        def score(params, x, family=family):
            return family.distribution(params).log_prob(x)

        x = jax.ShapeDtypeStruct((100, size), "float32")
        texts = [
            jax.jit(function).lower(params, given).compile().as_text()
            for function, given in ((draw, jax.random.key(0)), (score, x))
        ]
        draws, scores = map(programs.iterations, texts)
        found[f"{layers} layers, D={size}"] = {"draws": draws, "log_prob": scores}
    return found


def run_child(what, *args):
    import jax

    if what != "rows":
        jax.config.update("jax_enable_x64", True)
    if what in ("processes", "kill"):
        place, number, count = args[0], int(args[1]), int(args[2])
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(place, count, number, heartbeat_timeout_seconds=30)
    match what:
        case "devices":
            count, steps = map(int, args)
            mesh = None if count == 1 else count
            return {name: one_fit(name, mesh, steps) for name in fits()}
        case "processes":
            names = ("density", "posterior, path gradient", "local parameters")
            return {name: one_fit(name, 2 * count, int(args[3])) for name in names}
        case "kill":
            return killed(2 * count, args[3])
        case "ensemble":
            return many_fits(int(args[0]))
        case "rows":
            return fit_rows(args[0], int(args[1]))
    raise ValueError(what)


def killed(mesh, folder):
    """A fit with checkpoints, which somebody may end."""
    import jax
    import optax

    import flowvi as fv

    loss_fn, params, data, batch_size = fits()["local parameters"]
    result = fv.fit(
        loss_fn,
        params,
        optax.adam(1e-3),
        key=jax.random.key(1),
        num_steps=400,
        data=data,
        batch_size=batch_size,
        mesh=mesh,
        progress=False,
        checkpoint_dir=folder,
        checkpoint_every=40,
        resume=True,
    )
    return [flat(result.params).tolist(), result.history["loss"].tolist()]


def bars(results):
    """[what, measured, bar, whether it is met]."""
    found = []

    def at_most(what, value, bar):
        found.append([what, timing.number(value), f"≤ {bar:g}", "yes" if value <= bar else "no"])

    for part in ("devices", "processes"):
        for name, counts in results.get(part, {}).items():
            last = list(counts.values())[-1]
            at_most(f"{part}: {name}, distance of parameters", last["distance"], 1e-9)
            at_most(f"{part}: {name}, all-reduced / gradient", last["reduced"], 1.1)
    if results.get("kills"):
        slowest = max(each["seconds"] for each in results["kills"])
        at_most("kills: seconds to the end of the other", slowest, 60)
        failed = sum(not each["identical"] or not each["code"] for each in results["kills"])
        at_most(f"kills: of {len(results['kills'])}, not ended or not the same bits", failed, 0)
    for name, each in results.get("ensemble", {}).items():
        at_most(f"ensemble of 16: {name}, time together / in turn", each["ratio"], 0.4)
        at_most(f"ensemble of 16: {name}, distance of parameters", each["distance"], 1e-6)
    if sizes := results.get("rows"):
        first = sizes.get(10**6, next(iter(sizes.values())))
        last = list(sizes.values())[-1]
        extra = (last["bytes"] - first["bytes"]) / 2**20
        at_most(f"rows: MiB for {list(sizes)[-1]:.0e} above 1e6", extra, 300)
        at_most("rows: time from a file / at hand", 1 / last["ratio"], 1 / 0.9)
    return found


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that all runs")
    parser.add_argument("--large", action="store_true", help="1e8 rows, too")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--output", default="benchmarks/results/scale.json")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run_child(*args.child)))
        return
    measures = {
        "devices": over_devices,
        "processes": over_processes,
        "kills": lambda quick: kills(2 if quick else args.kills),
        "ensemble": of_ensembles,
        "rows": lambda quick: over_rows(quick, args.large),
        "inverse": of_inverse,
    }
    results = {"environment": timing.environment("flowvi", "jax", "jaxlib", "optax")}
    for name in args.only:
        log(f"{name} ...")
        results[name] = measures[name](args.quick)
    rows = bars(results)
    text = ["# More than one device\n", timing.environment_line(results["environment"]) + "\n"]
    text.append(timing.table(["", "measured", "bar", "met"], rows))
    steps = [
        [name, *(timing.number(each["steps_per_second"]) for each in counts.values())]
        for name, counts in results.get("devices", {}).items()
    ]
    if steps:
        counts = [f"{count} devices" for count in next(iter(results["devices"].values()))]
        text += ["Steps a second, on the same cores:\n", timing.table(["", *counts], steps)]
    if found := results.get("inverse"):
        pairs = [[name, each["draws"], each["log_prob"]] for name, each in found.items()]
        text += ["Iterations in a row:\n", timing.table(["", "draws", "log density"], pairs)]
    timing.write(args.output, results, "\n".join(text))
    log("\n".join(text))


if __name__ == "__main__":
    main()
