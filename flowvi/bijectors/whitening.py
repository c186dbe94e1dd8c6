"""Affine maps given by their matrix and its inverse, or by a diagonal and a few directions."""

import distrax
import jax
import jax.numpy as jnp

from flowvi import checks

Array = jax.Array


class Dense(distrax.Bijector):
    """y = loc + A x, for a matrix A whose inverse and log |det| are known.

    Args:
        loc: of shape [D].
        matrix: A, of shape [D, D].
        inverse: A^-1, of shape [D, D].
        log_det: log |det A|, a scalar.

    Raises:
        ValueError: if the shapes are not these.

    Example:
        >>> import jax.numpy as jnp
        >>> eye = jnp.eye(2)
        >>> Dense(jnp.ones(2), 2 * eye, eye / 2, 2 * jnp.log(2.0)).forward(jnp.ones(2))
        Array([3., 3.], dtype=float32)
    """

    def __init__(self, loc: Array, matrix: Array, inverse: Array, log_det: Array):
        size = jnp.shape(loc)[-1] if jnp.ndim(loc) else 0
        for name, array in (("matrix", matrix), ("inverse", inverse)):
            if jnp.shape(array) != (size, size):
                raise ValueError(
                    f"`{name}` must have shape {(size, size)}, for a `loc` of shape "
                    f"{jnp.shape(loc)}; got shape {jnp.shape(array)}."
                )
        self._loc, self._matrix, self._inverse, self._log_det = loc, matrix, inverse, log_det
        super().__init__(event_ndims_in=1, is_constant_jacobian=True)

    def __repr__(self) -> str:
        return f"Dense(event_size={jnp.shape(self._loc)[0]})"

    def _rows(self, x: Array, sign: int) -> Array:
        return jnp.broadcast_to(sign * self._log_det, x.shape[:-1]).astype(x.dtype)

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        """y of shape [..., D], and log |det A| of shape [...]."""
        self._check_forward_input_shape(x)
        y = self._loc + x @ self._matrix.T
        return y, self._rows(y, 1)

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """x of shape [..., D], and -log |det A| of shape [...]."""
        self._check_inverse_input_shape(y)
        x = (y - self._loc) @ self._inverse.T
        return x, self._rows(x, -1)


class LowRank(distrax.Bijector):
    """y = loc + scale * (x + U (gain * (U^T x))), with orthonormal columns of U.

    log |det| = sum log scale + sum log(1 + gain), and the inverse is of the same form: with
    w = (y - loc) / scale, x = w - U (gain / (1 + gain) * (U^T w)).

    Args:
        loc: of shape [D].
        scale: of shape [D], positive.
        basis: U, of shape [D, R], with orthonormal columns.
        gain: of shape [R], above -1.

    Raises:
        ValueError: if the shapes are not these.

    Example:
        >>> import jax.numpy as jnp
        >>> basis = jnp.array([[1.0], [0.0]])
        >>> LowRank(jnp.zeros(2), jnp.ones(2), basis, jnp.array([3.0])).forward(jnp.ones(2))
        Array([4., 1.], dtype=float32)
    """

    def __init__(self, loc: Array, scale: Array, basis: Array, gain: Array):
        checks.trailing_shape("scale", scale, jnp.shape(loc), "this map")
        checks.trailing_shape("basis", basis, jnp.shape(loc) + jnp.shape(gain), "this map")
        self._loc, self._scale, self._basis, self._gain = loc, scale, basis, gain
        super().__init__(event_ndims_in=1, is_constant_jacobian=True)

    def __repr__(self) -> str:
        return f"LowRank(event_size={jnp.shape(self._loc)[0]}, rank={jnp.shape(self._gain)[0]})"

    def _log_det(self, x: Array, sign: int) -> Array:
        log_det = jnp.sum(jnp.log(self._scale)) + jnp.sum(jnp.log1p(self._gain))
        return jnp.broadcast_to(sign * log_det, x.shape[:-1]).astype(x.dtype)

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        """y of shape [..., D], and the log-determinant of shape [...]."""
        self._check_forward_input_shape(x)
        stretched = x + (x @ self._basis * self._gain) @ self._basis.T
        y = self._loc + self._scale * stretched
        return y, self._log_det(y, 1)

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """x of shape [..., D], and minus the log-determinant of shape [...]."""
        self._check_inverse_input_shape(y)
        w = (y - self._loc) / self._scale
        x = w - (w @ self._basis * (self._gain / (1 + self._gain))) @ self._basis.T
        return x, self._log_det(x, -1)
