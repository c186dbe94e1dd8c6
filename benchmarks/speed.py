"""How fast both directions of an autoregressive layer are, in passes of a plain dense layer.

python -m benchmarks.speed [--quick] [--output benchmarks/results/speed.json]
"""

import argparse
import functools
import gc
import json
import os
import statistics
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

import flowvi as fv
from benchmarks import reference, timing
from flowvi.bijectors.autoregressive import invert_by_passes
from flowvi.masked import MaskedNetwork
from flowvi.testing import perturbed
from flowvi.transformers import Affine, Spline

PACKAGES = ("flowvi", "jax", "jaxlib", "distrax", "dm-haiku", "numpy")
LARGE = (64, (512, 512), 1000)
SMALL = (32, (256, 256), 256)
WIDE = (784, (1024, 1024), 100)
NOISE = 0.3

log = functools.partial(print, flush=True)


class Layer:
    """One IAF layer away from the identity, and functions of (parameters, array) on it."""

    def __init__(self, event_size, hidden_sizes, batch, transformer=None, seed=0):
        self.transformer = Affine() if transformer is None else transformer
        self.network = MaskedNetwork(event_size, hidden_sizes, self.transformer.num_params)
        self.params = perturbed(self.network.init(jax.random.key(seed)), scale=NOISE, seed=seed)
        self.x = jax.random.normal(jax.random.key(seed + 1), (batch, event_size))
        self.y = jax.jit(self.forward)(self.params, self.x)[0]

    def bijector(self, params):
        return fv.IAF(self.network.bind(params), self.transformer)

    def forward(self, params, x):
        return self.bijector(params).forward_and_log_det(x)

    def inverse(self, params, y):
        return self.bijector(params).inverse_and_log_det(y)

    def passes(self, params, y):
        """The inverse by D passes."""
        conditioner = self.network.bind(params)
        return invert_by_passes(lambda x: self.transformer(conditioner(x)), y)

    def some_passes(self, count, params, y):
        """The first `count` of the D passes."""
        conditioner = self.network.bind(params)

        def one_pass(x, _):
            return self.transformer(conditioner(x)).inverse(y), None

        return jax.lax.scan(one_pass, jnp.zeros_like(y), None, length=count)[0]


def gradient(function):
    """The gradient of `reference.loss` for parameters and inputs."""
    return jax.grad(lambda params, x: reference.loss(*function(params, x)), argnums=(0, 1))


def reference_pass(event_size, hidden_sizes):
    """(function of parameters and x, parameters) of the yardstick."""
    masks = reference.masks(event_size, hidden_sizes)
    params = reference.init(jax.random.key(2), event_size, hidden_sizes)
    # The masks are arguments, or they would be folded into the program as constants.
    return lambda params, x: reference.forward(*params, x), (
        params,
        jax.tree.map(jnp.asarray, masks),
    )


def programs(event_size, hidden_sizes, batch, *, passes=True, passes_gradient=False):
    """All that is measured of one layer: dict of name -> compiled program."""
    layer = Layer(event_size, hidden_sizes, batch)
    plain, plain_params = reference_pass(event_size, hidden_sizes)

    def plain_gradient(params, x):
        # For the weights and the inputs, not for the masks.
        weights, masks = params
        return gradient(lambda weights, x: plain((weights, masks), x))(weights, x)

    result = {
        "reference": timing.compiled(plain, plain_params, layer.x),
        "reference gradient": timing.compiled(plain_gradient, plain_params, layer.x),
        "forward": timing.compiled(layer.forward, layer.params, layer.x),
        "forward gradient": timing.compiled(gradient(layer.forward), layer.params, layer.x),
        "inverse": timing.compiled(layer.inverse, layer.params, layer.y),
        "inverse gradient": timing.compiled(gradient(layer.inverse), layer.params, layer.y),
    }
    if passes:
        result["passes"] = timing.compiled(layer.passes, layer.params, layer.y)
    if passes_gradient:
        result["passes gradient"] = timing.compiled(gradient(layer.passes), layer.params, layer.y)
    return result


def measure(event_size, hidden_sizes, batch, *, budget, **kwargs):
    """Times, memory and ratios of one layer."""
    compiled = programs(event_size, hidden_sizes, batch, **kwargs)
    calls = {name: program.run for name, program in compiled.items()}
    times = timing.interleaved(calls, budget=budget)
    median = {name: value["median"] for name, value in times.items()}
    ratios = {
        name: median[name]
        / median["reference gradient" if name.endswith("gradient") else "reference"]
        for name in median
    }
    gc.collect()
    return {
        "event_size": event_size,
        "hidden_sizes": list(hidden_sizes),
        "batch": batch,
        "seconds": times,
        "ratios": ratios,
        "memory": {name: program.memory for name, program in compiled.items()},
        "compile_seconds": {name: program.compile_seconds for name, program in compiled.items()},
    }


def measure_wide(quick, budget):
    """One inverse of a wide layer against D passes of the same layer."""
    event_size, hidden_sizes, batch = (20, (64, 64), 20) if quick else WIDE
    layer = Layer(event_size, hidden_sizes, batch)
    plain, plain_params = reference_pass(event_size, hidden_sizes)
    count = 16
    some = functools.partial(layer.some_passes, count)
    calls = {
        "reference": timing.compiled(plain, plain_params, layer.x).run,
        "inverse": timing.compiled(layer.inverse, layer.params, layer.y).run,
        "some passes": timing.compiled(some, layer.params, layer.y).run,
    }
    times = timing.interleaved(calls, budget=budget)
    median = {name: value["median"] for name, value in times.items()}
    estimate = median["some passes"] / count * event_size
    full = timing.compiled(layer.passes, layer.params, layer.y)
    full.run()  # to warm up
    seconds = timing.seconds_of(full.run)
    return {
        "event_size": event_size,
        "hidden_sizes": list(hidden_sizes),
        "batch": batch,
        "seconds": times,
        "passes_from_some": estimate,
        "passes_in_full": seconds,
        "speedup": estimate / median["inverse"],
        "speedup_in_full": seconds / median["inverse"],
        "inverse_in_reference_passes": median["inverse"] / median["reference"],
        # An inverse that cost no more than one dense pass would win by this.
        "limit_one_dense_pass": estimate / median["reference"],
    }


def measure_compilation(quick):
    """Seconds to trace and compile flows of 4 and of 32 layers."""
    event_size, hidden_sizes = (8, (32, 32)) if quick else (64, (512, 512))
    counts, repeats, rows = (4, 32), 1 if quick else 3, 256
    x = jnp.zeros((rows, event_size))
    key = jax.random.key(0)
    seconds = {}
    for _ in range(repeats):
        for count in counts:
            family = fv.maf(
                event_size, num_layers=count, hidden_sizes=hidden_sizes, transformer="affine"
            )
            params = family.init(jax.random.key(1))

            def log_prob(params, x, family=family):
                return family.distribution(params).log_prob(x)

            def sample(params, key, family=family):
                return family.distribution(params).sample(seed=key, sample_shape=(rows,))

            def log_prob_gradient(params, x, log_prob=log_prob):
                return jax.grad(lambda params: log_prob(params, x).mean())(params)

            def sample_gradient(params, key, sample=sample):
                return jax.grad(lambda params: (sample(params, key) ** 2).mean())(params)

            work = {
                "log_prob": (log_prob, x),
                "sample": (sample, key),
                "gradient of log_prob": (log_prob_gradient, x),
                "gradient of sample": (sample_gradient, key),
            }
            for name, (function, argument) in work.items():
                # Nothing that an earlier compilation traced may help.
                jax.clear_caches()
                spent = timing.compiled(function, params, argument).compile_seconds
                seconds.setdefault(name, {}).setdefault(count, []).append(spent)
    medians = {
        name: {count: statistics.median(values) for count, values in by_count.items()}
        for name, by_count in seconds.items()
    }
    ratios = {name: by_count[counts[1]] / by_count[counts[0]] for name, by_count in medians.items()}
    return {
        "event_size": event_size,
        "hidden_sizes": list(hidden_sizes),
        "seconds": medians,
        "ratios": ratios,
    }


def agreement(quick):
    """Largest relative differences to D passes, in double precision; needs JAX_ENABLE_X64."""

    def difference(function, ours, theirs, *args):
        ours, theirs = (
            jax.tree.leaves(jax.device_get(jax.jit(functools.partial(function, way))(*args)))
            for way in (ours, theirs)
        )
        pairs = zip(ours, theirs, strict=True)
        return max(float(abs(a - b).max() / (abs(b).max() + 1e-300)) for a, b in pairs)

    def value(function, params, y):
        return function(params, y)

    def gradients(function, params, y):
        return gradient(function)(params, y)

    def hessian_vector(function, params, y, directions):
        # Forward over reverse.
        return jax.jvp(gradient(function), (params, y), directions)[1]

    result = {}
    cases = {
        "affine, D=16, hidden 64 and 48": (16, (64, 48), 8, Affine()),
        "affine, D=24, hidden 10, 17 and 9": (24, (10, 17, 9), 8, Affine()),
        "spline, D=16, hidden 64 and 64": (16, (64, 64), 8, Spline()),
    }
    if quick:
        cases = {"affine, D=6, hidden 16 and 12": (6, (16, 12), 4, Affine())}
    for name, case in cases.items():
        layer = Layer(*case)
        if layer.y.dtype != jnp.float64:
            raise RuntimeError("Agreement is measured in double precision: set JAX_ENABLE_X64=1.")
        args = layer.params, layer.y
        rng = np.random.default_rng(0)
        directions = jax.tree.map(lambda leaf, r=rng: jnp.asarray(r.normal(size=leaf.shape)), args)
        ways = layer.inverse, layer.passes
        result[name] = {
            "values": difference(value, *ways, *args),
            "gradients": difference(gradients, *ways, *args),
            "hessian-vector products": difference(hessian_vector, *ways, *args, directions),
        }
    return result


def measure_agreement(quick):
    """`agreement` in a process of its own, where double precision is on."""
    output = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed", "--agreement", *(["--quick"] if quick else [])],
        env=os.environ | {"JAX_ENABLE_X64": "1"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout
    return json.loads(output.splitlines()[-1])


def sweeps(quick, budget):
    """dict of what varies -> list of layers measured."""
    event_sizes, depths = ([8], [1]) if quick else ([8, 16, 32, 64, 128], [1, 2, 3])
    widths, batches = (
        ([32, 64], [1, 16]) if quick else ([64, 128, 256, 512, 1024], [1, 16, 256, 4096])
    )
    D, width, batch = (8, 32, 16) if quick else (64, 512, 1000)
    cases = {
        "event size": [(d, (8 * d, 8 * d), 256) for d in event_sizes],
        "depth": [(D, (width,) * depth, batch) for depth in depths],
        "width": [(D // 2, (w, w), 256) for w in widths],
        "batch": [(D // 2, (width // 2, width // 2), rows) for rows in batches],
    }
    result = {}
    for name, sizes in cases.items():
        log(f"Varying {name} ...")
        result[name] = [measure(*size, budget=budget) for size in sizes]
    return result


def bars(results):
    """The bars: dicts of "what", "value", "bar", "met"."""
    rows = []

    def row(what, value, bar, *, at_least=False):
        met = value is not None and bool(value >= bar if at_least else value <= bar)
        sign = "≥" if at_least else "≤"
        rows.append({"what": what, "value": value, "bar": f"{sign} {bar:g}", "met": met})

    for name, forward_bar, inverse_bar, gradient_bar in (
        ("large", 1.0, 2.0, 3.0),
        ("small", None, 1.8, 2.5),
    ):
        case = results["layers"][name]
        size = size_text(case)
        ratios, memory = case["ratios"], case["memory"]
        if forward_bar is not None:
            row(f"forward and log-det, in reference passes; {size}", ratios["forward"], forward_bar)
        row(f"inverse, in reference passes; {size}", ratios["inverse"], inverse_bar)
        row(
            f"gradient of the inverse, in gradients of the reference; {size}",
            ratios["inverse gradient"],
            gradient_bar,
        )
        if memory["inverse gradient"] is not None:
            row(
                f"memory of the gradient of the inverse, against that of the forward; {size}",
                memory["inverse gradient"] / memory["forward gradient"],
                2.0,
            )
    wide = results["wide"]
    row(
        f"one inverse, times faster than D passes; {size_text(wide)}",
        wide["speedup"],
        100,
        at_least=True,
    )
    for name, ratio in results["compilation"]["ratios"].items():
        row(f"compile time of 32 layers against 4, {name}", ratio, 1.3)
    for name in ("values", "gradients", "hessian-vector products"):
        worst = max(case[name] for case in results["agreement"].values())
        row(f"difference to D passes in double precision, {name}", worst, 1e-9)
    return rows


def size_text(case):
    hidden = " and ".join(map(str, case["hidden_sizes"]))
    return f"D={case['event_size']}, hidden {hidden}, batch {case['batch']}"


def layer_table(cases):
    """Markdown table of layers: milliseconds of the reference, and ratios to it."""
    columns = (
        "forward",
        "inverse",
        "passes",
        "forward gradient",
        "inverse gradient",
        "passes gradient",
    )
    rows = []
    for case in cases:
        median = {name: value["median"] for name, value in case["seconds"].items()}
        rows.append(
            [
                size_text(case),
                timing.number(1e3 * median["reference"]),
                timing.number(1e3 * median["reference gradient"]),
                *(timing.number(case["ratios"].get(name)) for name in columns),
            ]
        )
    header = ["layer", "reference, ms", "its gradient, ms", *columns]
    return timing.table(header, rows)


def markdown(results):
    wide = results["wide"]
    rows = [
        [row["what"], timing.number(row["value"]), row["bar"], "yes" if row["met"] else "no"]
        for row in results["bars"]
    ]
    parts = [
        "# Speed\n",
        timing.environment_line(results["environment"]) + "\n",
        "Medians; ratios within one run. A reference pass is one dense masked pass of the same "
        "sizes in plain jax.numpy.\n",
        timing.table(["", "measured", "bar", "met"], rows),
        "## Layers\n",
        "One affine layer. Ratios are to the reference pass, those of gradients to its gradient. "
        '"passes" is the inverse by D passes.\n',
        layer_table(results["layers"].values()),
    ]
    for name, cases in results["sweeps"].items():
        parts += [f"## Cost against {name}\n", layer_table(cases)]
    parts += [
        "## A wide layer\n",
        f"{size_text(wide)}: one inverse takes "
        f"{timing.number(1e3 * wide['seconds']['inverse']['median'])} ms, which is "
        f"{timing.number(wide['inverse_in_reference_passes'])} reference passes. D passes take "
        f"{timing.number(wide['passes_from_some'])} s by the time of some of them and "
        f"{timing.number(wide['passes_in_full'])} s in full, so the inverse is "
        f"{timing.number(wide['speedup'])} and {timing.number(wide['speedup_in_full'])} times "
        "faster. An inverse at the price of one dense pass would be "
        f"{timing.number(wide['limit_one_dense_pass'])} times faster.\n",
        "## Compile time\n",
        timing.table(
            ["", *(f"{count} layers, s" for count in (4, 32)), "ratio"],
            [
                [
                    name,
                    *(timing.number(value) for value in by_count.values()),
                    timing.number(results["compilation"]["ratios"][name]),
                ]
                for name, by_count in results["compilation"]["seconds"].items()
            ],
        ),
        "## Agreement with D passes, double precision, relative\n",
        timing.table(
            ["", "values", "gradients", "hessian-vector products"],
            [
                [name, *(timing.number(value) for value in case.values())]
                for name, case in results["agreement"].items()
            ],
        ),
    ]
    return "\n".join(parts)


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that all runs")
    parser.add_argument("--output", default="benchmarks/results/speed.json")
    parser.add_argument("--agreement", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.agreement:
        log(json.dumps(agreement(args.quick)))
        return
    quick = args.quick
    budget = 0.2 if quick else 3.0
    large, small = ((8, (64, 64), 64), (6, (32, 32), 16)) if quick else (LARGE, SMALL)
    results = {"environment": timing.environment(*PACKAGES), "quick": quick}
    log("Agreement with D passes ...")
    results["agreement"] = measure_agreement(quick)
    log("Layers ...")
    results["layers"] = {
        "large": measure(*large, budget=budget, passes_gradient=True),
        "small": measure(*small, budget=budget, passes_gradient=True),
    }
    log("A wide layer ...")
    results["wide"] = measure_wide(quick, budget)
    results["sweeps"] = sweeps(quick, budget / 3)
    log("Compile time ...")
    results["compilation"] = measure_compilation(quick)
    results["bars"] = bars(results)
    text = markdown(results)
    timing.write(args.output, results, text)
    log(text)


if __name__ == "__main__":
    main()
