"""Pairs of parameters and what a simulator makes of them: made, checked, cleaned."""

import concurrent.futures
import dataclasses
import functools
import math
import multiprocessing
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flowvi import checks
from flowvi.amortized.prior import ONLY, Prior
from flowvi.checks import require
from flowvi.compiling import compiled
from flowvi.families import as_array
from flowvi.layouts import Layout, Theta
from flowvi.params import Array, Shape, host_generator
from flowvi.supports import Interval, on_host

#: (key, theta) -> x of JAX, for one theta; or (numpy generator, theta) -> x of Python.
Simulator = Callable[[Any, Any], Any]

#: Simulations that are compiled, or sent to a process, together.
CHUNK, TASK = 4096, 64

#: Pairs that are simulated where nobody says how many.
NUM_SIMULATIONS = 10_000

#: Fewer pairs teach nothing, and of fewer there is a warning.
LEAST_PAIRS, FEW_PAIRS = 20, 500


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Parameters and simulations that go together.

    Attributes:
        u: the parameters as the layout unconstrains them, [num, D], in double precision.
        x: what was simulated, [num, *shape].
        num_dropped: simulations that were left out, because they were not finite.
    """

    u: np.ndarray
    x: np.ndarray
    num_dropped: int = 0

    def __len__(self) -> int:
        return len(self.x)


def pairs_of(
    prior: Prior,
    simulator: Simulator | None,
    pairs: object,
    key: Array,
    num_simulations: int,
    num_processes: int | None,
) -> tuple[Theta, ArrayLike]:
    """(theta, x): those that are given, or else simulated ones."""
    if (simulator is None) == (pairs is None):
        got = "neither" if pairs is None else "both"
        raise ValueError(f"`simulator` must be given, or else `pairs`; got {got}.")
    if simulator is not None:
        number = checks.positive_int("num_simulations", num_simulations)
        return simulate(prior, simulator, key, number, num_processes)
    is_pair = isinstance(pairs, tuple | list) and len(pairs) == 2
    rule = "`pairs` must be a pair (theta, x) of arrays with a leading axis of rows"
    require(is_pair, rule, checks.shown(pairs), error=TypeError, say=str)
    return tuple(pairs)  # type: ignore[arg-type, return-value]


def simulate(
    prior: Prior, simulator: Simulator, key: Array, number: int, num_processes: int | None
) -> tuple[Theta, np.ndarray]:
    """(draws of the prior, simulations at them), of `number` rows."""
    prior_key, key = jax.random.split(key)
    theta = jax.device_get(prior.sample(prior_key, number))
    return theta, simulated(simulator, theta, key, num_processes)


def simulated(
    simulator: Simulator, theta: Theta, key: Array, num_processes: int | None
) -> np.ndarray:
    """What a simulator makes of parameters with a leading axis of rows."""
    require(callable(simulator), "`simulator` must be a function", simulator, error=TypeError)
    if num_processes is not None:
        return _in_python(
            simulator, theta, key, checks.positive_int("num_processes", num_processes)
        )
    number = len(jax.tree.leaves(theta)[0])
    vectorised = _vectorised(simulator)
    parts = []
    for start in range(0, number, CHUNK):
        rows = jax.tree.map(lambda leaf: leaf[start : start + CHUNK], theta)  # noqa: B023
        keys = jax.random.split(jax.random.fold_in(key, start), len(jax.tree.leaves(rows)[0]))
        try:
            parts.append(np.asarray(vectorised(keys, rows)))
        except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
            rule = "`simulator` must be a function of JAX, (key, theta) -> x"
            got = f"{checks.shown(simulator)}, which is none: {type(error).__name__}"
            fix = "Perhaps say `num_processes=1`, for a Python function (generator, theta) -> x?"
            raise TypeError(f"{rule}; got {got}. {fix}") from error
    return np.concatenate(parts)


@functools.lru_cache(maxsize=8)
def _vectorised(simulator: Simulator) -> Callable[[Array, Theta], Array]:
    return jax.jit(jax.vmap(lambda key, theta: jnp.asarray(simulator(key, theta))))


def _in_python(simulator: Simulator, theta: Theta, key: Array, num_processes: int) -> np.ndarray:
    """Simulations by a Python function. Each has a generator of its own, whatever the processes."""
    number = len(jax.tree.leaves(theta)[0])
    seeds = host_generator(key).integers(0, 2**63, number)
    tasks = [
        (seeds[i : i + TASK], jax.tree.map(lambda leaf: leaf[i : i + TASK], theta))  # noqa: B023
        for i in range(0, number, TASK)
    ]
    run = functools.partial(_run, simulator)
    if num_processes == 1:
        found = [run(task) for task in tasks]
    else:
        # A fork of a process in which JAX has threads may wait for ever.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(num_processes, context) as pool:
            found = list(pool.map(run, tasks))
    rows = [row for task in found for row in task]
    shape = rows[0].shape
    for index, row in enumerate(rows):
        rule = f"`simulator` must return x of one shape; row 0 has {shape}"
        fix = "Perhaps pad it, or return summaries?"
        require(row.shape == shape, rule, f"shape {row.shape} in row {index}", fix, say=str)
    return np.stack(rows)


def _run(simulator: Simulator, task: tuple[np.ndarray, Theta]) -> list[np.ndarray]:
    seeds, theta = task
    result = []
    for index, seed in enumerate(seeds):
        one = jax.tree.map(lambda leaf: leaf[index], theta)  # noqa: B023
        result.append(np.asarray(simulator(np.random.default_rng(seed), one)))
    return result


def unconstrained(layout: Layout, theta: Theta) -> np.ndarray:
    """The vectors of parameters, [..., D], in double precision on the host.

    Raises:
        ValueError: if parameters have another shape, or lie outside of their support.
    """
    named = theta if isinstance(theta, Mapping) else {ONLY: theta}
    if set(named) != set(layout.names):
        layout.unconstrain(named)  # which says what is wrong
    parts = []
    for name, support in zip(layout.names, layout.supports, strict=True):
        shape = support.event_shape
        values = np.asarray(on_host(as_array(name, named[name])))
        checks.trailing_shape(name, values, shape, "this prior")
        if isinstance(support, Interval):
            values = np.asarray(support.moved_inside(values))
        lead = values.shape[: values.ndim - len(shape)]
        support.check(values.reshape(-1, *shape) if lead else values, name)
        parts.append(values.reshape(*lead, math.prod(shape)).astype(np.float64))
    with jax.enable_x64(True):
        return np.asarray(_inverse(layout, jnp.asarray(np.concatenate(parts, -1))))


@compiled()
def _inverse(layout: Layout, theta: Array) -> Array:
    bijector = layout.support.bijector(theta.dtype)
    return theta if bijector is None else bijector.inverse(theta)


def constrained(layout: Layout, u: np.ndarray, single: bool) -> Theta:
    """Parameters at vectors [..., D]: an array, or {name: array}, in JAX's precision."""
    with jax.enable_x64(True):
        found, _ = _constrain(layout, jnp.asarray(u, jnp.float64))
        found = jax.device_get(found)
    dtype = jnp.result_type(float)
    result = {}
    for name, support in zip(layout.names, layout.supports, strict=True):
        values = found[name].astype(dtype)
        # Rounding puts the outermost draws on a bound.
        inside = support.moved_inside(values) if isinstance(support, Interval) else values
        result[name] = np.asarray(inside)
    return result[ONLY] if single else result


def vector(layout: Layout, theta: Theta) -> Any:
    """Parameters [..., *shape], or {name: of such shapes}, as one vector [..., K]."""
    named = theta if isinstance(theta, Mapping) else {ONLY: theta}
    parts = []
    for name, support in zip(layout.names, layout.supports, strict=True):
        value = named[name] if isinstance(named[name], jax.Array) else np.asarray(named[name])
        lead = value.shape[: value.ndim - len(support.event_shape)]
        parts.append(value.reshape(*lead, math.prod(support.event_shape)))
    ours = jnp if any(isinstance(each, jax.Array) for each in parts) else np
    return ours.concatenate(parts, -1)


@compiled()
def _constrain(layout: Layout, u: Array) -> tuple[dict[str, Array], Array]:
    return layout.constrain_and_log_det(u)


def log_det(layout: Layout, u: np.ndarray) -> np.ndarray:
    """log |d theta / du| at vectors [..., D], in double precision."""
    with jax.enable_x64(True):
        return np.asarray(_constrain(layout, jnp.asarray(u, jnp.float64))[1])


def cleaned(layout: Layout, theta: Theta, x: ArrayLike) -> Pairs:
    """Pairs without simulations that are not finite, which are counted and warned of.

    Raises:
        TypeError: if x does not hold numbers.
        ValueError: if there are too few pairs, all simulations are not finite, or parameters do not
            fit to their layout.
    """
    try:
        array = np.asarray(on_host(as_array("x", x)))
    except TypeError:
        shapes: set[Shape] = {np.shape(row) for row in x} if isinstance(x, list | tuple) else set()
        if len(shapes) < 2:
            raise
        rule = "`x` must have rows of one shape"
        fix = "Perhaps pad them, or take summaries?"
        raise ValueError(f"{rule}; got shapes {sorted(shapes)[:3]}. {fix}") from None
    require(array.ndim > 0, "`x` must have a leading axis of simulations", "a scalar", say=str)
    array = array[:, None] if array.ndim == 1 else array
    named = theta if isinstance(theta, Mapping) else {ONLY: theta}
    for name, values in named.items():
        rule = f"`{name}` must have a row for each of the {len(array)} rows of `x`"
        got = np.shape(values)[:1]
        require(got == (len(array),), rule, f"shape {np.shape(values)}", say=str)
        bad = ~np.isfinite(np.asarray(values, float))
        require(not bad.any(), f"`{name}` must be finite", f"{bad.sum()} entries that are not")
    good = np.isfinite(array.reshape(len(array), -1)).all(1)
    num_dropped = int((~good).sum())
    if num_dropped == len(array):
        fix = "Perhaps look at the simulator at one draw of the prior?"
        raise ValueError(f"`x` must be finite in some rows; got none of {len(array)}. {fix}")
    u = unconstrained(layout, {n: np.asarray(v)[good] for n, v in named.items()})
    array = array[good]
    rule = f"`x` must hold at least {LEAST_PAIRS} simulations that are finite"
    require(len(array) >= LEAST_PAIRS, rule, len(array))
    if num_dropped:
        warnings.warn(
            f"{num_dropped} of {len(good)} simulations are not finite and were left out: for "
            "observations that are finite this changes nothing.",
            RuntimeWarning,
            stacklevel=3,
        )
    if len(array) < FEW_PAIRS:
        warnings.warn(
            f"{len(array)} pairs are too few to learn posteriors from: look at their calibration.",
            RuntimeWarning,
            stacklevel=3,
        )
    return Pairs(u, array, num_dropped)


def check_observations(x: ArrayLike, shape: Shape) -> np.ndarray:
    """Observations as an array of shape [*batch, *shape] of finite numbers."""
    array = np.asarray(on_host(as_array("x", x)))
    checks.trailing_shape("x", array, shape, "this posterior")
    bad = ~np.isfinite(array)
    fix = "Perhaps train with an embedding that knows of missing numbers?"
    require(
        not bad.any(), "`x` must be finite", f"{int(bad.sum())} entries that are not", fix, say=str
    )
    return array
