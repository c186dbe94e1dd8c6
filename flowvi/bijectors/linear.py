"""Linear layers with triangular factors."""

import distrax
import jax
import jax.numpy as jnp

from flowvi import checks

Array = jax.Array

MAX_LOG_DIAGONAL = 5.0


class LULinear(distrax.Chain):
    """y = L U x + b, with unit lower triangular L and upper triangular U from one raw matrix R.

        L = I + tril(R, -1) / sqrt(D),  U = diag(exp(5 tanh(diag(R) / 5))) + triu(R, 1) / sqrt(D)

    Every finite R is invertible and R = 0 is the identity. log |det| is the sum of U's
    log-diagonal; the inverse solves two triangular systems.

    Args:
        matrix: R, of shape [..., D, D].
        bias: b, of shape [..., D]; zero by default.

    Raises:
        ValueError: if the shapes are not these.

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
        scale = jnp.exp(MAX_LOG_DIAGONAL * jnp.tanh(diagonal / MAX_LOG_DIAGONAL))
        off_diagonal = matrix * size**-0.5
        lower = eye + jnp.tril(off_diagonal, -1)
        upper = eye * scale[..., None, :] + jnp.triu(off_diagonal, 1)
        factors = [
            distrax.TriangularLinear(lower, is_lower=True),
            distrax.TriangularLinear(upper, is_lower=False),
        ]
        shift = [] if bias is None else [distrax.Block(distrax.Shift(jnp.asarray(bias)), 1)]
        super().__init__(shift + factors)

    def __repr__(self) -> str:
        return f"LULinear(event_size={self.bijectors[-1].matrix.shape[-1]})"
