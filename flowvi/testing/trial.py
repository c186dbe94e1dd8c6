"""One bijector on trial: everything the laws look at, computed once and on demand."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import distrax
import jax
import jax.numpy as jnp
import numpy as np

from flowvi import checks

Array = jax.Array
Shape = tuple[int, ...]

#: Relative error that is allowed to an identity, by dtype.
TOLERANCES: dict[str, float] = {"float32": 1e-4, "float64": 1e-9}

#: Directions in which conditioning is probed where the full Jacobian would be too large.
NUM_DIRECTIONS = 8


class Outcome(NamedTuple):
    """What a bijector makes of x and y, or what is allowed as an error in each of these."""

    y: Any
    log_det: Any
    x: Any
    inverse_log_det: Any


#: The parts of an `Outcome` as a complaint calls them.
PARTS = Outcome("forward(x)", "the forward log-det", "inverse(y)", "the inverse log-det")

METHODS = Outcome("forward", "forward_log_det_jacobian", "inverse", "inverse_log_det_jacobian")

#: Distrax's own bijectors whose methods do nothing but call those of the bijectors inside.
_WRAPPERS = (distrax.Block, distrax.Chain, distrax.Inverse)


class BrokenError(Exception):
    """A law cannot be judged, because the bijector raised an error."""

    def __init__(self, what: str, error: Exception):
        super().__init__(f"{what}raised {type(error).__name__}: {error}")


# Each of these runs a few times, so that nearly all of the cost is compilation: keep it short.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

_num_traces = 0


def cycle(bijector: distrax.Bijector, x: Array) -> tuple[Outcome, Outcome]:
    """The bijector at x with its inverse at y = forward(x), and the bijector at inverse(y)."""
    global _num_traces
    _num_traces += 1
    y, log_det = bijector.forward_and_log_det(x)
    back, inverse_log_det = bijector.inverse_and_log_det(y)
    again, again_log_det = bijector.forward_and_log_det(back)
    return (
        Outcome(y, log_det, back, inverse_log_det),
        Outcome(again, again_log_det, back, inverse_log_det),
    )


_cycle = _jit(cycle)


def num_traces() -> int:
    """How often `cycle` has been traced, for any bijector."""
    return _num_traces


def both(bijector: distrax.Bijector, x: Array, y: Array) -> Outcome:
    """The bijector at x and its inverse at y."""
    return Outcome(*bijector.forward_and_log_det(x), *bijector.inverse_and_log_det(y))


_both = _jit(both)


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


@_jit
def _methods(bijector: distrax.Bijector, x: Array, y: Array) -> dict[str, Array]:
    return {
        name: getattr(bijector, name)(x if name.startswith("forward") else y)
        for name in own_methods(bijector)
    }


@functools.partial(_jit, static_argnums=1)
def _tangents(
    bijector: distrax.Bijector, method: str, point: Array, directions: Array
) -> tuple[Array, Array]:
    """Derivatives of a method in each of the directions, for all rows of the batch at once.

    That is right if rows do not touch each other, which the law of batches sees to.
    """
    function = getattr(bijector, method)
    return jax.vmap(lambda d: jax.jvp(function, (point,), (d,))[1])(directions)


def at_least_one(values: Any) -> np.ndarray:
    """max(1, |values|)."""
    return np.maximum(1, np.abs(np.asarray(values, np.float64)))


def _scale(values: Any) -> np.ndarray:
    """The magnitude relative to which an error counts.

    It is |v|, or the largest |v| of the same coordinate in the batch where that is larger, but then
    no more than 1: a value may be small by chance, and a coordinate may be small throughout.
    """
    magnitude = np.abs(np.asarray(values, np.float64))
    largest = magnitude.max(0)
    return np.maximum(magnitude, np.where(largest > 0, np.minimum(1, largest), 1))


class Trial:
    """A bijector with a batch of events, and lazily what follows from them.

    Args:
        bijector: the bijector.
        x: an array of shape [n, *batch_shape, *event_shape].
        batch_shape: the bijector's own batch shape.
        order: the claimed order, or None.
        tolerance: the relative error allowed.
        max_autodiff_size: the largest event whose full Jacobian is computed.
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
    ):
        self.bijector = bijector
        self.x = x
        self.batch_shape = batch_shape
        self.order = order
        self.tolerance = tolerance
        self.max_autodiff_size = max_autodiff_size
        self.lead: Shape = x.shape[: 1 + len(batch_shape)]
        self.event_size = int(np.prod(x.shape[len(self.lead) :]))

    @functools.cached_property
    def _cycle(self) -> tuple[Outcome, Outcome]:
        try:
            return _cycle(self.bijector, self.x)
        except Exception as error:
            raise BrokenError("", error) from error

    @property
    def compiled(self) -> Outcome:
        """Results of the compiled bijector, passed as an argument, at x and y = forward(x)."""
        return self._cycle[0]

    @property
    def returned(self) -> Outcome:
        """The same at inverse(y) in the place of x."""
        return self._cycle[1]

    @property
    def y(self) -> Array:
        """forward(x), which every inverse is asked to turn back."""
        return self.compiled.y

    @property
    def is_square(self) -> bool:
        """Whether y has as many coordinates as x."""
        return self.y.size == self.x.size

    @functools.cached_property
    def methods(self) -> dict[str, Array]:
        """Results at x or y of the methods which the bijector does not leave to Distrax."""
        return _methods(self.bijector, self.x, self.y) if own_methods(self.bijector) else {}

    def eager(self) -> Outcome:
        """Results without compilation, at x and y."""
        return both(self.bijector, self.x, self.y)

    def rebuilt(self) -> Outcome:
        """Results of the compiled bijector after a way through its leaves and back."""
        leaves, structure = jax.tree.flatten(self.bijector)
        return _cycle(jax.tree.unflatten(structure, leaves), self.x)[0]

    def at(self, index: Any, what: str) -> Outcome:
        """Results of the compiled bijector at x[index] and y[index].

        Raises:
            BrokenError: if the bijector raises an error.
        """
        x, y = self.x[index], self.y[index]
        try:
            # Of results without elements there is nothing to know but their shape.
            run = _both if x.size else functools.partial(jax.eval_shape, both)
            return run(self.bijector, x, y)
        except Exception as error:
            raise BrokenError(f"{what}: ", error) from error

    @functools.cached_property
    def _derivatives(self) -> tuple[np.ndarray, np.ndarray]:
        event = self.x.shape[len(self.lead) :]
        basis = jnp.eye(self.event_size, dtype=self.x.dtype).reshape(self.event_size, *event)
        basis = basis.reshape(self.event_size, *(1 for _ in self.lead), *event)
        directions = jnp.broadcast_to(basis, (self.event_size, *self.x.shape))
        dy, dlog_det = _tangents(self.bijector, "forward_and_log_det", self.x, directions)
        columns = np.asarray(dy, np.float64).reshape(self.event_size, *self.lead, -1)
        gradient = np.asarray(dlog_det, np.float64)
        return np.moveaxis(columns, 0, -1), np.moveaxis(gradient, 0, -1)

    def motion(self, directions: np.ndarray) -> np.ndarray:
        """How forward(x) moves if x moves in each of the directions, of shape [K, *x.shape]."""
        moved, _ = _tangents(
            self.bijector, "forward_and_log_det", self.x, jnp.asarray(directions, self.x.dtype)
        )
        return np.asarray(moved, np.float64)

    @property
    def jacobian(self) -> np.ndarray:
        """The Jacobian of forward at x by autodiff, of shape [n, *batch_shape, D, D]."""
        return self._derivatives[0]

    @functools.cached_property
    def _inverse_sensitivity(self) -> tuple[np.ndarray, np.ndarray]:
        """How far inverse(y) and its log-det move if y moves by its scale: |J^-1| s and |g J^-1| s.

        Here g is the gradient of the log-determinant. For large events the sums of absolute values
        are estimated from derivatives of the inverse in random directions.
        """
        scale = _scale(self.y)
        if self.is_square and self.event_size <= self.max_autodiff_size:
            jacobian, gradient = self._derivatives
            try:
                inverse = np.linalg.inv(jacobian)
            except np.linalg.LinAlgError:  # The law of log-determinants complains about this.
                inverse = np.full_like(jacobian, np.inf)
            scale = scale.reshape(*self.lead, -1)
            dx = (np.abs(inverse) * scale[..., None, :]).sum(-1)
            dlog_det = (np.abs((gradient[..., None] * inverse).sum(-2)) * scale).sum(-1)
            return dx.reshape(self.x.shape), dlog_det
        draws = np.random.default_rng(0).standard_normal((NUM_DIRECTIONS, *scale.shape))
        directions = jnp.asarray(draws * scale, self.y.dtype)
        tangents = _tangents(self.bijector, "inverse_and_log_det", self.y, directions)
        # A sum of n absolute values is at most sqrt(n) times their Euclidean norm.
        factor = self.event_size**0.5
        dx, dlog_det = (
            factor * np.sqrt((np.asarray(t, np.float64) ** 2).mean(0)) for t in tangents
        )
        return dx, dlog_det

    @functools.cached_property
    def allowed(self) -> Outcome:
        """The errors allowed between two evaluations at the same x and y."""
        dx, dlog_det = self._inverse_sensitivity
        return Outcome(
            y=self.tolerance * _scale(self.y),
            log_det=self.tolerance * at_least_one(self.compiled.log_det),
            x=self.tolerance * (_scale(self.x) + dx),
            inverse_log_det=self.tolerance
            * (at_least_one(self.compiled.inverse_log_det) + dlog_det),
        )

    def where(self, index: tuple[int, ...]) -> str:
        """The name of a place in an array whose first axes are those of the batch."""
        row, batch = index[0], index[1 : len(self.lead)]
        event = index[len(self.lead) :]
        place = f"row {row}"
        if batch:
            place += f", batch index {batch[0] if len(batch) == 1 else batch}"
        if event:
            place += f", coordinate {event[0] if len(event) == 1 else event}"
        return place

    def compare(self, what: str, got: Any, expected: Any, allowed: Any) -> Iterator[str]:
        """Complains about the worst place where two arrays differ by more than is allowed.

        Values that are not finite are the business of another law: where both are the same, they
        are equal here.
        """
        got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
        allowed = np.broadcast_to(allowed, got.shape)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            error = np.where(_same(got, expected), 0, np.abs(got - expected))
            bad = ~(error <= allowed)
            excess = np.where(bad, np.nan_to_num(error / allowed, nan=np.inf), 0)
        if bad.any():
            index = tuple(int(i) for i in np.unravel_index(np.argmax(excess), excess.shape))
            yield (
                f"{what} at {self.where(index)}: got {got[index]:.9g}, expected "
                f"{expected[index]:.9g}; error {error[index]:.3g}, allowed {allowed[index]:.3g} "
                f"(broken at {bad.sum()} of {bad.size} places)"
            )

    def compare_outcomes(self, what: str, got: Outcome, expected: Outcome) -> Iterator[str]:
        """Compares all parts of two results at the same x and y."""
        for part, *arrays in zip(PARTS, got, expected, self.allowed, strict=True):
            yield from self.compare(f"{what}: {part}", *arrays)


def _same(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (first == second) | (np.isnan(first) & np.isnan(second))


def make_trial(
    bijector: Any,
    x: Any,
    *,
    order: Any,
    batch_shape: Any,
    tolerance: float | None,
    max_autodiff_size: int,
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
    split = x.ndim - event_ndims
    event_shape = x.shape[split:]
    if x.shape[split - len(batch_shape) : split] != batch_shape:
        raise ValueError(
            f"`x` must have a shape that ends in {(*batch_shape, *event_shape)} for batch shape "
            f"{batch_shape}; got shape {x.shape}."
        )
    if x.size == 0:
        raise ValueError(f"`x` must hold at least one event; got shape {x.shape}.")
    if not np.isfinite(x).all():
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
        x.reshape(-1, *batch_shape, *event_shape),
        batch_shape=batch_shape,
        order=order,
        tolerance=TOLERANCES[x.dtype.name] if tolerance is None else tolerance,
        max_autodiff_size=max_autodiff_size,
    )
