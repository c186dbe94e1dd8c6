"""The inverse of an increasing scalar function without a formula, and the bijector made of it.

One search serves all of them: Newton's steps, and bisection of a bracket where these leave it or
shrink by less than half. The derivative is that of the implicit function theorem, for
x = f^{-1}(y; theta)

    dx = (dy - f_theta dtheta) / f_x

so that derivatives of every order, in either mode, need no step of the search.

Source: Press, Teukolsky, Vetterling, Flannery, "Numerical Recipes", 2007, section 9.4, for the
search; Krantz, Parks, "The Implicit Function Theorem", 2013.
"""

import functools
from typing import Any, Protocol

import distrax
import jax
import jax.numpy as jnp

Array = jax.Array
State = tuple[Array, Array, Array, Array, Array]

#: Bisection alone would need the bits of a number; each may follow a step that halves the last one.
MOST_STEPS = 200


class Increasing(Protocol):
    """An increasing function of x with parameters, a tree of arrays; hashable, without arrays."""

    def evaluate(self, theta: Any, x: Array) -> tuple[Array, Array]:
        """y = f(x; theta) and its slope, which is positive."""

    def bracket(self, theta: Any, y: Array) -> tuple[Array, Array]:
        """Two numbers between which f takes the value y."""


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def root(function: Increasing, theta: Any, y: Array) -> Array:
    """x with f(x; theta) = y, to the precision of its dtype; NaN where anything is NaN."""
    low, high = function.bracket(theta, y)
    shape = jnp.broadcast_shapes(low.shape, high.shape, y.shape)
    dtype = jnp.result_type(low, high, y)
    y, low, high = (jnp.broadcast_to(a, shape).astype(dtype) for a in (y, low, high))
    rounding = 2 * jnp.finfo(dtype).eps * jnp.maximum(1, abs(y))

    def step(state: State) -> State:
        x, low, high, last, count = state
        value, slope = function.evaluate(theta, x)
        error = value - y
        low, high = jnp.where(error < 0, x, low), jnp.where(error > 0, x, high)
        newton = x - error / slope
        is_bad = (newton < low) | (newton > high) | (2 * abs(newton - x) > last)
        found = abs(error) <= rounding
        new = jnp.where(is_bad & ~found, low + 0.5 * (high - low), newton)
        new = jnp.where(last == 0, x, new)  # Others may still search where this one has ended.
        # Not a number anywhere: that ends the search too, and is what comes out.
        return new, low, high, jnp.where(found, 0, abs(new - x)), count + 1

    def goes_on(state: State) -> Array:
        x, _, _, last, count = state
        return (last > jnp.finfo(dtype).eps * abs(x)).any() & (count < MOST_STEPS)

    begin = jnp.clip(y, low, high)
    last = jnp.where(high > low, high - low, 1)
    state = (begin, low, high, jnp.where(jnp.isnan(begin), jnp.nan, last), jnp.zeros((), int))
    return jax.lax.while_loop(goes_on, step, state)[0]


@root.defjvp
def _root_jvp(function: Increasing, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (theta, y), (dtheta, dy) = primals, tangents
    x = root(function, theta, y)
    at = lambda theta: function.evaluate(theta, x)[0]  # noqa: E731
    through = jax.jvp(at, (theta,), (dtheta,))[1]
    slope = function.evaluate(theta, x)[1]
    return x, ((dy - through) / slope).astype(x.dtype)


class Monotone(distrax.Bijector):
    """The scalar bijector y = f(x; theta) of an increasing function; its inverse is a search.

    Args:
        function: f, an `Increasing`.
        theta: its parameters.
    """

    def __init__(self, function: Increasing, theta: Any):
        super().__init__(event_ndims_in=0)
        self._function, self._theta = function, theta

    def __repr__(self) -> str:
        return f"Monotone({self._function!r})"

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        y, slope = self._function.evaluate(self._theta, x)
        return y, jnp.log(slope)

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        x = root(self._function, self._theta, y)
        return x, -jnp.log(self._function.evaluate(self._theta, x)[1])

    def same_as(self, other: distrax.Bijector) -> bool:
        return self is other
