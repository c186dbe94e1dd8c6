"""Log densities that are no functions of JAX: of Stan, of C++, of a simulator."""

import concurrent.futures
import functools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from flowvi import checks
from flowvi.params import Array

#: A vector -> its log density and the gradient of that.
ValueAndGrad = Callable[[np.ndarray], tuple[float, ArrayLike]]


def log_density(
    value_and_grad: ValueAndGrad, size: int, num_threads: int | None
) -> Callable[[Array], Array]:
    """A function of JAX, which can be differentiated once, of one that is not.

    Args:
        value_and_grad: a vector of shape [size], in double precision -> (value, gradient).
        size: the length of the vector.
        num_threads: how many calls may run at once; as many as there are processors by default.
    """
    rule = "`value_and_grad` must be a function of a vector"
    checks.require(callable(value_and_grad), rule, value_and_grad, error=TypeError)
    count = os.cpu_count() or 1
    count = count if num_threads is None else checks.positive_int("num_threads", num_threads)
    host = Host(value_and_grad, size, count)
    host.one(np.zeros(size))  # a wrong shape is found here, not by a compiled program

    def call(u: Array) -> tuple[Array, Array]:
        # As bytes: JAX hands arrays over in a thread of its own, in which `jax.enable_x64` does not
        # hold, and double precision would be lost there in silence.
        dtype = u.dtype
        shapes = [jax.ShapeDtypeStruct((*s, dtype.itemsize), np.uint8) for s in ((), u.shape)]
        stored = jax.lax.bitcast_convert_type(u, np.uint8)
        many = functools.partial(host.many, dtype)
        found = jax.pure_callback(many, tuple(shapes), stored, vmap_method="expand_dims")
        value, gradient = (jax.lax.bitcast_convert_type(each, dtype) for each in found)
        return value, gradient

    @jax.custom_vjp
    def density(u: Array) -> Array:
        return call(u)[0]

    density.defvjp(call, lambda gradient, slope: (slope * gradient,))
    return density


class Host:
    """Calls of a function for many vectors, some at once."""

    def __init__(self, value_and_grad: ValueAndGrad, size: int, num_threads: int):
        self._function, self._size, self._num_threads = value_and_grad, size, num_threads

    @functools.cached_property
    def _pool(self) -> concurrent.futures.ThreadPoolExecutor:
        return concurrent.futures.ThreadPoolExecutor(self._num_threads)

    def one(self, u: np.ndarray) -> tuple[float, np.ndarray]:
        """The value and the gradient at one vector."""
        found = self._function(u)
        rule = "`value_and_grad` must return a pair (value, gradient)"
        is_pair = isinstance(found, tuple | list) and len(found) == 2
        checks.require(is_pair, rule, found, error=TypeError, say=checks.shown)
        value, gradient = (np.asarray(each, float) for each in found)
        rule = f"`value_and_grad` must return a scalar and a gradient of shape {(self._size,)}"
        fits = value.size == 1 and gradient.shape == (self._size,)
        checks.require(fits, rule, f"shapes {value.shape} and {gradient.shape}", say=str)
        return float(value.reshape(())), gradient

    def many(self, dtype: DTypeLike, stored: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Values [...] and gradients [..., size] at u of shape [..., size], all as bytes."""
        u = np.ascontiguousarray(stored).view(dtype)[..., 0]
        rows = u.reshape(-1, self._size).astype(float)
        threaded = len(rows) > 1 and self._num_threads > 1
        found = self._pool.map(self.one, rows) if threaded else map(self.one, rows)
        values, gradients = np.empty(len(rows), u.dtype), np.empty(rows.shape, u.dtype)
        for index, (value, gradient) in enumerate(found):
            values[index], gradients[index] = value, gradient
        values, gradients = values.reshape(u.shape[:-1]), gradients.reshape(u.shape)
        return values[..., None].view(np.uint8), gradients[..., None].view(np.uint8)


def of_named(function: Callable[[Array], Array]) -> Callable[[dict[str, Array]], Array]:
    """The same function of named parameters, one after the other in one vector."""
    return lambda theta: function(jnp.concatenate([jnp.ravel(each) for each in theta.values()]))
