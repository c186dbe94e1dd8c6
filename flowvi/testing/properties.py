"""The properties of a bijector: generators of complaints about a `Trial`, one for each breach.

To add one, write it here and add it to `EVALUATIONS`: `check_bijector` runs all of them in that
order, and names a property as its function is named.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowvi.testing import trial as trials
from flowvi.testing.trial import METHODS, PARTS, BrokenError, Outcome, Trial

Property = Callable[[Trial], Iterator[str]]


def shape(trial: Trial) -> Iterator[str]:
    """Events keep their rank, log-determinants have the shape of the batch."""
    y, lead, rank = trial.y.shape, trial.lead, trial.bijector.event_ndims_out
    if y[: len(lead)] != lead or len(y) != len(lead) + rank:
        yield f"{PARTS.y} has shape {y}, expected {lead} and then {rank} axes of an event"
    yield from _shapes("", trial.compiled, (y, lead, trial.x.shape, lead))


def _shapes(where: str, got: Outcome, expected: tuple[tuple[int, ...], ...]) -> Iterator[str]:
    for what, part, other in zip(PARTS, got, expected, strict=True):
        if part.shape != other:
            yield f"{where}{what} has shape {part.shape}, expected {other}"


def dtype(trial: Trial) -> Iterator[str]:
    """Results have the dtype of the input, also 32-bit input while 64-bit types are enabled."""
    modes = {"": trial.compiled}
    if trial.x.dtype == jnp.float32:
        # Constants of no explicit dtype become 64-bit ones there, and spread.
        with jax.enable_x64(True):
            abstract = jax.eval_shape(trials.both, trial.bijector, trial.x, trial.y)
        modes[" with 64-bit types enabled"] = abstract
    for mode, outcome in modes.items():
        for what, part in zip(PARTS, outcome, strict=True):
            if part.dtype != trial.x.dtype:
                yield f"{what} has dtype {part.dtype}{mode}, expected {trial.x.dtype}"


def finite(trial: Trial) -> Iterator[str]:
    """Finite inputs give finite outputs."""
    for what, part in zip(PARTS, map(np.asarray, trial.compiled), strict=True):
        bad = ~np.isfinite(part)
        if bad.any():
            at = trials.worst(bad)
            places = f"(broken at {bad.sum()} of {bad.size} places)"
            yield f"{what} is {part[at]} at {trial.where(at)} {places}"


def _kind(array: jax.Array) -> str:
    return f"{array.dtype}{list(array.shape)}"


def methods(trial: Trial) -> Iterator[str]:
    """`forward`, `inverse` and the two log-determinants agree with the methods that return both."""
    results = trial.get("methods")
    names = zip(METHODS, PARTS, strict=True)
    for (name, part), known, allowed in zip(names, trial.compiled, trial.allowed, strict=True):
        got = results.get(name, known)
        if _kind(got) != _kind(known):
            yield f"`{name}` returns {_kind(got)}, but {part} is {_kind(known)}"
        else:
            yield from trial.compare(f"`{name}` against {part}", got, known, allowed)


def round_trip(trial: Trial) -> Iterator[str]:
    """forward(inverse(y)) is y up to its scale; inverse(forward(x)) is x up to conditioning."""
    allowed = trial.allowed
    yield from trial.compare("forward(inverse(y))", trial.get("again")[0], trial.y, allowed.y)
    yield from trial.compare("inverse(forward(x))", trial.compiled.x, trial.x, allowed.x)


def log_det(trial: Trial) -> Iterator[str]:
    """The forward log-determinant is that of the Jacobian by automatic differentiation."""
    if trial.has_jacobian:
        _, expected = np.linalg.slogdet(trial.tangents.y)
        what = f"{PARTS.log_det} against autodiff"
        yield from trial.compare(what, trial.compiled.log_det, expected, trial.allowed.log_det)


def inverse_log_det(trial: Trial) -> Iterator[str]:
    """The inverse's log-determinant at y is minus the forward one at x = inverse(y)."""
    expected = -np.asarray(trial.get("again")[1], np.float64)
    allowed = trial.tolerance * trials.at_least_one(expected)
    what = f"{PARTS.inverse_log_det} against minus the forward one"
    yield from trial.compare(what, trial.compiled.inverse_log_det, expected, allowed)


def inverse_jacobian(trial: Trial) -> Iterator[str]:
    """The derivatives of inverse at y = forward(x) undo those of forward at x."""
    tangents = trial.tangents
    if trial.has_jacobian:
        inverse, gradient = trial.inverse_derivatives
        moved = np.abs(tangents.y)
        dx, dlog_det = np.abs(inverse) @ moved, (np.abs(gradient)[..., None] * moved).sum(-2)
    else:
        # The sensitivity is to a motion of y by its scale; here it moves by more than that.
        scale = np.maximum(1, np.abs(tangents.y).max((0, -2)))
        dx, dlog_det = (np.expand_dims(part, -1) for part in trial.sensitivity)
        dx = dx.reshape(*trial.lead, -1, 1) * np.expand_dims(scale, -2)
        dlog_det = dlog_det * scale
    tolerance = trial.tolerance**0.5  # for derivatives of derivatives are not known
    expected = np.broadcast_to(trial.directions.T, tangents.x.shape)
    allowed = tolerance * (trials.at_least_one(expected) + dx)
    what = "the derivative of inverse(forward(x))"
    yield from trial.compare(what, tangents.x, expected, allowed, by_direction=True)
    total = tangents.log_det + tangents.inverse_log_det
    allowed = tolerance * (trials.at_least_one(tangents.log_det) + dlog_det)
    what = "the derivative of the sum of both log-dets"
    yield from trial.compare(what, total, np.zeros_like(total), allowed, by_direction=True)


def constant_jacobian(trial: Trial) -> Iterator[str]:
    """Where `is_constant_jacobian` is claimed, the derivatives of forward are the same at all rows.

    Those of the log-determinant are zero where `is_constant_log_det` is claimed.
    """
    dy, slopes = trial.tangents.y, trial.tangents.log_det
    if trial.bijector.is_constant_jacobian:
        allowed = trial.tolerance * np.maximum(1, np.abs(dy).max((0, -2), keepdims=True))
        what = f"`is_constant_jacobian` is True: the derivative of {PARTS.y}"
        first = np.broadcast_to(dy[:1], dy.shape)
        yield from trial.compare(what, dy, first, allowed, by_direction=True)
    if trial.bijector.is_constant_log_det:
        what = f"`is_constant_log_det` is True: the derivative of {PARTS.log_det}"
        yield from trial.compare(what, slopes, np.zeros_like(slopes), trial.tolerance, True)


def triangular(trial: Trial) -> Iterator[str]:
    """Output order[k] depends on inputs order[: k + 1] only, and on input order[k] certainly.

    Events above the limit of size are probed: at a few places the order is cut in two, and outputs
    before the cut must not move with the inputs behind it.
    """
    if trial.order is None:
        return
    order = np.asarray(trial.order)
    moved = np.abs(trial.tangents.y[..., order, :])
    # Each direction begins at a position of the order, before which no output may move with it.
    begins = (trial.directions[:, order] != 0).argmax(1)
    axes = -1 if trial.is_small else tuple(range(moved.ndim - 1))
    allowed = trial.tolerance * moved.max(axes, keepdims=True)
    excess = np.where(np.arange(len(order))[:, None] < begins, moved - allowed, 0)
    if not (excess <= 0).all():
        *lead, i, k = trials.worst(excess)
        begin = begins[k]
        source = f"inputs from position {begin} on"
        if trial.is_small:
            source = f"input {order[begin]} (position {begin})"
        limit = np.broadcast_to(allowed, moved.shape)[(*lead, i, k)]
        yield (
            f"output {order[i]} (position {i} of the order) depends on {source} at "
            f"{trial.where(tuple(lead))}: derivative {moved[(*lead, i, k)]:.6g}, allowed "
            f"{limit:.3g} (broken at {(excess > 0).sum()} places)"
        )
    if trial.is_small:
        unmoved = np.diagonal(moved[..., order], axis1=-2, axis2=-1) == 0
        if unmoved.any():
            *lead, i = trials.worst(unmoved)
            own = f"output {order[i]} does not depend on input {order[i]}"
            yield f"{own} at {trial.where(tuple(lead))}"


def batch(trial: Trial) -> Iterator[str]:
    """A batch is its rows, one by one; further leading axes and an empty batch change nothing."""
    whole = Outcome(*map(np.asarray, trial.compiled))
    rows = trials.spread(len(trial.x))
    forms: dict[str, tuple[str, Any, Callable[[np.ndarray], np.ndarray]]] = {
        "each row alone, in a batch of one": ("batch_of_one", rows, lambda p: p[rows][:, None]),
        "each row alone, without a batch axis": ("alone", rows, lambda p: p[rows]),
        "a further leading axis": ("leading_axis", slice(None), lambda p: p[None]),
    }
    for name, (evaluation, place, form) in forms.items():
        got = trial.get(evaluation, f"{name}: ")
        broken = list(_shapes(f"{name}: ", got, tuple(form(part).shape for part in whole)))
        yield from broken
        if not broken:
            filled = Outcome(*(part.copy() for part in whole))
            for target, part in zip(filled, got, strict=True):
                target[place] = np.reshape(part, target[place].shape)
            yield from trial.compare_outcomes(name, filled, whole)
    try:
        empty = jax.eval_shape(trials.both, trial.bijector, trial.x[:0], trial.y[:0])
    except Exception as error:
        raise BrokenError("an empty batch: ", error) from error
    yield from _shapes("an empty batch: ", empty, tuple(part[:0].shape for part in whole))


def jit(trial: Trial) -> Iterator[str]:
    """A bijector rebuilt from its leaves gives the same results and is not traced again."""
    rebuilt, is_traced = trial.rebuilt()
    if is_traced:
        yield (
            "a second call with equal shapes is traced again; static attributes of the bijector "
            "must compare equal, so perhaps hold arrays as jax arrays and options in tuples"
        )
    for part, got, expected in zip(PARTS, rebuilt, trial.compiled, strict=True):
        # It is the same program.
        yield from trial.compare(f"rebuilt from its leaves: {part}", got, expected, 0)


def eager(trial: Trial) -> Iterator[str]:
    """Results without compilation equal those with it."""
    outcome = trials.both(trial.bijector, trial.x, trial.y)
    for what, got, expected in zip(PARTS, outcome, trial.compiled, strict=True):
        if _kind(got) != _kind(expected):
            yield f"{what} is {_kind(got)} without jit, {_kind(expected)} with it"
            return
    yield from trial.compare_outcomes("jit against eager", trial.compiled, outcome)


#: The evaluations that each property looks at; `jit` stands before `eager`, because a bijector may
#: change itself when it is called without jit.
EVALUATIONS: dict[Property, tuple[str, ...]] = {
    shape: (),
    dtype: (),
    finite: (),
    methods: ("methods", "sensitivity"),
    round_trip: ("again", "sensitivity"),
    log_det: ("sensitivity",),
    inverse_log_det: ("again",),
    inverse_jacobian: ("tangents", "sensitivity"),
    constant_jacobian: ("tangents",),
    triangular: ("tangents",),
    batch: ("alone", "batch_of_one", "leading_axis", "sensitivity"),
    jit: (),
    eager: ("sensitivity",),
}

#: By name, what `check_bijector` checks.
PROPERTIES: dict[str, Property] = {check.__name__: check for check in EVALUATIONS}
