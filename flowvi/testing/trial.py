"""One bijector on trial: everything the properties look at, evaluated in one compiled program."""

import functools
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
Floats = NDArray[np.floating]
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


def _is_own(bijector: distrax.Bijector, name: str) -> bool:
    """Whether a bijector, or one inside, has a method of its own instead of Distrax's."""
    method = getattr(type(bijector), name)
    if method is getattr(distrax.Bijector, name):
        return False
    if all(method is not getattr(wrapper, name) for wrapper in _WRAPPERS):
        return True
    inner = getattr(bijector, "bijectors", None) or [bijector.bijector]
    return any(_is_own(part, name) for part in inner)


def _tangents(function: Callable[[Array], PyTree], point: Array, moves: Array) -> PyTree:
    """Derivatives in each of the directions, for all rows of the batch at once.

    That is right if rows do not touch each other, which the property of batches sees to.
    """
    return jax.vmap(lambda d: jax.jvp(function, (point,), (d,))[1])(moves.astype(point.dtype))


_num_traces = 0


# It runs a few times, so that nearly all of the cost is compilation: keep that short.
@functools.partial(
    jax.jit, static_argnames="names", compiler_options={"xla_backend_optimization_level": 0}
)
def _evaluate(
    bijector: distrax.Bijector, x: Array, directions: Array, *, names: tuple[str, ...]
) -> Results:
    """The cycle, and the evaluations of these names; one program, for each costs its own time."""
    global _num_traces
    _num_traces += 1
    result, moves = cycle(bijector, x), jnp.broadcast_to(directions, (len(directions), *x.shape))
    y = result.y

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
            for name in METHODS
            if _is_own(bijector, name)
        },
        "tangents": lambda: _tangents(functools.partial(cycle, bijector), x, moves),
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

    The arguments are those of `check_bijector`, and the names of the evaluations that will be asked
    for, where "sensitivity" is the one that `allowed` needs.
    """

    def __init__(
        self,
        bijector: distrax.Bijector | Callable[[Array], Array],
        x: ArrayLike,
        order: Sequence[int] | None,
        batch_shape: Sequence[int],
        tolerance: float | None,
        max_autodiff_size: int,
        evaluations: Iterable[str],
    ):
        self.bijector: distrax.Bijector = distrax.as_bijector(bijector)
        x = jnp.asarray(x)
        if x.dtype.name not in TOLERANCES:
            raise TypeError(f"`x` must have dtype {' or '.join(TOLERANCES)}; got {x.dtype}.")
        batch_shape, ndims = checks.sizes("batch_shape", batch_shape), self.bijector.event_ndims_in
        owner, least = f"{self.bijector.name} with `event_ndims_in=={ndims}`", len(batch_shape)
        rule = f"`x` must have at least {ndims + least} axes for {owner} and batch shape"
        checks.require(
            x.ndim >= ndims + least, f"{rule} {batch_shape}", f"shape {x.shape}", say=str
        )
        event_shape = x.shape[x.ndim - ndims :]
        checks.trailing_shape("x", x, (*batch_shape, *event_shape), f"batch shape {batch_shape}")
        checks.require(x.size > 0, "`x` must hold at least one event", f"shape {x.shape}", say=str)
        if not np.isfinite(np.asarray(x)).all():
            raise ValueError("`x` must be finite; got NaN or infinity.")
        if order is not None:
            checks.require(ndims == 1, f"`order` must be None for {owner}", order)
            order = checks.permutation("order", order, event_shape[0])
        # In numpy, for JAX would compile a program for it.
        self.x = jnp.asarray(np.asarray(x).reshape(-1, *batch_shape, *event_shape))
        self.order = order
        self.tolerance = TOLERANCES[x.dtype.name] if tolerance is None else tolerance
        self.lead: tuple[int, ...] = self.x.shape[: 1 + len(batch_shape)]
        self.event_size = int(np.prod(event_shape))
        self.is_small = self.event_size <= max_autodiff_size
        #: Of shape [K, D]: the basis, or for large events random ones, which are zero before a cut
        #: of the order.
        self.directions: Floats = np.eye(self.event_size)
        if not self.is_small:
            shape = NUM_DIRECTIONS, self.event_size
            self.directions = np.random.default_rng(0).standard_normal(shape)
            cuts = np.linspace(1, self.event_size - 1, NUM_DIRECTIONS).astype(int)
            for direction, cut in zip(self.directions, cuts, strict=True):
                direction[list(order[:cut]) if order else []] = 0
        sensitivity = "tangents" if self.is_small else "inverse_tangents"
        chosen = {sensitivity if name == "sensitivity" else name for name in evaluations}
        self._names = tuple(sorted(chosen))

    def _run(self, bijector: distrax.Bijector, *names: str, what: str = "") -> Results:
        lone = (1,) * len(self.lead)
        moves = self.directions.reshape(-1, *lone, *self.x.shape[len(lone) :])
        try:
            return _evaluate(bijector, self.x, moves, names=names)
        except Exception as error:
            raise BrokenError(what, error) from error

    @functools.cached_property
    def _results(self) -> Results:
        """The cycle, and all evaluations; none where one of them raises an error."""
        try:
            return self._run(self.bijector, *self._names)
        except BrokenError:
            self._names = ()  # Later they say one by one what is broken.
            return self._run(self.bijector)

    @property
    def compiled(self) -> Outcome[Array]:
        """Results of the compiled bijector, passed as an argument, at x and y = forward(x)."""
        return self._results[0]

    def get(self, name: str, what: str = "") -> PyTree:
        """The result of an evaluation; an error of the bijector is told with `what` before it."""
        results = self._results[1]
        if name not in results:  # What is needed can also depend on the shape of y.
            results[name] = self._run(self.bijector, name, what=what)[1][name]
        return results[name]

    @property
    def y(self) -> Array:
        """forward(x), which every inverse is asked to turn back."""
        return self.compiled.y

    @property
    def has_jacobian(self) -> bool:
        """Whether J is known, and square."""
        return self.is_small and self.y.size == self.x.size

    def rebuilt(self) -> tuple[Outcome[Array], bool]:
        """Results of the bijector after a way through its leaves and back; whether it is traced."""
        _ = self.compiled
        before = _num_traces
        leaves, structure = jax.tree.flatten(self.bijector)
        outcome, _ = self._run(jax.tree.unflatten(structure, leaves), *self._names)
        return outcome, _num_traces != before

    @functools.cached_property
    def tangents(self) -> Outcome[Floats]:
        """Derivatives of `compiled` in each direction of x: [n, *batch_shape(, D), K]."""
        dy, dlog_det, dx, dinverse = (np.asarray(t, np.float64) for t in self.get("tangents"))
        dy, dx = (t.reshape(len(t), *self.lead, -1) for t in (dy, dx))
        return Outcome(*(np.moveaxis(t, 0, -1) for t in (dy, dlog_det, dx, dinverse)))

    @functools.cached_property
    def sensitivity(self) -> tuple[Floats, Floats]:
        """How far inverse(y) and its log-det move if y moves by its scale: |J^-1| s and |g J^-1| s.

        Here g is the gradient of the log-determinant. For large events the sums of absolute values
        are estimated from derivatives of the inverse in random directions.
        """
        if self.has_jacobian:
            scale = np.asarray(_scale(self.y), np.float64).reshape(*self.lead, -1)
            dx, dlog_det = (abs(part) for part in self.inverse_derivatives)
            dx = (dx * scale[..., None, :]).sum(-1)
            return dx.reshape(self.x.shape), (dlog_det * scale).sum(-1)
        # A sum of n absolute values is at most sqrt(n) times their Euclidean norm.
        moved = (np.asarray(t, np.float64) for t in self.get("inverse_tangents"))
        dx, dlog_det = (np.sqrt(self.event_size * (t**2).mean(0)) for t in moved)
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

    def where(self, index: tuple[int, ...]) -> str:
        """The name of a place in an array whose first axes are those of the batch."""
        batch, event = index[1 : len(self.lead)], index[len(self.lead) :]
        place = f"row {index[0]}"
        for name, part in (("batch index", batch), ("coordinate", event)):
            if part:
                place += f", {name} {part[0] if len(part) == 1 else part}"
        return place

    def compare(
        self,
        what: str,
        got: ArrayLike,
        expected: ArrayLike,
        allowed: ArrayLike,
        by_direction: bool = False,
    ) -> Iterator[str]:
        """Complains about the worst place where two arrays differ by more than is allowed.

        Values that are not finite are the business of another property: where both are the same,
        they are equal here. The last axis of derivatives is that of directions.
        """
        got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
        allowed = np.broadcast_to(allowed, got.shape)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            same = (got == expected) | (np.isnan(got) & np.isnan(expected))
            error = np.where(same, 0, np.abs(got - expected))
            bad = ~(error <= allowed)
            excess = np.where(bad, np.nan_to_num(error / allowed, nan=np.inf), 0)
        if bad.any():
            at = worst(excess)
            place = (
                self.where(at[:-1]) + f", direction {at[-1]}" if by_direction else self.where(at)
            )
            yield (
                f"{what} at {place}: got {got[at]:.9g}, expected {expected[at]:.9g}; "
                f"error {error[at]:.3g}, allowed {allowed[at]:.3g} "
                f"(broken at {bad.sum()} of {bad.size} places)"
            )

    def compare_outcomes(
        self, what: str, got: Outcome[Any], expected: Outcome[Any]
    ) -> Iterator[str]:
        """Compares all parts of two results at the same x and y."""
        for part, first, second, allowed in zip(PARTS, got, expected, self.allowed, strict=True):
            yield from self.compare(f"{what}: {part}", first, second, allowed)


def worst(excess: Floats) -> tuple[int, ...]:
    """The place of the largest number."""
    return tuple(int(i) for i in np.unravel_index(np.argmax(excess), excess.shape))
