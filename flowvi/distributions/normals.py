"""A mixture of many normals whose factors are known: a kernel estimate, or one by scikit-learn."""

import math

import distrax
import jax
import jax.numpy as jnp

Array = jax.Array
Shape = tuple[int, ...]

#: Numbers that are held at a time, so that many rows and many normals take little memory.
CHUNK_SIZE = 2**21


class NormalMixture(distrax.Distribution):
    """The mixture of K normals over vectors of length D.

        p(x) = sum_k w_k |det P_k| phi((x - loc_k) P_k),   the covariances being (P_k P_k^T)^-1

    Args:
        loc: of shape [*batch, K, D].
        log_weights: of shape [*batch, K].
        inverse: the upper triangular P_k, of shape [K, D, D]; or numbers [K] or [1] for multiples
            of the identity.
    """

    def __init__(self, loc: Array, log_weights: Array, inverse: Array):
        super().__init__()
        self._loc, self._log_weights, self._inverse = loc, log_weights, inverse

    @property
    def event_shape(self) -> Shape:
        return self._loc.shape[-1:]

    @property
    def batch_shape(self) -> Shape:
        return self._loc.shape[:-2]

    @property
    def dtype(self) -> jnp.dtype:
        return self._loc.dtype

    def log_prob(self, value: Array) -> Array:
        count, size = self._loc.shape[-2:]
        x = jnp.asarray(value, self.dtype)
        if self._inverse.ndim == 1:
            log_det = size * jnp.log(self._inverse)
        else:
            log_det = jnp.log(jnp.diagonal(self._inverse, axis1=-2, axis2=-1)).sum(-1)
        constant = self._log_weights + log_det - 0.5 * size * math.log(2 * math.pi)

        def log_prob(x: Array) -> Array:
            y = x[..., None, :] - self._loc
            if self._inverse.ndim == 1:
                y = y * self._inverse[:, None]
            else:
                y = jnp.einsum("...kd,kde->...ke", y, self._inverse)
            return jax.nn.logsumexp(constant - 0.5 * jnp.sum(y * y, -1), -1)

        together = max(CHUNK_SIZE // (count * size), 1)
        if self.batch_shape or together >= x.size // size:
            return log_prob(x)
        rows = x.reshape(-1, size)
        return jax.lax.map(log_prob, rows, batch_size=together).reshape(x.shape[:-1])

    def _sample_n(self, key: Array, n: int) -> Array:
        choice_key, key = jax.random.split(key)
        shape = (n, *self.batch_shape)
        choice = jax.random.categorical(choice_key, self._log_weights, shape=shape)
        noise = jax.random.normal(key, (*shape, *self.event_shape), self.dtype)
        if self.batch_shape:
            loc = jnp.take_along_axis(self._loc[None], choice[..., None, None], -2)[..., 0, :]
        else:
            loc = self._loc[choice]
        inverse = self._inverse
        if inverse.ndim == 1:
            return loc + noise / jnp.broadcast_to(inverse, self._loc.shape[-2])[choice][..., None]
        # One small system for each normal, rather than for each draw.
        factor = jax.scipy.linalg.solve_triangular(
            inverse, jnp.broadcast_to(jnp.eye(inverse.shape[-1], dtype=self.dtype), inverse.shape)
        )
        return loc + jnp.einsum("...d,...de->...e", noise, factor[choice])
