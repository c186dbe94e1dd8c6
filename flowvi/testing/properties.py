"""The properties of a bijector, each a function with a name.

A property looks at a `Trial` and yields a complaint for each way in which the bijector breaks it.
To add one, write such a generator here and mark it with `register`, which takes the names of the
evaluations that it looks at: `check_bijector` runs all of them, in the order of this file, and
names a property as its function is named.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from flowvi.testing import trial as trials
from flowvi.testing.trial import METHODS, PARTS, BrokenError, Floats, Outcome, Trial

Property = Callable[[Trial], Iterator[str]]

PROPERTIES: dict[str, Property] = {}

#: The evaluations that each property looks at.
EVALUATIONS: dict[str, tuple[str, ...]] = {}


def register(*evaluations: str) -> Callable[[Property], Property]:
    """Adds a property under the name of its function."""

    def add(function: Property) -> Property:
        PROPERTIES[function.__name__] = function
        EVALUATIONS[function.__name__] = evaluations
        return function

    return add


@register()
def shape(trial: Trial) -> Iterator[str]:
    """Events keep their rank, log-determinants have the shape of the batch."""
    lead, rank = trial.lead, trial.bijector.event_ndims_out
    y, log_det, x, inverse_log_det = (part.shape for part in trial.compiled)
    if y[: len(lead)] != lead or len(y) != len(lead) + rank:
        yield f"{PARTS.y} has shape {y}, expected {lead} and then {rank} axes of an event"
    got = (x, log_det, inverse_log_det)
    names = (PARTS.x, PARTS.log_det, PARTS.inverse_log_det)
    yield from _shapes("", names, got, (trial.x.shape, lead, lead))


def _shapes(
    where: str,
    names: tuple[str, ...],
    got: tuple[tuple[int, ...], ...],
    expected: tuple[tuple[int, ...], ...],
) -> Iterator[str]:
    for what, own, other in zip(names, got, expected, strict=True):
        if own != other:
            yield f"{where}{what} has shape {own}, expected {other}"


@register()
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


@register()
def finite(trial: Trial) -> Iterator[str]:
    """Finite inputs give finite outputs."""
    for what, part in zip(PARTS, map(np.asarray, trial.compiled), strict=True):
        bad = ~np.isfinite(part)
        if bad.any():
            at = trials.worst(bad)
            yield (
                f"{what} is {part[at]} at {trial.where(at)} "
                f"(broken at {bad.sum()} of {bad.size} places)"
            )


def _kind(array: jax.Array) -> str:
    return f"{array.dtype}{list(array.shape)}"


@register("methods", "sensitivity")
def methods(trial: Trial) -> Iterator[str]:
    """`forward`, `inverse` and the two log-determinants agree with the methods that return both."""
    results = trial.get("methods")
    names = zip(METHODS, PARTS, strict=True)
    for (name, part), known, allowed in zip(names, trial.compiled, trial.allowed, strict=True):
        if name not in results:
            continue
        got = results[name]
        if _kind(got) != _kind(known):
            yield f"`{name}` returns {_kind(got)}, but {part} is {_kind(known)}"
        else:
            yield from trial.compare(f"`{name}` against {part}", got, known, allowed)


@register("again", "sensitivity")
def round_trip(trial: Trial) -> Iterator[str]:
    """forward(inverse(y)) is y up to the scale of y; inverse(forward(x)) is x up to conditioning.

    An error in x is allowed in so far as an admissible error of y, carried back by the Jacobian of
    the inverse, can cause it.
    """
    allowed = trial.allowed
    yield from trial.compare("forward(inverse(y))", trial.get("again")[0], trial.y, allowed.y)
    yield from trial.compare("inverse(forward(x))", trial.compiled.x, trial.x, allowed.x)


@register("sensitivity")
def log_det(trial: Trial) -> Iterator[str]:
    """The forward log-determinant is that of the Jacobian by automatic differentiation."""
    if trial.has_jacobian:
        _, expected = np.linalg.slogdet(trial.tangents.y)
        what = f"{PARTS.log_det} against autodiff"
        yield from trial.compare(what, trial.compiled.log_det, expected, trial.allowed.log_det)


@register("again")
def inverse_log_det(trial: Trial) -> Iterator[str]:
    """The inverse's log-determinant at y is minus the forward one at x = inverse(y)."""
    expected = -np.asarray(trial.get("again")[1], np.float64)
    allowed = trial.tolerance * trials.at_least_one(expected)
    what = f"{PARTS.inverse_log_det} against minus the forward one"
    yield from trial.compare(what, trial.compiled.inverse_log_det, expected, allowed)


@register("tangents", "sensitivity")
def inverse_jacobian(trial: Trial) -> Iterator[str]:
    """The derivatives of inverse at y = forward(x) undo those of forward at x.

    The inverse's Jacobian is J^-1, and the sum of both log-determinants does not move. Derivatives
    of derivatives are not known, so the tolerance is the square root of the other one.
    """
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
    tolerance = trial.tolerance**0.5
    expected = np.broadcast_to(trial.directions.T, tangents.x.shape)
    allowed = tolerance * (trials.at_least_one(expected) + dx)
    name = "the derivative of inverse(forward(x)) in direction"
    yield from _by_direction(trial, name, tangents.x, expected, allowed)
    total = tangents.log_det + tangents.inverse_log_det
    allowed = tolerance * (trials.at_least_one(tangents.log_det) + dlog_det)
    name = "the derivative of the sum of both log-dets in direction"
    yield from _by_direction(trial, name, total, np.zeros_like(total), allowed)


def _by_direction(
    trial: Trial, what: str, got: Floats, expected: Floats, allowed: Floats
) -> Iterator[str]:
    """`Trial.compare` of derivatives, whose last axis is that of directions: the worst of them."""
    with np.errstate(invalid="ignore", over="ignore"):
        excess = np.nan_to_num(np.abs(got - expected) / allowed, nan=np.inf)
    k = trials.worst(excess)[-1]
    yield from trial.compare(f"{what} {k}", got[..., k], expected[..., k], allowed[..., k])


@register("tangents")
def constant_jacobian(trial: Trial) -> Iterator[str]:
    """Where `is_constant_jacobian` is claimed, the derivatives of forward are the same at all rows.

    Those of the log-determinant are zero where `is_constant_log_det` is claimed.
    """
    if trial.bijector.is_constant_jacobian:
        dy = trial.tangents.y
        allowed = trial.tolerance * np.maximum(1, np.abs(dy).max((0, -2), keepdims=True))
        what = "`is_constant_jacobian` is True: the derivative of forward(x) in direction"
        yield from _by_direction(trial, what, dy, np.broadcast_to(dy[:1], dy.shape), allowed)
    if trial.bijector.is_constant_log_det:
        slopes = trial.tangents.log_det
        allowed = np.full_like(slopes, trial.tolerance)
        what = "`is_constant_log_det` is True: the derivative of the forward log-det in direction"
        yield from _by_direction(trial, what, slopes, np.zeros_like(slopes), allowed)


@register("tangents")
def triangular(trial: Trial) -> Iterator[str]:
    """Output order[k] depends on inputs order[: k + 1] only, and on input order[k] certainly.

    Events above the limit of size are probed: at a few places the order is cut in two, and outputs
    before the cut must not move with the inputs behind it.
    """
    if trial.order is None:
        return
    order = np.asarray(trial.order)
    if not trial.is_small:
        yield from _across_cuts(trial, order)
        return
    jacobian = trial.tangents.y[..., order[:, None], order]
    allowed = trial.tolerance * np.abs(jacobian).max(-1, keepdims=True)
    excess = np.triu(np.abs(jacobian), 1) - allowed
    if not (excess <= 0).all():
        *lead, i, j = trials.worst(excess)
        yield (
            f"output {order[i]} (position {i} of the order) depends on input {order[j]} "
            f"(position {j}) at {trial.where(tuple(lead))}: derivative "
            f"{jacobian[(*lead, i, j)]:.6g}, allowed {allowed[(*lead, i, 0)]:.3g} "
            f"(broken at {(excess > 0).sum()} places)"
        )
    diagonal = np.diagonal(jacobian, axis1=-2, axis2=-1)
    if (diagonal == 0).any():
        *lead, i = trials.worst(diagonal == 0)
        yield f"output {order[i]} does not depend on input {order[i]} at {trial.where(tuple(lead))}"


def _across_cuts(trial: Trial, order: np.ndarray) -> Iterator[str]:
    for k, cut in enumerate(trials.cuts(trial.event_size)):
        moved = np.abs(trial.tangents.y[..., k])
        allowed = trial.tolerance * moved.max()
        before = moved[..., order[:cut]]
        if not (before <= allowed).all():
            *lead, i = trials.worst(before)
            yield (
                f"output {order[i]} (position {i} of the order) depends on inputs from position "
                f"{cut} on at {trial.where(tuple(lead))}: it moves by "
                f"{before[(*lead, i)]:.6g}, allowed {allowed:.3g}"
            )
            return


@register("alone", "batch_of_one", "leading_axis", "sensitivity")
def batch(trial: Trial) -> Iterator[str]:
    """A batch is its rows, one by one; further leading axes and an empty batch change nothing."""
    whole = Outcome(*(np.asarray(part) for part in trial.compiled))
    rows = trials.spread(len(trial.x))
    one_by_one = Outcome(*(part[rows] for part in whole))
    kinds = {
        "each row alone, in a batch of one": ("batch_of_one", [p[:, None] for p in one_by_one]),
        "each row alone, without a batch axis": ("alone", one_by_one),
        "a further leading axis": ("leading_axis", [part[None] for part in whole]),
    }
    for name, (evaluation, expected) in kinds.items():
        got = trial.get(evaluation, f"{name}: ")
        # Of all rows the shapes are the same; it is that of one row which is told.
        skip = 0 if evaluation == "leading_axis" else 1
        shapes = (tuple(part.shape[skip:] for part in parts) for parts in (got, expected))
        if complaints := list(_shapes(f"{name}: ", PARTS, *shapes)):
            yield from complaints
            continue
        filled = Outcome(*(part.copy() for part in whole))
        for target, part in zip(filled, got, strict=True):
            place = rows if skip else slice(None)
            target[place] = np.reshape(part, target[place].shape)
        yield from trial.compare_outcomes(name, filled, whole)
    try:
        empty = jax.eval_shape(trials.both, trial.bijector, trial.x[:0], trial.y[:0])
    except Exception as error:
        raise BrokenError("an empty batch: ", error) from error
    shapes = (tuple(part.shape for part in parts) for parts in (empty, [p[:0] for p in whole]))
    yield from _shapes("an empty batch: ", PARTS, *shapes)


@register()
def jit(trial: Trial) -> Iterator[str]:
    """A bijector rebuilt from its leaves gives the same results and is not traced again."""
    # Before `eager`, because a bijector may change itself when it is called without jit.
    rebuilt, is_traced = trial.rebuilt()
    if is_traced:
        yield (
            "a second call with equal shapes is traced again; static attributes of the bijector "
            "must compare equal, so perhaps hold arrays as jax arrays and options in tuples"
        )
    for part, got, expected in zip(PARTS, rebuilt, trial.compiled, strict=True):
        # It is the same program.
        yield from trial.compare(f"rebuilt from its leaves: {part}", got, expected, 0)


@register("sensitivity")
def eager(trial: Trial) -> Iterator[str]:
    """Results without compilation equal those with it."""
    outcome = trials.both(trial.bijector, trial.x, trial.y)
    for what, got, expected in zip(PARTS, outcome, trial.compiled, strict=True):
        if _kind(got) != _kind(expected):
            yield f"{what} is {_kind(got)} without jit, {_kind(expected)} with it"
            return
    yield from trial.compare_outcomes("jit against eager", trial.compiled, outcome)
