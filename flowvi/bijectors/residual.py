"""Residual maps y = x + g(x), which a bound of the slope of g makes invertible."""

from collections.abc import Callable

import distrax
import jax
import jax.numpy as jnp

from flowvi.params import Array, PyTree

Map = Callable[[Array], Array]

#: Up to this size of an event, linear systems in its Jacobian are solved by elimination, and the
#: inverse by Newton's method; above it, both by fixed points.
DENSE = 32

#: Terms of the series that the estimate of a log-determinant always takes.
NUM_CERTAIN = 2


class Residual(distrax.Bijector):
    r"""y = x + g(x), for a g with |g(x) - g(x')| <= c |x - x'|, c < 1, of every pair of points.

        log |det| = log det(I + J),   J the Jacobian of g at x

    `forward` is one pass of g. `inverse` finds the x with x + g(x) = y: each step x <- y - g(x)
    takes the remaining error down by c at least, and up to D = 32 a step of Newton's method is
    taken where it does better. The steps end where rounding does not let them. Derivatives of
    the inverse are those of the implicit function, of every order.

    The log-determinant is that of the D x D matrix, exact. With a key it is an unbiased estimate
    whose price does not depend on D: for v of random signs, a random number N of terms,

        sum_{k=1}^N (-1)^(k+1) / k  v^T J^k v / P(N >= k),   P(N >= k) = c^(k - 2) from k = 2 on,

    with the derivative of v^T (I + J)^-1 dJ v, of which the inverse is such a series too: so
    nothing is kept of the terms. As |J| <= c, variances are finite. It has one derivative.

    Args:
        displacement: g, of shape [..., D] for x of shape [..., D], row by row.
        lipschitz: c.
        batch_shape: leading axes that results have at least, as those of a context of g.
        key: of the estimate of the log-determinant, as in training; None for the exact one.

    Source: Behrmann, Grathwohl, Chen, Duvenaud, Jacobsen, "Invertible Residual Networks", 2019;
    the estimate, Chen, Behrmann, Duvenaud, Jacobsen, "Residual Flows for Invertible Generative
    Modeling", 2019.

    Example:
        >>> import jax.numpy as jnp
        >>> layer = Residual(lambda x: 0.5 * jnp.sin(x), 0.5)
        >>> layer.inverse(layer.forward(jnp.array([1.0, 2.0])))
        Array([1., 2.], dtype=float32)
    """

    def __init__(
        self,
        displacement: Map,
        lipschitz: float,
        *,
        batch_shape: tuple[int, ...] = (),
        key: Array | None = None,
    ):
        self._displacement, self._lipschitz, self._key = displacement, lipschitz, key
        self._batch_shape = batch_shape
        super().__init__(event_ndims_in=1)

    def _rows(self, x: Array) -> Array:
        """x with the leading axes that results have."""
        x = jnp.asarray(x)
        return jnp.broadcast_to(
            x, (*jnp.broadcast_shapes(x.shape[:-1], self._batch_shape), x.shape[-1])
        )

    def _log_det(self, x: Array) -> Array:
        if self._key is None:
            own = jacobian(self._displacement, x)
            return jnp.linalg.slogdet(own + jnp.eye(x.shape[-1], dtype=own.dtype))[1]
        return estimated_log_det(self._displacement, x, self._key, self._lipschitz)

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        self._check_forward_input_shape(x)
        x = self._rows(x)
        return x + self._displacement(x), self._log_det(x)

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        self._check_inverse_input_shape(y)
        y = self._rows(y)

        def solve(f: Map, start: Array) -> Array:
            return fixed_point(f, start, self._lipschitz)

        def tangent_solve(linear: Map, rhs: Array) -> Array:
            return solve_linear(linear, rhs, self._lipschitz)

        f = lambda x: x + self._displacement(x) - y  # noqa: E731
        x = jax.lax.custom_root(f, jnp.zeros_like(y), solve, tangent_solve)
        return x, -self._log_det(x)


def jacobian(f: Map, x: Array) -> Array:
    """The Jacobians [..., D, D] of a map of rows at x of shape [..., D]."""
    push = lambda e: jax.jvp(f, (x,), (jnp.broadcast_to(e, x.shape),))[1]  # noqa: E731
    return jax.vmap(push, out_axes=-1)(jnp.eye(x.shape[-1], dtype=x.dtype))


def fixed_point(f: Map, start: Array, lipschitz: float) -> Array:
    """x with f(x) = 0, where f - identity has a Lipschitz constant below 1; row by row.

    By x <- x - f(x), which takes |f| down by the constant, and by Newton's steps where these are
    possible and better. A row is done when |f| falls no more as it should: that is rounding.
    """
    least = 0.5 * (1 + lipschitz)
    size = lambda r: jnp.linalg.norm(r, axis=-1, keepdims=True)  # noqa: E731

    def go_on(state: PyTree) -> Array:
        return state[-1].any()

    def step(state: PyTree) -> PyTree:
        x, r, active = state
        places = [x - r]
        if x.shape[-1] <= DENSE:
            places.append(x - jnp.linalg.solve(jacobian(f, x), r[..., None])[..., 0])
        best, best_r = places[0], f(places[0])
        for other in places[1:]:
            other_r = f(other)
            better = size(other_r) < size(best_r)
            best, best_r = jnp.where(better, other, best), jnp.where(better, other_r, best_r)
        better = active & (size(best_r) < size(r))
        active = active & (size(best_r) < least * size(r))
        return jnp.where(better, best, x), jnp.where(better, best_r, r), active

    r = f(start)
    x, r, _ = jax.lax.while_loop(go_on, step, (start, r, size(r) > 0))
    return x - r  # and NaN where there is one


def solve_linear(linear: Map, rhs: Array, lipschitz: float) -> Array:
    """v with linear(v) = rhs, for a linear map of rows that is I + J with |J| <= lipschitz."""
    if rhs.shape[-1] <= DENSE:
        return jnp.linalg.solve(jacobian(linear, jnp.zeros_like(rhs)), rhs[..., None])[..., 0]

    def solve(matvec: Map, b: Array) -> Array:
        return fixed_point(lambda v: matvec(v) - b, b, lipschitz)

    return jax.lax.custom_linear_solve(linear, rhs, solve, solve)


def estimated_log_det(g: Map, x: Array, key: Array, lipschitz: float) -> Array:
    """An unbiased estimate of log det(I + J), J the Jacobian of g at x, of shape [...]."""
    sign_key, count_key = jax.random.split(key)
    v = jax.random.rademacher(sign_key, x.shape, x.dtype)
    more = jnp.log(1 - jax.random.uniform(count_key)) / jnp.log(lipschitz)
    count = NUM_CERTAIN + more.astype(int)
    pure, constants = jax.closure_convert(g, x)
    frozen, *constants = jax.lax.stop_gradient((x, *constants))
    _, pull = jax.vjp(lambda x: pure(x, *constants), frozen)

    def term(k: Array, state: PyTree) -> PyTree:
        u, total, summed = state
        (u,) = pull(u)  # (J^T)^k v
        sign = jnp.where(k % 2 == 1, -1.0, 1.0)
        weight = (sign / lipschitz ** jnp.maximum(k - NUM_CERTAIN, 0)).astype(x.dtype)
        return u, total - weight / k.astype(x.dtype) * (u * v).sum(-1), summed + weight * u

    start = v, jnp.zeros(x.shape[:-1], x.dtype), v
    _, total, summed = jax.lax.fori_loop(1, count + 1, term, start)
    slope = (summed * jax.jvp(g, (x,), (v,))[1]).sum(-1)
    return total + slope - jax.lax.stop_gradient(slope)
