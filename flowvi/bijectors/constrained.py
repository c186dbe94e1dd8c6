"""Maps from real vectors to constrained vectors and matrices."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import distrax
import jax
import jax.numpy as jnp
import numpy as np

from flowvi.params import Array, Shape


def _log_parts(u: Array) -> np.ndarray:
    """The logarithms of the parts that are still to be cut off after each cut."""
    return np.log(np.arange(u.shape[-1], 0, -1)).astype(u.dtype)


def _simplex(u: Array) -> tuple[Array, Array]:
    # In logarithms: no part is lost beside another that is nearly all of it.
    odds = u - _log_parts(u)
    log_part, log_rest = jax.nn.log_sigmoid(odds), jax.nn.log_sigmoid(-odds)
    zero = jnp.zeros_like(u[..., :1])
    left = jnp.concatenate([zero, jnp.cumsum(log_rest, -1)], -1)
    log_y = left + jnp.concatenate([log_part, zero], -1)
    y = jnp.maximum(jnp.exp(log_y), jnp.finfo(u.dtype).tiny)
    return y, (log_y[..., :-1] + log_rest).sum(-1)


def _simplex_inverse(y: Array) -> Array:
    rest = jnp.flip(jnp.cumsum(jnp.flip(y, -1), -1), -1)[..., 1:]
    return jnp.log(y[..., :-1]) - jnp.log(rest) + _log_parts(rest)


def _ordered(u: Array) -> tuple[Array, Array]:
    steps = jnp.concatenate([u[..., :1], jnp.exp(u[..., 1:])], -1)
    return jnp.cumsum(steps, -1), u[..., 1:].sum(-1)


def _ordered_inverse(y: Array) -> Array:
    return jnp.concatenate([y[..., :1], jnp.log(jnp.diff(y))], -1)


def _positive_ordered(u: Array) -> tuple[Array, Array]:
    return jnp.cumsum(jnp.exp(u), -1), u.sum(-1)


def _positive_ordered_inverse(y: Array) -> Array:
    return jnp.log(jnp.diff(y, prepend=0))


def _zero_sum(u: Array) -> tuple[Array, Array]:
    # A rotation of (u, 0), so the log-determinant is zero.
    count = u.shape[-1] + 1
    total = u.sum(-1, keepdims=True)
    shift = total / (math.sqrt(count) + count)
    y = jnp.concatenate([u - shift, -total / math.sqrt(count)], -1)
    return y, jnp.zeros(u.shape[:-1], u.dtype)


def _zero_sum_inverse(y: Array) -> Array:
    return y[..., :-1] - y[..., -1:] / (1 + math.sqrt(y.shape[-1]))


def _log_cosh(u: Array) -> Array:
    return jnp.logaddexp(u, -u) - math.log(2)


#: Squared radius below which the terms of a series that are left out vanish in double precision.
_NEAR = 1e-6


def _sphere(u: Array) -> tuple[Array, Array]:
    squared = (u**2).sum(-1, keepdims=True)
    near = squared < _NEAR
    radius = jnp.sqrt(jnp.where(near, 1.0, squared))  # the root has no derivative at zero
    # log cosh r and log (tanh(r) / r).
    log_cosh = jnp.where(near, squared / 2 - squared**2 / 12, _log_cosh(radius))
    far = jnp.log(jnp.tanh(radius)) - jnp.log(radius)
    log_ratio = jnp.where(near, jnp.log1p(-squared / 3 + 2 * squared**2 / 15), far)
    y = jnp.concatenate([2 * jnp.exp(log_ratio - log_cosh) * u, 2 * jnp.exp(-2 * log_cosh) - 1], -1)
    across = (u.shape[-1] - 1) * (math.log(2) + log_ratio - log_cosh)
    return y, (math.log(2) - log_cosh + across)[..., 0]


def _sphere_inverse(y: Array) -> Array:
    head, last = y[..., :-1], y[..., -1:]
    squared = (head**2).sum(-1, keepdims=True)
    near = (squared < _NEAR) & (last > 0)
    length = jnp.sqrt(jnp.where(near, 1.0, squared))
    # The tangent of half of the angle, from the form without a difference of equal numbers.
    below = (1 - jnp.minimum(last, 0)) / length
    tangent = jnp.where(last > 0, length / (1 + jnp.maximum(last, 0)), below)
    t = squared / (1 + jnp.maximum(last, 0)) ** 2
    series = (1 - t / 6 + 3 * t**2 / 40) / (1 + jnp.maximum(last, 0))
    return head * jnp.where(near, series, jnp.arcsinh(tangent) / length)


def _lower(u: Array, size: int, offset: int) -> Array:
    """Matrices whose triangle below a diagonal holds u, row by row."""
    rows, columns = np.tril_indices(size, offset)
    return jnp.zeros((*u.shape[:-1], size, size), u.dtype).at[..., rows, columns].set(u)


def _corr_factor(u: Array) -> tuple[Array, Array, Array]:
    """The Cholesky factor of a correlation matrix, log-det, and the logarithm of its diagonal."""
    size = round((1 + math.sqrt(1 + 8 * u.shape[-1])) / 2)
    u = _lower(u, size, -1)
    # The partial correlations are tanh u; what a row has left shrinks by 1 / cosh u.
    log_sech = -_log_cosh(u)
    left = jnp.cumsum(log_sech, -1) - log_sech
    below = np.tri(size, k=-1, dtype=bool)
    log_diagonal = jnp.diagonal(left, axis1=-2, axis2=-1)
    tiny = jnp.finfo(u.dtype).tiny
    diagonal = jnp.maximum(jnp.exp(log_diagonal), tiny)[..., None] * np.eye(size, dtype=u.dtype)
    log_det = jnp.where(below, 2 * log_sech + left, 0).sum((-2, -1))
    return jnp.where(below, jnp.tanh(u) * jnp.exp(left), diagonal), log_det, log_diagonal


def _corr_cholesky(u: Array) -> tuple[Array, Array]:
    factor, log_det, _ = _corr_factor(u)
    return factor, log_det


def _corr_cholesky_inverse(y: Array) -> Array:
    squares = jnp.flip(jnp.cumsum(jnp.flip(y**2, -1), -1), -1)
    rows, columns = np.tril_indices(y.shape[-1], -1)
    rest = jnp.sqrt(squares[..., rows, columns + 1])  # a row's length is 1
    return jnp.arcsinh(y[..., rows, columns] / rest)


def _corr_matrix(u: Array) -> tuple[Array, Array]:
    factor, log_det, log_diagonal = _corr_factor(u)
    size = factor.shape[-1]
    y = jnp.where(np.eye(size, dtype=bool), 1, factor @ jnp.swapaxes(factor, -1, -2))
    return y, log_det + (log_diagonal * np.arange(size - 1, -1, -1)).sum(-1)


def _corr_matrix_inverse(y: Array) -> Array:
    return _corr_cholesky_inverse(jnp.linalg.cholesky(y))


def _lower_cholesky(u: Array) -> tuple[Array, Array]:
    size = round((math.sqrt(1 + 8 * u.shape[-1]) - 1) / 2)
    u = _lower(u, size, 0)
    diagonal = np.eye(size, dtype=bool)
    safe = jnp.where(diagonal, u, 0)
    return jnp.where(diagonal, jnp.exp(safe), u), safe.sum((-2, -1))


def _lower_cholesky_inverse(y: Array) -> Array:
    diagonal = np.eye(y.shape[-1], dtype=bool)
    u = jnp.where(diagonal, jnp.log(jnp.where(diagonal, y, 1)), y)
    return u[..., *np.tril_indices(y.shape[-1])]


def _positive_definite(u: Array) -> tuple[Array, Array]:
    factor, log_det = _lower_cholesky(u)
    size = factor.shape[-1]
    log_diagonal = u[..., np.arange(size) * (np.arange(size) + 3) // 2]
    log_det += size * math.log(2) + (log_diagonal * np.arange(size, 0, -1)).sum(-1)
    return factor @ jnp.swapaxes(factor, -1, -2), log_det


def _positive_definite_inverse(y: Array) -> Array:
    return _lower_cholesky_inverse(jnp.linalg.cholesky(y))


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of events: their rank, how many reals are behind size n, the map and its inverse."""

    rank: int
    free_size: Callable[[int], int]
    forward: Callable[[Array], tuple[Array, Array]]
    inverse: Callable[[Array], Array]


#: By the names of numpyro's constraints.
KINDS: dict[str, Kind] = {
    "simplex": Kind(1, lambda n: n - 1, _simplex, _simplex_inverse),
    "ordered_vector": Kind(1, lambda n: n, _ordered, _ordered_inverse),
    "positive_ordered_vector": Kind(1, lambda n: n, _positive_ordered, _positive_ordered_inverse),
    "zero_sum": Kind(1, lambda n: n - 1, _zero_sum, _zero_sum_inverse),
    "sphere": Kind(1, lambda n: n - 1, _sphere, _sphere_inverse),
    "corr_cholesky": Kind(2, lambda n: n * (n - 1) // 2, _corr_cholesky, _corr_cholesky_inverse),
    "corr_matrix": Kind(2, lambda n: n * (n - 1) // 2, _corr_matrix, _corr_matrix_inverse),
    "lower_cholesky": Kind(2, lambda n: n * (n + 1) // 2, _lower_cholesky, _lower_cholesky_inverse),
    "positive_definite": Kind(
        2, lambda n: n * (n + 1) // 2, _positive_definite, _positive_definite_inverse
    ),
}


class Constrained(distrax.Bijector):
    """From a vector of reals to an array of constrained vectors, or matrices, of one kind.

    | kind | y of n numbers, or n x n | from |
    |---|---|---|
    | `simplex` | positive, sum 1 | n - 1 logits of sticks that are broken off, equal at 0 |
    | `ordered_vector` | rising | the first, and logarithms of the steps |
    | `positive_ordered_vector` | rising, positive | logarithms of the steps from 0 |
    | `zero_sum` | sum 0 | n - 1 numbers, by a rotation |
    | `sphere` | length 1 | n - 1 numbers u: the angle 2 atan sinh abs(u) from (0, ..., 0, 1) in
      the direction of u; the opposite point is infinitely far away |
    | `corr_cholesky` | lower triangular, rows of length 1, positive diagonal | arctanh of
      n (n - 1) / 2 partial correlations |
    | `corr_matrix` | L L^T, for such an L | the same |
    | `lower_cholesky` | lower triangular, positive diagonal | the triangle, with logarithms of the
      diagonal |
    | `positive_definite` | L L^T, for such an L | the same |

    The log-determinant is that of the numbers that are free, as densities on these sets are
    understood: all but the last of a simplex, the triangle below the diagonal of a correlation
    matrix or of its factor, with the diagonal of a covariance matrix; of `sphere` and `zero_sum`,
    the area. So the density of a Dirichlet, an LKJ or a Wishart distribution, as textbooks give it,
    integrates to 1.

    Args:
        kind: one of these.
        event_shape: the shape of y: [..., n], or [..., n, n].

    Source: Stan Reference Manual, "Constraint Transforms"; Lewandowski, Kurowicka, Joe, "Generating
    random correlation matrices based on vines and extended onion method", 2009.

    Example:
        >>> import jax.numpy as jnp
        >>> from flowvi.bijectors import Constrained
        >>> print(Constrained("simplex", (4,)).forward(jnp.zeros(3)))
        [0.25 0.25 0.25 0.25]
    """

    def __init__(self, kind: str, event_shape: Sequence[int]):
        self._kind, self._event_shape = kind, tuple(event_shape)
        super().__init__(event_ndims_in=1, event_ndims_out=len(event_shape))

    def __repr__(self) -> str:
        return f"Constrained({self._kind!r}, {self._event_shape})"

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        self._check_forward_input_shape(x)
        lead, kind = x.shape[:-1], KINDS[self._kind]
        batch = math.prod(self._event_shape[: len(self._event_shape) - kind.rank])
        y, log_det = kind.forward(x.reshape(*lead, batch, kind.free_size(self._event_shape[-1])))
        return y.reshape(*lead, *self._event_shape), log_det.sum(-1)

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        self._check_inverse_input_shape(y)
        lead = y.shape[: y.ndim - len(self._event_shape)]
        x = KINDS[self._kind].inverse(y)
        x = x.reshape(*lead, math.prod(x.shape[len(lead) :]))
        return x, -self.forward_and_log_det(x)[1]


class Blocks(distrax.Bijector):
    """Maps of parts of a vector, whose results, each made a vector, stand one after the other.

    Args:
        bijectors: the map of each part, of its own event shape; None is the identity.
        free_shapes: the shape that each part of the vector is given for its map.
        event_shapes: the shapes of their results.
    """

    def __init__(
        self,
        bijectors: Sequence[distrax.Bijector | None],
        free_shapes: Sequence[Shape],
        event_shapes: Sequence[Shape],
    ):
        self._bijectors = tuple(bijectors)
        self._shapes = tuple(free_shapes), tuple(event_shapes)
        super().__init__(event_ndims_in=1)

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        return self._apply("forward_and_log_det", x, self._shapes[0])

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        return self._apply("inverse_and_log_det", y, self._shapes[1])

    def _apply(self, method: str, x: Array, shapes: Sequence[Shape]) -> tuple[Array, Array]:
        lead = x.shape[:-1]
        ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1]
        parts, log_det = [], jnp.zeros(lead, x.dtype)
        for bijector, shape, part in zip(
            self._bijectors, shapes, jnp.split(x, ends, -1), strict=True
        ):
            if bijector is not None:
                part, change = getattr(bijector, method)(part.reshape(*lead, *shape))
                log_det += change
            parts.append(part.reshape(*lead, math.prod(part.shape[len(lead) :])))
        return jnp.concatenate(parts, -1), log_det
