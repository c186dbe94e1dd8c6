"""Permutation of the coordinates of an event."""

from collections.abc import Sequence

import distrax
import jax
import jax.numpy as jnp
import numpy as np

from flowvi import checks

Array = jax.Array


class Permutation(distrax.Bijector):
    """Reorders coordinates: y_i = x_{p(i)}, with log-determinant 0.

    Args:
        permutation: p, a sequence or an array that holds each of 0, ..., D - 1 once.

    Raises:
        TypeError, ValueError: if it is none.

    Example:
        >>> import jax.numpy as jnp
        >>> import flowvi as fv
        >>> fv.Permutation([2, 0, 1]).forward(jnp.array([1.0, 2.0, 3.0]))
        Array([3., 1., 2.], dtype=float32)
    """

    def __init__(self, permutation: Sequence[int] | Array | np.ndarray):
        # A tuple, so that it is static in the pytree and layers that share it can be stacked.
        self._permutation = checks.permutation("permutation", permutation)
        super().__init__(event_ndims_in=1, is_constant_jacobian=True)

    @property
    def permutation(self) -> tuple[int, ...]:
        """p, as a tuple."""
        return self._permutation

    def __repr__(self) -> str:
        return f"Permutation({checks.shown(self._permutation)})"

    def _apply(self, x: Array, indices: np.ndarray) -> tuple[Array, Array]:
        checks.trailing_shape("x", x, (len(self._permutation),), self.name)
        x = jnp.asarray(x)
        # A reversal joins its neighbours in one loop; a gather does not.
        reverses = np.array_equal(indices, np.arange(len(indices))[::-1])
        y = jnp.flip(x, -1) if reverses else x[..., indices]
        return y, jnp.zeros(x.shape[:-1], x.dtype)

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        """y of shape [..., D] and zeros of shape [...]."""
        return self._apply(x, np.asarray(self._permutation))

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """x of shape [..., D] and zeros of shape [...]."""
        return self._apply(y, np.argsort(self._permutation))

    def same_as(self, other: distrax.Bijector) -> bool:
        """Whether `other` is the same permutation."""
        return isinstance(other, Permutation) and self._permutation == other._permutation
