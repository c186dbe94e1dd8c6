"""The worker's half of the line protocol.

A worker is a process in the environment of one library. It reads requests, one JSON object a line,
and answers each with one line: {"answer": ...}, {"absent": reason} or {"error": text}.

    {"do": "describe"}                           versions
    {"do": "prepare", "task": ..., "size": ...}  builds and compiles; seconds of the first run
    {"do": "run", "task": ...}                   runs a prepared task once; seconds
    {"do": "moons", ...}                         fits two moons to a bar; seconds and more
    {"do": "density", "path": ..., "seed": ...}  fits a density; see `density_task`
    {"do": "train", "what": ..., "steps": ...}   a fit of so many steps, compiled before; seconds
    {"do": "quit"}

Tasks, of a flow of affine autoregressive layers with a permutation between them:

    maf_log_prob, maf_gradient, maf_sample       the density in one pass of each layer
    iaf_log_prob, iaf_gradient                   samples in one pass of each layer
"""

import importlib
import importlib.metadata
import json
import os
import platform
import sys
import time
import traceback

TASKS = ("maf_log_prob", "maf_gradient", "maf_sample", "iaf_log_prob", "iaf_gradient")


#: Seconds of running a task before it is timed.
WARM_SECONDS = 0.1


class Absent(Exception):  # noqa: N818
    """The library has no such thing; the message says why."""


def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        # A checkout that is not installed.
        return importlib.import_module(name).__version__


def serve(packages, build, moons=None, train=None, density=None):
    """Answers requests until told to quit.

    Args:
        packages: names of the distributions whose versions count.
        build: (task, size) -> (function without arguments that runs the task once, to the end).
            Raises `Absent`.
        moons: (request) -> dict, or None.
        train: (what, steps) -> (function without arguments that does the fit), or None.
        density: (rows, context or None, seed) -> (test rows, context) -> log densities; or None.
    """
    # What a library prints must not stand between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    prepared = {}

    def handle(request):
        what = request["do"]
        if what == "describe":
            names = {name: version(name) for name in packages}
            return {"versions": {"python": platform.python_version()} | names}
        if what == "prepare":
            start = time.perf_counter()
            call = build(request["task"], request["size"])
            call()
            prepared[request["task"]] = call
            return {"seconds": time.perf_counter() - start}
        if what == "run":
            call = prepared[request["task"]]
            # After a pause in which others worked: awake, and with its own data in the caches.
            start = time.perf_counter()
            call()
            while time.perf_counter() - start < WARM_SECONDS:
                call()
            start = time.perf_counter()
            call()
            return {"seconds": time.perf_counter() - start}
        if what == "forget":
            prepared.pop(request["task"], None)
            return {}
        if what == "moons":
            if moons is None:
                raise Absent("not part of this comparison")
            return moons(request)
        if what == "density":
            if density is None:
                raise Absent("not part of this comparison")
            return density_task(density, request["path"], request["seed"])
        if what == "train":
            if train is None:
                raise Absent("not part of this comparison")
            name = f"{request['what']} {request['steps']}"
            if name not in prepared:
                prepared[name] = train(request["what"], request["steps"])
                prepared[name]()  # compiles
            start = time.perf_counter()
            prepared[name]()
            return {"seconds": time.perf_counter() - start}
        raise ValueError(f"unknown request {request!r}")

    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "quit":
            break
        try:
            answer = {"answer": handle(request)}
        except Absent as reason:
            answer = {"absent": str(reason)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def density_task(density, path, seed):
    """Fits standardised rows of a file and scores others.

    The file of numpy arrays has `train` and `test`, and `num_context`, the number of columns at the
    front that are a context. Log densities are in the units of the rows.
    """
    import numpy as np

    data = np.load(path)
    train, test, count = data["train"], data["test"], int(data["num_context"])
    start = time.perf_counter()
    shift, scale = train.mean(0), train.std(0)
    x, new = ((rows - shift) / scale for rows in (train, test))
    split = lambda rows: (rows[:, count:], rows[:, :count] if count else None)  # noqa: E731
    score = density(*split(x.astype(np.float32)), seed)
    seconds = time.perf_counter() - start
    scores = np.asarray(score(*split(new.astype(np.float32))), np.float64)
    scores = scores - np.log(scale[count:]).sum()
    np.save(path + ".npy", scores)
    return {"seconds": seconds}


def jax_task(task, size, params, log_prob, sample):
    """The call of a task, for a flow given as pure functions.

    Args:
        task, size: as in `serve`.
        params: a pytree of arrays.
        log_prob: (params, x) -> array of shape [n].
        sample: (params, key) -> array of shape [n, D].
    """
    import jax

    kind = task.split("_", 1)[1]
    if kind == "sample":
        function, argument = sample, jax.random.key(3)
    else:
        argument = jax.random.normal(jax.random.key(4), (size["batch"], size["event_size"]))
        function = log_prob
        if kind == "gradient":

            def function(params, x):
                return jax.grad(lambda params: -log_prob(params, x).mean())(params)

    # jax.jit of a fresh function: tasks share nothing.
    program = jax.jit(lambda params, argument: function(params, argument))
    program = program.lower(params, argument).compile()
    return lambda: jax.block_until_ready(program(params, argument))


def torch_task(task, size, module, log_prob, sample):
    """The call of a task, for a flow that is a torch module; eager, without gradients if it may.

    Args:
        task, size: as in `serve`.
        module: the module.
        log_prob: x -> tensor of shape [n].
        sample: () -> tensor of shape [n, D].
    """
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    kind = task.split("_", 1)[1]
    x = torch.randn(size["batch"], size["event_size"])

    def without_gradient():
        with torch.no_grad():
            sample() if kind == "sample" else log_prob(x)

    def gradient():
        module.zero_grad(set_to_none=True)
        (-log_prob(x).mean()).backward()

    return gradient if kind == "gradient" else without_gradient


#: The fits of `train`: rows, coordinates and batch of the density; coordinates and draws of the
#: posterior; width, layers and learning rate of both.
TRAIN = {
    "rows": 10_000,
    "event_size": 2,
    "batch": 100,
    "layers": 2,
    "width": 16,
    "rate": 1e-3,
    "posterior_size": 10,
    "draws": 16,
}


def train_rows():
    """The rows of the density fit, float32."""
    import numpy as np

    rng = np.random.default_rng(0)
    return rng.normal(size=(TRAIN["rows"], TRAIN["event_size"])).astype(np.float32)


def train_target(x):
    """The log density of the posterior fit: ten correlated normals, some of them narrow."""
    import jax.numpy as jnp

    scale = jnp.linspace(0.2, 2.0, TRAIN["posterior_size"])
    return -0.5 * jnp.sum(((x - 1.0) / scale) ** 2) - 0.1 * jnp.sum(x[1:] * x[:-1])


def moons_data():
    """(training points, test points), both in the training set's standard units, float32."""
    import numpy as np
    from sklearn.datasets import make_moons

    train, _ = make_moons(10_000, noise=0.05, random_state=1)
    test, _ = make_moons(20_000, noise=0.05, random_state=99)
    shift, scale = train.mean(0), train.std(0)
    return tuple(((x - shift) / scale).astype(np.float32) for x in (train, test))


class Clock:
    """A stopwatch that can be held while something is evaluated that is no part of the work."""

    def __init__(self):
        self._start = time.perf_counter()
        self._held = 0.0

    def __enter__(self):
        self._entered = time.perf_counter()

    def __exit__(self, *error):
        self._held += time.perf_counter() - self._entered

    def seconds(self):
        return time.perf_counter() - self._start - self._held


def torch_density(flow, x, context, log_prob, *, epochs=100, patience=10, batch_size=256):
    """Trains a flow of torch with Adam at 1e-3 until a held-out tenth stops improving.

    Their tutorials train for a fixed number of steps; this is the rule of flowjax's loop.
    """
    import copy

    import torch

    context = torch.zeros(len(x), 0) if context is None else torch.from_numpy(context)
    rows = torch.utils.data.TensorDataset(torch.from_numpy(x), context)
    held = max(len(x) // 10, 1)
    train, held_out = torch.utils.data.random_split(rows, [len(x) - held, held])
    loader = torch.utils.data.DataLoader(train, batch_size=batch_size, shuffle=True)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3)
    best, best_state, worse = float("inf"), None, 0
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss = -log_prob(*batch).mean()
            if torch.isfinite(loss):
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            loss = -log_prob(*held_out[:]).mean().item()
        worse += 1
        if loss < best:
            best, best_state, worse = loss, copy.deepcopy(flow.state_dict()), 0
        if worse > patience:
            break
    if best_state is not None:
        flow.load_state_dict(best_state)

    def score(x, context):
        context = torch.zeros(len(x), 0) if context is None else torch.from_numpy(context)
        with torch.no_grad():
            return log_prob(torch.from_numpy(x), context).numpy()

    return score
