"""Affine maps: permutations, triangular factors, known matrices."""

from collections.abc import Sequence

import distrax
import jax.numpy as jnp
import numpy as np

from flowvi import checks
from flowvi.params import Array
from flowvi.smooth import bounded

MAX_LOG_DIAGONAL = 5.0


class Permutation(distrax.Bijector):
    """Reorders coordinates: y_i = x_{p(i)}, with log-determinant 0.

    Args:
        permutation: p, a sequence or an array that holds each of 0, ..., D - 1 once.

    Raises:
        ValueError: if 0, ..., D - 1 are not each there once.

    Source: Dinh, Krueger, Bengio, "NICE: Non-linear Independent Components Estimation", 2015.

    Example:
        >>> import jax.numpy as jnp
        >>> import flowvi as fv
        >>> fv.Permutation([2, 0, 1]).forward(jnp.array([1.0, 2.0, 3.0]))
        Array([3., 1., 2.], dtype=float32)
    """

    def __init__(self, permutation: Sequence[int] | Array | np.ndarray):
        # A tuple, so that it is static in the pytree and layers that share it can be stacked.
        self.permutation = checks.permutation("permutation", permutation)
        super().__init__(event_ndims_in=1, is_constant_jacobian=True)

    def __repr__(self) -> str:
        return f"Permutation({checks.shown(self.permutation)})"

    def _apply(self, x: Array, indices: np.ndarray) -> tuple[Array, Array]:
        checks.trailing_shape("x", x, (len(self.permutation),), self.name)
        x = jnp.asarray(x)
        # A reversal joins its neighbours in one loop; a gather does not.
        reverses = np.array_equal(indices, np.arange(len(indices))[::-1])
        y = jnp.flip(x, -1) if reverses else x[..., indices]
        return y, jnp.zeros(x.shape[:-1], x.dtype)

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        return self._apply(x, np.asarray(self.permutation))

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        return self._apply(y, np.argsort(self.permutation))

    def same_as(self, other: distrax.Bijector) -> bool:
        return isinstance(other, Permutation) and self.permutation == other.permutation


class LULinear(distrax.Chain):
    """y = L U x + b, with unit lower triangular L and upper triangular U from one raw matrix R.

        L = I + tril(R, -1) / sqrt(D),  U = diag(exp(5 tanh(diag(R) / 5))) + triu(R, 1) / sqrt(D)

    Every finite R is invertible and R = 0 is the identity. log |det| is the sum of U's
    log-diagonal; the inverse solves two triangular systems.

    Args:
        matrix: R, of shape [..., D, D].
        bias: b, of shape [..., D]; zero by default.

    Raises:
        ValueError: if `matrix` is not square, or `bias` does not fit to it.

    Source: the LU form of Kingma, Dhariwal, "Glow: Generative Flow with Invertible 1x1
    Convolutions", 2018, and Oliva et al., "Transformation Autoregressive Networks", 2018.

    Example:
        >>> import jax.numpy as jnp
        >>> import flowvi as fv
        >>> fv.LULinear(jnp.zeros((2, 2)), jnp.ones(2)).forward(jnp.ones(2))
        Array([2., 2.], dtype=float32)
    """

    def __init__(self, matrix: Array, bias: Array | None = None):
        shape = jnp.shape(matrix)
        if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] == 0:
            raise ValueError(f"`matrix` must have shape [..., D, D]; got shape {shape}.")
        size = shape[-1]
        if bias is not None:
            checks.trailing_shape("bias", bias, (size,), "this linear layer")
        matrix = jnp.asarray(matrix)
        eye = jnp.eye(size, dtype=matrix.dtype)
        diagonal = jnp.diagonal(matrix, axis1=-2, axis2=-1)
        scale = jnp.exp(bounded(diagonal, MAX_LOG_DIAGONAL))
        off_diagonal = matrix * size**-0.5
        lower = eye + jnp.tril(off_diagonal, -1)
        upper = eye * scale[..., None, :] + jnp.triu(off_diagonal, 1)
        maps = [distrax.TriangularLinear(lower), distrax.TriangularLinear(upper, is_lower=False)]
        if bias is not None:
            maps.insert(0, distrax.Block(distrax.Shift(jnp.asarray(bias)), 1))
        super().__init__(maps)

    def __repr__(self) -> str:
        return f"LULinear(event_size={self.bijectors[-1].matrix.shape[-1]})"


def _rows(log_det: Array, x: Array) -> Array:
    """The same number for every row of x."""
    return jnp.broadcast_to(log_det, x.shape[:-1]).astype(x.dtype)


def _beside(vector: Array, x: Array) -> Array:
    """A vector with as many axes as x."""
    return jnp.expand_dims(vector, tuple(range(jnp.ndim(x) - 1)))


class Dense(distrax.Bijector):
    """y = loc + A x, for a matrix A of shape [D, D] whose inverse and log |det| are known."""

    def __init__(self, loc: Array, matrix: Array, inverse: Array, log_det: Array):
        shape = 2 * (jnp.shape(loc) or (0,))
        for name, got in (("matrix", jnp.shape(matrix)), ("inverse", jnp.shape(inverse))):
            rule = f"`{name}` must have shape {shape}, for a `loc` of shape {jnp.shape(loc)}"
            checks.require(got == shape, rule, f"shape {got}", say=str)
        self._loc, self._matrix, self._inverse, self._log_det = loc, matrix, inverse, log_det
        super().__init__(event_ndims_in=1, is_constant_jacobian=True)

    def __repr__(self) -> str:
        return f"Dense(event_size={jnp.shape(self._loc)[0]})"

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        self._check_forward_input_shape(x)
        y = _beside(self._loc, x) + x @ self._matrix.T
        return y, _rows(self._log_det, y)

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        self._check_inverse_input_shape(y)
        x = (y - _beside(self._loc, y)) @ self._inverse.T
        return x, _rows(-self._log_det, x)


class LowRank(distrax.Bijector):
    """y = loc + scale * (x + U (gain * (U^T x))), U of shape [D, R] with orthonormal columns.

    log |det| = sum log scale + sum log(1 + gain), and the inverse is of the same form: with
    w = (y - loc) / scale, x = w - U (gain / (1 + gain) * (U^T w)). Scales are positive, of shape
    [D], gains above -1, of shape [R].
    """

    def __init__(self, loc: Array, scale: Array, basis: Array, gain: Array):
        checks.trailing_shape("scale", scale, jnp.shape(loc), "this map")
        checks.trailing_shape("basis", basis, jnp.shape(loc) + jnp.shape(gain), "this map")
        self._loc, self._scale, self._basis, self._gain = loc, scale, basis, gain
        super().__init__(event_ndims_in=1, is_constant_jacobian=True)

    def __repr__(self) -> str:
        return f"LowRank(event_size={jnp.shape(self._loc)[0]}, rank={jnp.shape(self._gain)[0]})"

    def _log_det(self) -> Array:
        return jnp.sum(jnp.log(self._scale)) + jnp.sum(jnp.log1p(self._gain))

    def _stretch(self, x: Array, gain: Array) -> Array:
        """U (gain * (U^T x))."""
        return (x @ self._basis * _beside(gain, x)) @ self._basis.T

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        self._check_forward_input_shape(x)
        scaled = x + self._stretch(x, self._gain)
        y = _beside(self._loc, x) + _beside(self._scale, x) * scaled
        return y, _rows(self._log_det(), y)

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        self._check_inverse_input_shape(y)
        w = (y - _beside(self._loc, y)) / _beside(self._scale, y)
        x = w - self._stretch(w, self._gain / (1 + self._gain))
        return x, _rows(-self._log_det(), x)
