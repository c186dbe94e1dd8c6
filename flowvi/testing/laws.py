"""The laws of a bijector, each a function with a name.

A law looks at a `Trial` and yields a complaint for each way in which the bijector breaks it. To add
a law, write such a generator here and mark it with `@law`: `check_bijector` runs all of them, in
the order of this file, and names a law as its function is named.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowvi.testing import trial as trials
from flowvi.testing.trial import METHODS, PARTS, Outcome, Trial

Law = Callable[[Trial], Iterator[str]]

LAWS: dict[str, Law] = {}

#: At most this many rows, spread evenly, are evaluated one by one.
MAX_ROWS = 16

#: The number of places at which the order of a large event is cut in two.
MAX_CUTS = 8


def law(function: Law) -> Law:
    """Adds a law under the name of its function."""
    LAWS[function.__name__] = function
    return function


@law
def shape(trial: Trial) -> Iterator[str]:
    """Events keep their rank, log-determinants have the shape of the batch."""
    lead = trial.lead
    y, log_det, x, inverse_log_det = (part.shape for part in trial.compiled)
    if y[: len(lead)] != lead or len(y) != len(lead) + trial.bijector.event_ndims_out:
        yield (
            f"{PARTS.y} has shape {y}, expected {lead} and then "
            f"{trial.bijector.event_ndims_out} axes of an event"
        )
    if x != trial.x.shape:
        yield f"{PARTS.x} has shape {x}, expected {trial.x.shape}"
    for what, got in ((PARTS.log_det, log_det), (PARTS.inverse_log_det, inverse_log_det)):
        if got != lead:
            yield f"{what} has shape {got}, expected {lead}"


@law
def dtype(trial: Trial) -> Iterator[str]:
    """Results have the dtype of the input, also 32-bit input while 64-bit types are enabled."""
    modes = [("", trial.compiled)]
    if trial.x.dtype == jnp.float32:
        # Constants of no explicit dtype become 64-bit ones there, and spread.
        with jax.enable_x64(True):
            abstract = jax.eval_shape(trials.both, trial.bijector, trial.x, trial.y)
        modes.append((" with 64-bit types enabled", abstract))
    for mode, outcome in modes:
        for what, part in zip(PARTS, outcome, strict=True):
            if part.dtype != trial.x.dtype:
                yield f"{what} has dtype {part.dtype}{mode}, expected {trial.x.dtype}"


@law
def finite(trial: Trial) -> Iterator[str]:
    """Finite inputs give finite outputs."""
    for what, part in zip(PARTS, trial.compiled, strict=True):
        values = np.asarray(part)
        bad = ~np.isfinite(values)
        if bad.any():
            index = tuple(int(i) for i in np.argwhere(bad)[0])
            yield (
                f"{what} is {values[index]} at {trial.where(index)} "
                f"(broken at {bad.sum()} of {bad.size} places)"
            )


@law
def methods(trial: Trial) -> Iterator[str]:
    """`forward`, `inverse` and the two log-determinants agree with the methods that return both."""
    for name, part, expected, allowed in zip(
        METHODS, PARTS, trial.compiled, trial.allowed, strict=True
    ):
        if name in trial.methods:
            got = trial.methods[name]
            if got.shape != expected.shape or got.dtype != expected.dtype:
                yield (
                    f"`{name}` returns {got.dtype}{list(got.shape)}, but {part} is "
                    f"{expected.dtype}{list(expected.shape)}"
                )
            else:
                yield from trial.compare(f"`{name}` against {part}", got, expected, allowed)


@law
def round_trip(trial: Trial) -> Iterator[str]:
    """forward(inverse(y)) is y up to the scale of y; inverse(forward(x)) is x up to conditioning.

    An error in x is allowed in so far as an admissible error of y, carried back by the Jacobian of
    the inverse, can cause it.
    """
    allowed = trial.allowed
    yield from trial.compare("forward(inverse(y))", trial.returned.y, trial.y, allowed.y)
    yield from trial.compare("inverse(forward(x))", trial.compiled.x, trial.x, allowed.x)


@law
def log_det(trial: Trial) -> Iterator[str]:
    """The forward log-determinant is that of the Jacobian by automatic differentiation."""
    if not trial.is_square or trial.event_size > trial.max_autodiff_size:
        return
    _, expected = np.linalg.slogdet(trial.jacobian)
    what = f"{PARTS.log_det} against autodiff"
    yield from trial.compare(what, trial.compiled.log_det, expected, trial.allowed.log_det)


@law
def inverse_log_det(trial: Trial) -> Iterator[str]:
    """The inverse's log-determinant at y is minus the forward one at x = inverse(y)."""
    expected = -np.asarray(trial.returned.log_det, np.float64)
    allowed = trial.tolerance * trials.at_least_one(expected)
    what = f"{PARTS.inverse_log_det} against minus the forward one"
    yield from trial.compare(what, trial.compiled.inverse_log_det, expected, allowed)


@law
def triangular(trial: Trial) -> Iterator[str]:
    """Output order[k] depends on inputs order[: k + 1] only, and on input order[k] certainly.

    Events above the limit of size are probed: at a few places the order is cut in two, and outputs
    before the cut must not move with the inputs behind it.
    """
    if trial.order is None:
        return
    order = np.asarray(trial.order)
    if trial.event_size > trial.max_autodiff_size:
        yield from _cuts(trial, order)
        return
    jacobian = trial.jacobian[..., order[:, None], order]
    allowed = trial.tolerance * np.abs(jacobian).max(-1, keepdims=True)
    excess = np.triu(np.abs(jacobian), 1) - allowed
    if not (excess <= 0).all():
        *lead, i, j = (int(k) for k in np.unravel_index(np.argmax(excess), excess.shape))
        yield (
            f"output {order[i]} (position {i} of the order) depends on input {order[j]} "
            f"(position {j}) at {trial.where(tuple(lead))}: derivative "
            f"{jacobian[(*lead, i, j)]:.6g}, allowed {allowed[(*lead, i, 0)]:.3g} "
            f"(broken at {(excess > 0).sum()} places)"
        )
    diagonal = np.diagonal(jacobian, axis1=-2, axis2=-1)
    if (diagonal == 0).any():
        *lead, i = (int(k) for k in np.argwhere(diagonal == 0)[0])
        yield f"output {order[i]} does not depend on input {order[i]} at {trial.where(tuple(lead))}"


def _cuts(trial: Trial, order: np.ndarray) -> Iterator[str]:
    cuts = np.unique(np.linspace(1, len(order) - 1, MAX_CUTS).astype(int))
    draws = np.random.default_rng(0).standard_normal((len(cuts), *trial.x.shape))
    for draw, cut in zip(draws, cuts, strict=True):
        draw[..., order[:cut]] = 0
    motion = np.abs(trial.motion(draws))
    for cut, moved in zip(cuts, motion, strict=True):
        allowed = trial.tolerance * moved.max()
        before = moved[..., order[:cut]]
        if not (before <= allowed).all():
            *lead, i = (int(k) for k in np.unravel_index(np.argmax(before), before.shape))
            yield (
                f"output {order[i]} (position {i} of the order) depends on inputs from position "
                f"{cut} on at {trial.where(tuple(lead))}: it moves by "
                f"{before[(*lead, i)]:.6g}, allowed {allowed:.3g}"
            )
            return


@law
def batch(trial: Trial) -> Iterator[str]:
    """A batch is its rows, one by one; further leading axes and an empty batch change nothing."""
    rows = np.unique(np.linspace(0, len(trial.x) - 1, MAX_ROWS).astype(int)).tolist()
    parts: dict[str, list[Any]] = {
        "each row alone, in a batch of one": [slice(i, i + 1) for i in rows],
        "each row alone, without a batch axis": rows,
        "a further leading axis": [None],
        "an empty batch": [slice(0, 0)],
    }
    whole = Outcome(*(np.asarray(part) for part in trial.compiled))
    for name, indices in parts.items():
        got = Outcome(*(part.copy() for part in whole))
        complaints = []
        for index in indices:
            for what, part, target in zip(PARTS, trial.at(index, name), got, strict=True):
                if part.shape != target[index].shape:
                    complaints.append(
                        f"{name}: {what} has shape {part.shape}, expected {target[index].shape}"
                    )
                elif part.size:
                    target[index] = part
            if complaints:
                break
        yield from complaints or trial.compare_outcomes(name, got, whole)


@law
def jit(trial: Trial) -> Iterator[str]:
    """Compiled equals eager; a rebuilt bijector gives the same results and is not traced again."""
    # First, because a bijector may change itself when it is called without jit.
    before = trials.num_traces()
    rebuilt = trial.rebuilt()
    if trials.num_traces() != before:
        yield (
            "a second call with equal shapes is traced again; static attributes of the bijector "
            "must compare equal, so perhaps hold arrays as jax arrays and options in tuples"
        )
    yield from trial.compare_outcomes("rebuilt from its leaves", rebuilt, trial.compiled)
    eager = trial.eager()
    for what, got, expected in zip(PARTS, eager, trial.compiled, strict=True):
        if (got.shape, got.dtype) != (expected.shape, expected.dtype):
            yield (
                f"{what} is {got.dtype}{list(got.shape)} without jit, {expected.dtype}"
                f"{list(expected.shape)} with it"
            )
            return
    yield from trial.compare_outcomes("jit against eager", trial.compiled, eager)
