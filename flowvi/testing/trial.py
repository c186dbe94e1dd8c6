"""One bijector on trial: everything the properties look at, evaluated in one compiled program."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import distrax
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from flowvi import checks
from flowvi.params import PyTree

Array = jax.Array
Shape = tuple[int, ...]
Floats = NDArray[np.floating]
Index = tuple[int, ...]
#: The number of batch axes of x, the claimed order, and whether the full Jacobian is computed.
Setting = tuple[int, Shape | None, bool]
T = TypeVar("T")
V = TypeVar("V", Array, Floats)

#: Relative error that is allowed to an identity, by dtype.
TOLERANCES: dict[str, float] = {"float32": 1e-4, "float64": 1e-9}

#: At most this many rows, spread evenly, are evaluated one by one.
MAX_ROWS = 16

#: Directions in which the derivatives of events that are too large for a Jacobian are probed.
NUM_DIRECTIONS = 8


class Outcome(NamedTuple, Generic[T]):
    """What a bijector makes of x and y, or what is said of each: an allowed error, a name."""

    y: T
    log_det: T
    x: T
    inverse_log_det: T


Results = tuple[Outcome[Array], dict[str, PyTree]]

#: The parts of an `Outcome` as a complaint calls them.
PARTS = Outcome("forward(x)", "the forward log-det", "inverse(y)", "the inverse log-det")

METHODS = Outcome("forward", "forward_log_det_jacobian", "inverse", "inverse_log_det_jacobian")

#: Distrax's own bijectors whose methods do nothing but call those of the bijectors inside.
_WRAPPERS = (distrax.Block, distrax.Chain, distrax.Inverse)


class BrokenError(Exception):
    """A property cannot be judged, because the bijector raised an error."""

    def __init__(self, what: str, error: Exception):
        super().__init__(f"{what}raised {type(error).__name__}: {error}")


def cuts(event_size: int) -> list[int]:
    """The places at which the order of a large event is cut in two, one for each direction."""
    return np.linspace(1, event_size - 1, NUM_DIRECTIONS).astype(int).tolist()


def directions(event_shape: Shape, order: Shape | None, is_small: bool) -> Floats:
    """Directions in which derivatives are taken, of shape [K, *event].

    Those of a small event are its basis. Those of a large one are random, and where an order is
    claimed zero before a cut of it.
    """
    size = math.prod(event_shape)
    if is_small:
        return np.eye(size).reshape(size, *event_shape)
    draws = np.random.default_rng(0).standard_normal((NUM_DIRECTIONS, *event_shape))
    if order is not None:
        for draw, cut in zip(draws, cuts(size), strict=True):
            draw[list(order[:cut])] = 0
    return draws


def spread(num_rows: int) -> list[int]:
    """At most `MAX_ROWS` rows, spread evenly."""
    return np.unique(np.linspace(0, num_rows - 1, MAX_ROWS).astype(int)).tolist()


def both(bijector: distrax.Bijector, x: Array, y: Array) -> Outcome[Array]:
    """The bijector at x and its inverse at y."""
    return Outcome(*bijector.forward_and_log_det(x), *bijector.inverse_and_log_det(y))


def cycle(bijector: distrax.Bijector, x: Array) -> Outcome[Array]:
    """The bijector at x and its inverse at y = forward(x)."""
    y, log_det = bijector.forward_and_log_det(x)
    return Outcome(y, log_det, *bijector.inverse_and_log_det(y))


def own_methods(bijector: distrax.Bijector) -> list[str]:
    """The methods out of `METHODS` which a bijector, or one inside, does not leave to Distrax."""
    names = []
    for name in METHODS:
        method = getattr(type(bijector), name)
        if method is getattr(distrax.Bijector, name):
            continue
        if any(method is getattr(wrapper, name) for wrapper in _WRAPPERS):
            inner = getattr(bijector, "bijectors", None) or [bijector.bijector]
            if not any(own_methods(part) for part in inner):
                continue
        names.append(name)
    return names


def _tangents(function: Callable[[Array], PyTree], point: Array, moves: Array) -> PyTree:
    """Derivatives in each of the directions, for all rows of the batch at once.

    That is right if rows do not touch each other, which the property of batches sees to.
    """
    return jax.vmap(lambda d: jax.jvp(function, (point,), (d,))[1])(moves.astype(point.dtype))


_num_traces = 0


# It runs a few times, so that nearly all of the cost is compilation: keep that short.
@functools.partial(
    jax.jit, static_argnums=(2, 3), compiler_options={"xla_backend_optimization_level": 0}
)
def _evaluate(
    bijector: distrax.Bijector, x: Array, names: tuple[str, ...], setting: Setting
) -> Results:
    """The cycle, and the evaluations of these names; one program, for each costs its own time."""
    global _num_traces
    _num_traces += 1
    result = cycle(bijector, x)
    y = result.y

    def tangents() -> Outcome[Array]:
        lead, order, is_small = setting
        chosen = directions(x.shape[lead:], order, is_small)
        chosen = chosen.reshape(len(chosen), *(1,) * lead, *x.shape[lead:])
        moves = jnp.broadcast_to(chosen, (len(chosen), *x.shape))
        return _tangents(functools.partial(cycle, bijector), x, moves)

    def inverse_tangents() -> tuple[Array, Array]:
        draws = np.random.default_rng(0).standard_normal((NUM_DIRECTIONS, *y.shape))
        return _tangents(bijector.inverse_and_log_det, y, jnp.asarray(draws) * _scale(y))

    def rows(x: Array, y: Array) -> Outcome[Array]:
        chosen = np.asarray(spread(len(x)))
        return jax.lax.map(lambda row: both(bijector, *row), (x[chosen], y[chosen]))

    evaluations: dict[str, Callable[[], PyTree]] = {
        "again": lambda: bijector.forward_and_log_det(result.x),
        "methods": lambda: {
            name: getattr(bijector, name)(x if name.startswith("forward") else y)
            for name in own_methods(bijector)
        },
        "tangents": tangents,
        "inverse_tangents": inverse_tangents,
        "alone": lambda: rows(x, y),
        "batch_of_one": lambda: rows(x[:, None], y[:, None]),
        "leading_axis": lambda: both(bijector, x[None], y[None]),
    }
    return result, {name: evaluations[name]() for name in names}


def at_least_one(values: ArrayLike) -> Floats:
    """max(1, |values|)."""
    return np.maximum(1, np.abs(np.asarray(values, np.float64)))


def _scale(values: V) -> V:
    """The magnitude relative to which an error counts.

    It is |v|, or the largest |v| of the same coordinate in the batch where that is larger, but then
    no more than 1: a value may be small by chance, and a coordinate may be small throughout.
    """
    numpy = jnp if isinstance(values, jax.Array) else np
    magnitude = abs(values)
    largest = magnitude.max(0)
    return numpy.maximum(magnitude, numpy.where(largest > 0, numpy.minimum(1, largest), 1))


class Trial:
    """A bijector with a batch of events, and what follows from them.

    Args:
        bijector: the bijector.
        x: an array of shape [n, *batch_shape, *event_shape].
        batch_shape: the bijector's own batch shape.
        order: the claimed order, or None.
        tolerance: the relative error allowed.
        max_autodiff_size: the largest event whose full Jacobian is computed.
        evaluations: the names of those that will be asked for; "sensitivity" is the one that
            `allowed` needs.
    """

    def __init__(
        self,
        bijector: distrax.Bijector,
        x: Array,
        *,
        batch_shape: Shape,
        order: Shape | None,
        tolerance: float,
        max_autodiff_size: int,
        evaluations: Iterable[str],
    ):
        self.bijector = bijector
        self.x = x
        self.order = order
        self.tolerance = tolerance
        self.lead: Shape = x.shape[: 1 + len(batch_shape)]
        self.event_size = int(np.prod(x.shape[len(self.lead) :]))
        self.is_small = self.event_size <= max_autodiff_size
        self._setting = (len(self.lead), order, self.is_small)
        sensitivity = "tangents" if self.is_small else "inverse_tangents"
        chosen = {sensitivity if name == "sensitivity" else name for name in evaluations}
        self._names = tuple(sorted(chosen))

    def _run(self, bijector: distrax.Bijector, *names: str) -> Results:
        return _evaluate(bijector, self.x, names, self._setting)

    @functools.cached_property
    def _results(self) -> Results:
        """The cycle, and all evaluations: results, or the errors that they raised."""
        try:
            return self._run(self.bijector, *self._names)
        except Exception:
            pass
        # Something is broken; one by one they say what.
        try:
            whole, _ = self._run(self.bijector)
        except Exception as error:
            raise BrokenError("", error) from error
        results = {}
        for name in self._names:
            try:
                results[name] = self._run(self.bijector, name)[1][name]
            except Exception as error:
                results[name] = error
        self._names = ()
        return whole, results

    @property
    def compiled(self) -> Outcome[Array]:
        """Results of the compiled bijector, passed as an argument, at x and y = forward(x)."""
        return self._results[0]

    def get(self, name: str, what: str = "") -> PyTree:
        """The result of an evaluation.

        Raises:
            BrokenError: if the bijector raised an error; it begins with `what`.
        """
        results = self._results[1]
        if name not in results:  # What is needed can depend on the shape of y.
            results[name] = self._run(self.bijector, name)[1][name]
        result = results[name]
        if isinstance(result, Exception):
            raise BrokenError(what, result) from result
        return result

    @functools.cached_property
    def returned(self) -> tuple[Array, Array]:
        """forward(inverse(y)) and its log-determinant."""
        return self.get("again")

    @property
    def y(self) -> Array:
        """forward(x), which every inverse is asked to turn back."""
        return self.compiled.y

    @property
    def is_square(self) -> bool:
        """Whether y has as many coordinates as x."""
        return self.y.size == self.x.size

    def eager(self) -> Outcome[Array]:
        """Results without compilation, at x and y."""
        return both(self.bijector, self.x, self.y)

    def rebuilt(self) -> tuple[Outcome[Array], bool]:
        """Results of the bijector after a way through its leaves and back; whether it is traced."""
        _ = self.compiled
        before = _num_traces
        leaves, structure = jax.tree.flatten(self.bijector)
        outcome, _ = self._run(jax.tree.unflatten(structure, leaves), *self._names)
        return outcome, _num_traces != before

    def empty(self) -> Outcome[Array]:
        """The shapes of the results for a batch of no rows."""
        try:
            return jax.eval_shape(both, self.bijector, self.x[:0], self.y[:0])
        except Exception as error:
            raise BrokenError("an empty batch: ", error) from error

    @property
    def directions(self) -> Floats:
        """Directions of x, of shape [K, D]: the basis, or random ones for large events."""
        chosen = directions(self.x.shape[len(self.lead) :], self.order, self.is_small)
        return chosen.reshape(-1, self.event_size)

    @functools.cached_property
    def tangents(self) -> Outcome[Floats]:
        """Derivatives of `compiled` in each direction of x: [n, *batch_shape(, D), K]."""
        dy, dlog_det, dx, dinverse = (
            np.asarray(tangent, np.float64) for tangent in self.get("tangents")
        )
        dy, dx = (t.reshape(len(t), *self.lead, -1) for t in (dy, dx))
        return Outcome(*(np.moveaxis(t, 0, -1) for t in (dy, dlog_det, dx, dinverse)))

    @functools.cached_property
    def sensitivity(self) -> tuple[Floats, Floats]:
        """How far inverse(y) and its log-det move if y moves by its scale: |J^-1| s and |g J^-1| s.

        Here g is the gradient of the log-determinant. For large events the sums of absolute values
        are estimated from derivatives of the inverse in random directions.
        """
        if self.is_small and self.is_square:
            scale = np.asarray(_scale(self.y), np.float64).reshape(*self.lead, -1)
            dx, dlog_det = (abs(part) for part in self.inverse_derivatives)
            dx = (dx * scale[..., None, :]).sum(-1)
            return dx.reshape(self.x.shape), (dlog_det * scale).sum(-1)
        # A sum of n absolute values is at most sqrt(n) times their Euclidean norm.
        dx, dlog_det = (
            np.sqrt(self.event_size * (np.asarray(t, np.float64) ** 2).mean(0))
            for t in self.get("inverse_tangents")
        )
        return dx, dlog_det

    @functools.cached_property
    def inverse_derivatives(self) -> tuple[Floats, Floats]:
        """J^-1 and g J^-1 of a small event, by inversion of J = d forward / dx."""
        jacobian, gradient = self.tangents.y, self.tangents.log_det
        try:
            inverse = np.linalg.inv(jacobian)
        except np.linalg.LinAlgError:  # The property of log-determinants complains about this.
            inverse = np.full_like(jacobian, np.inf)
        return inverse, (gradient[..., None] * inverse).sum(-2)

    @functools.cached_property
    def allowed(self) -> Outcome[Floats]:
        """The errors allowed between two evaluations at the same x and y."""
        dx, dlog_det = self.sensitivity
        compiled = Outcome(*(np.asarray(part, np.float64) for part in self.compiled))
        return Outcome(
            y=self.tolerance * _scale(compiled.y),
            log_det=self.tolerance * at_least_one(compiled.log_det),
            x=self.tolerance * (_scale(np.asarray(self.x, np.float64)) + dx),
            inverse_log_det=self.tolerance * (at_least_one(compiled.inverse_log_det) + dlog_det),
        )

    def where(self, index: Index) -> str:
        """The name of a place in an array whose first axes are those of the batch."""
        row, batch = index[0], index[1 : len(self.lead)]
        event = index[len(self.lead) :]
        place = f"row {row}"
        if batch:
            place += f", batch index {batch[0] if len(batch) == 1 else batch}"
        if event:
            place += f", coordinate {event[0] if len(event) == 1 else event}"
        return place

    def compare(
        self, what: str, got: ArrayLike, expected: ArrayLike, allowed: ArrayLike
    ) -> Iterator[str]:
        """Complains about the worst place where two arrays differ by more than is allowed.

        Values that are not finite are the business of another property: where both are the same,
        they are equal here.
        """
        got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
        allowed = np.broadcast_to(allowed, got.shape)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            same = (got == expected) | (np.isnan(got) & np.isnan(expected))
            error = np.where(same, 0, np.abs(got - expected))
            bad = ~(error <= allowed)
            excess = np.where(bad, np.nan_to_num(error / allowed, nan=np.inf), 0)
        if bad.any():
            index = tuple(int(i) for i in np.unravel_index(np.argmax(excess), excess.shape))
            yield (
                f"{what} at {self.where(index)}: got {got[index]:.9g}, expected "
                f"{expected[index]:.9g}; error {error[index]:.3g}, allowed {allowed[index]:.3g} "
                f"(broken at {bad.sum()} of {bad.size} places)"
            )

    def compare_outcomes(
        self, what: str, got: Outcome[Any], expected: Outcome[Any]
    ) -> Iterator[str]:
        """Compares all parts of two results at the same x and y."""
        for part, first, second, allowed in zip(PARTS, got, expected, self.allowed, strict=True):
            yield from self.compare(f"{what}: {part}", first, second, allowed)


def make_trial(
    bijector: distrax.Bijector | Callable[[Array], Array],
    x: ArrayLike,
    *,
    order: Sequence[int] | None,
    batch_shape: Sequence[int],
    tolerance: float | None,
    max_autodiff_size: int,
    evaluations: Iterable[str],
) -> Trial:
    """A `Trial` out of what a user hands over, after checks.

    Raises:
        TypeError, ValueError: as `check_bijector` documents.
    """
    bijector = distrax.as_bijector(bijector)
    x = jnp.asarray(x)
    if x.dtype.name not in TOLERANCES:
        raise TypeError(f"`x` must have dtype {' or '.join(TOLERANCES)}; got {x.dtype}.")
    batch_shape = checks.sizes("batch_shape", batch_shape)
    event_ndims = bijector.event_ndims_in
    if x.ndim < event_ndims + len(batch_shape):
        raise ValueError(
            f"`x` must have at least {event_ndims + len(batch_shape)} axes for {bijector.name} "
            f"with `event_ndims_in=={event_ndims}` and batch shape {batch_shape}; "
            f"got shape {x.shape}."
        )
    event_shape = x.shape[x.ndim - event_ndims :]
    checks.trailing_shape("x", x, (*batch_shape, *event_shape), f"batch shape {batch_shape}")
    if x.size == 0:
        raise ValueError(f"`x` must hold at least one event; got shape {x.shape}.")
    if not np.isfinite(np.asarray(x)).all():
        raise ValueError("`x` must be finite; got NaN or infinity.")
    if order is not None:
        if event_ndims != 1:
            raise ValueError(
                f"`order` must be None for {bijector.name} with `event_ndims_in=={event_ndims}`; "
                f"got {order!r}."
            )
        order = checks.permutation("order", order, event_shape[0])
    return Trial(
        bijector,
        # In numpy, for JAX would compile a program for it.
        jnp.asarray(np.asarray(x).reshape(-1, *batch_shape, *event_shape)),
        batch_shape=batch_shape,
        order=order,
        tolerance=TOLERANCES[x.dtype.name] if tolerance is None else tolerance,
        max_autodiff_size=max_autodiff_size,
        evaluations=evaluations,
    )
