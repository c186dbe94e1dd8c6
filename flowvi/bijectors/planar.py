"""Planar, radial and Sylvester maps: an inverse is one root, or M of them one after the other."""

import distrax
import jax
import jax.numpy as jnp

from flowvi.params import Array
from flowvi.roots import root
from flowvi.smooth import positive


class _Ridge:
    """y = t + a tanh(k t + b) for theta = (a, k, b) with a k > -1."""

    def evaluate(self, theta: tuple[Array, Array, Array], x: Array) -> tuple[Array, Array]:
        a, k, b = theta
        h = jnp.tanh(k * x + b)
        return x + a * h, 1 + a * k * (1 - h * h)

    def bracket(self, theta: tuple[Array, Array, Array], y: Array) -> tuple[Array, Array]:
        size = abs(theta[0])
        return y - size, y + size


class _Distance:
    """y = r + beta r / (alpha + r) for theta = (alpha, beta) and r >= 0, with beta > -alpha."""

    def evaluate(self, theta: tuple[Array, Array], x: Array) -> tuple[Array, Array]:
        alpha, beta = theta
        return x + beta * x / (alpha + x), 1 + alpha * beta / (alpha + x) ** 2

    def bracket(self, theta: tuple[Array, Array], y: Array) -> tuple[Array, Array]:
        beta = theta[1]
        return jnp.maximum(y - jnp.maximum(beta, 0), 0), y + jnp.maximum(-beta, 0)


RIDGE, DISTANCE = _Ridge(), _Distance()


class Planar(distrax.Bijector):
    """y = x + u tanh(w^T x + b), where w^T u > -1.

        log |det J| = log(1 + w^T u (1 - tanh^2(w^T x + b)))

    The part of u along w is moved to where the map is invertible, and 0 stays 0. The inverse is a
    root of one equation for w^T x.

    Args:
        w: of shape [..., D].
        u: of shape [..., D]; any numbers.
        b: of shape [...].

    Source: Rezende, Mohamed, "Variational Inference with Normalizing Flows", 2015.
    """

    def __init__(self, w: Array, u: Array, b: Array):
        super().__init__(event_ndims_in=1)
        square, along = (w * w).sum(-1), (w * u).sum(-1)
        # Where w is 0, so is the part of u along it.
        safe = jnp.where(square > 0, square, 1)
        self._slope = jnp.where(square > 0, positive(along) - 1, 0 * square)
        self._w, self._b = w, b
        self._u = u + ((self._slope - along) / safe)[..., None] * w

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        self._check_forward_input_shape(x)
        along = (self._w * x).sum(-1)
        h = jnp.tanh(along + self._b)
        return x + self._u * h[..., None], jnp.log1p(self._slope * (1 - h * h))

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        self._check_inverse_input_shape(y)
        theta = (self._slope, jnp.ones_like(self._b), self._b)
        h = jnp.tanh(root(RIDGE, theta, (self._w * y).sum(-1)) + self._b)
        return y - self._u * h[..., None], -jnp.log1p(self._slope * (1 - h * h))

    def same_as(self, other: distrax.Bijector) -> bool:
        return self is other


class Radial(distrax.Bijector):
    """y = x + beta (x - c) / (alpha + r), with r = |x - c| and beta > -alpha.

        log |det J| = (D - 1) log(1 + beta / (alpha + r)) + log(1 + alpha beta / (alpha + r)^2)

    Raw numbers 0 are alpha = 1 and beta = 0. The inverse is a root of one equation for r.

    Args:
        center: c, of shape [..., D].
        alpha: the raw alpha, of shape [...].
        beta: the raw beta, of shape [...].

    Source: Rezende, Mohamed, "Variational Inference with Normalizing Flows", 2015.
    """

    def __init__(self, center: Array, alpha: Array, beta: Array):
        super().__init__(event_ndims_in=1)
        self._center, self._alpha = center, positive(alpha)
        self._beta = self._alpha * (positive(beta) - 1)

    def _log_det(self, r: Array) -> Array:
        ratio = self._beta / (self._alpha + r)
        count = self._center.shape[-1] - 1
        return count * jnp.log1p(ratio) + jnp.log1p(ratio * self._alpha / (self._alpha + r))

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        self._check_forward_input_shape(x)
        away = x - self._center
        r = _length(away)
        return x + (self._beta / (self._alpha + r))[..., None] * away, self._log_det(r)

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        self._check_inverse_input_shape(y)
        away = y - self._center
        r = root(DISTANCE, (self._alpha, self._beta), _length(away))
        scale = 1 + self._beta / (self._alpha + r)
        return self._center + away / scale[..., None], -self._log_det(r)

    def same_as(self, other: distrax.Bijector) -> bool:
        return self is other


def _length(x: Array) -> Array:
    """The Euclidean norm, whose gradient at 0 is 0."""
    square = (x * x).sum(-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), square)


class Sylvester(distrax.Bijector):
    """y = x + Q R tanh(S Q^T x + b), with Q of orthonormal columns, R and S upper triangular.

        log |det J| = sum_i log(1 + R_ii S_ii (1 - tanh^2(S Q^T x + b)_i))

    The raw diagonal of R is moved so that R_ii S_ii > -1, and R = 0 is the identity. The inverse
    solves a triangular system for Q^T x: M roots, from the last to the first.

    Args:
        basis: Q, of shape [..., D, M].
        outer: R, of shape [..., M, M], of which the upper triangle counts.
        inner: S, in the same way, added to the identity; its diagonal is made positive.
        bias: b, of shape [..., M].

    Source: van den Berg, Hasenclever, Tomczak, Welling, "Sylvester Normalizing Flows for
    Variational Inference", 2018.
    """

    def __init__(self, basis: Array, outer: Array, inner: Array, bias: Array):
        super().__init__(event_ndims_in=1)
        eye = jnp.eye(outer.shape[-1], dtype=outer.dtype)
        diagonal = positive(_diagonal(inner))
        self._inner = jnp.triu(inner, 1) + eye * diagonal[..., None, :]
        self._slopes = positive(_diagonal(outer)) - 1
        self._outer = jnp.triu(outer, 1) + eye * (self._slopes / diagonal)[..., None, :]
        self._basis, self._bias = basis, bias

    def _push(self, v: Array) -> tuple[Array, Array]:
        """What is added to x where Q^T x is v, and the log-determinant."""
        h = jnp.tanh(_times(self._inner, v) + self._bias)
        log_det = jnp.log1p(self._slopes * (1 - h * h)).sum(-1)
        return _times(self._basis, _times(self._outer, h)), log_det

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        self._check_forward_input_shape(x)
        added, log_det = self._push(_times(jnp.swapaxes(self._basis, -1, -2), x))
        return x + added, log_det

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        self._check_inverse_input_shape(y)
        target = _times(jnp.swapaxes(self._basis, -1, -2), y)
        shape = jnp.broadcast_shapes(target.shape, self._bias.shape)
        target = jnp.broadcast_to(target, shape)

        def step(state: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], None]:
            v, h = state
            row = lambda matrix: jnp.take(matrix, i, axis=-2)  # noqa: E731
            of = lambda vector: jnp.take(vector, i, axis=-1)  # noqa: E731
            # Of v and h just those after i are there yet; the others are 0.
            inside = of(self._bias) + (row(self._inner) * v).sum(-1)
            rest = of(target) - (row(self._outer) * h).sum(-1)
            theta = of(row(self._outer)), of(row(self._inner)), inside
            new = root(RIDGE, theta, rest)
            place = jnp.arange(shape[-1]) == i
            v = jnp.where(place, new[..., None], v)
            return (v, jnp.where(place, jnp.tanh(theta[1] * new + inside)[..., None], h)), None

        zeros = jnp.zeros(shape, jnp.result_type(target, self._bias))
        (v, _), _ = jax.lax.scan(step, (zeros, zeros), jnp.arange(shape[-1])[::-1])
        added, log_det = self._push(v)
        return y - added, -log_det

    def same_as(self, other: distrax.Bijector) -> bool:
        return self is other


def _diagonal(matrix: Array) -> Array:
    return jnp.diagonal(matrix, axis1=-2, axis2=-1)


def _times(matrix: Array, vector: Array) -> Array:
    return jnp.einsum("...ij,...j->...i", matrix, vector)
