"""The monotone rational quadratic spline as a scalar bijector.

The bins are unrolled: every step of the computation is one elementwise operation on arrays of the
shape of x, which the compiler fuses and vectorises, whereas sums along a last axis of eight numbers
are slow on processors.
"""

import operator
from collections.abc import Callable, Sequence

import distrax
import jax
import jax.numpy as jnp

from flowvi.smooth import LEAST, UNIT

Array = jax.Array


class RationalQuadraticSpline(distrax.Bijector):
    """y = f(x), a rational quadratic spline on [-I, I] and the identity outside.

    On a bin of width w, height h and mean slope s = h / w, between knots of slopes d_0 and d_1,
    with z = (x - x_0) / w,

        y = y_0 + h (s z^2 + d_0 z (1 - z)) / (s + (d_0 + d_1 - 2 s) z (1 - z))

    Args:
        widths: K arrays of raw widths, that broadcast against x; a softmax makes them bins.
        heights: K arrays of raw heights, in the same way.
        slopes: K - 1 arrays of raw slopes at the inner knots; a softplus makes them positive, and
            zero is a slope of 1. No raw number may be large: exponentials are taken as they are.
        interval: I.
        ends: the raw slope at both ends of the interval, whose slope is 1 by default.

    Source: Durkan, Bekasov, Murray, Papamakarios, "Neural Spline Flows", 2019.
    """

    def __init__(
        self,
        widths: Sequence[Array],
        heights: Sequence[Array],
        slopes: Sequence[Array],
        interval: float,
        ends: Array | None = None,
    ):
        super().__init__(event_ndims_in=0)
        self._ends = ends
        self._widths, self._heights, self._slopes = list(widths), list(heights), list(slopes)
        self._interval = interval

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        outside, safe = self._outside(x)
        x_0, w, y_0, h, d_0, d_1 = self._bin(safe, self._widths)
        s, z = h / w, jnp.clip((safe - x_0) / w, 0, 1)
        both = z * (1 - z)
        y = y_0 + h * (s * z * z + d_0 * both) / (s + (d_0 + d_1 - 2 * s) * both)
        return _or_identity(outside, x, y, _log_slope(z, s, d_0, d_1))

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        outside, safe = self._outside(y)
        y_0, h, x_0, w, d_0, d_1 = self._bin(safe, self._heights)
        s, part = h / w, jnp.clip((safe - y_0) / h, 0, 1)
        # a z^2 + b z = c, and of the two forms of its root the one that does not cancel.
        b, c = d_0 - (d_0 + d_1 - 2 * s) * part, s * part
        a = s - b
        root = jnp.sqrt(jnp.maximum(b * b + 4 * a * c, jnp.finfo(c.dtype).tiny))
        plus = b >= 0
        z = jnp.where(plus, 2 * c, root - b) / jnp.where(plus, b + root, 2 * a)
        z = jnp.clip(z, 0, 1)
        return _or_identity(outside, y, x_0 + w * z, -_log_slope(z, s, d_0, d_1))

    def same_as(self, other: distrax.Bijector) -> bool:
        return (
            isinstance(other, RationalQuadraticSpline)
            and self._interval == other._interval
            and self._ends is other._ends
            and all(map(operator.is_, self._parameters(), other._parameters()))
        )

    def _parameters(self) -> list[Array]:
        return [*self._widths, *self._heights, *self._slopes]

    def _outside(self, value: Array) -> tuple[Array, Array]:
        """Where a value lies outside of the interval (NaN does not), and the value or 0 there."""
        outside = jnp.abs(value) >= self._interval
        # What lies outside must not reach the formulas: nothing times infinity is no number.
        return outside, jnp.where(outside, 0, value)

    def _bin(self, value: Array, side: Sequence[Array]) -> tuple[Array, ...]:
        """(start, size) of the bin that a value lies in, on its side and on the other; slopes."""
        other = self._heights if side is self._widths else self._widths
        size, other_size = self._sizes(side), self._sizes(other)
        start = other_start = jnp.asarray(-self._interval, value.dtype)
        ends = jnp.zeros((), value.dtype) if self._ends is None else self._ends
        slopes = [ends, *self._slopes, ends]
        found = [start, size(0), other_start, other_size(0), slopes[0], slopes[1]]
        for k in range(1, len(side)):
            start, other_start = start + size(k - 1), other_start + other_size(k - 1)
            here = [start, size(k), other_start, other_size(k), slopes[k], slopes[k + 1]]
            beyond = value >= start
            found = [jnp.where(beyond, a, b) for a, b in zip(here, found, strict=True)]
        return (*found[:4], _positive(found[4]), _positive(found[5]))

    def _sizes(self, raw: Sequence[Array]) -> Callable[[int], Array]:
        """Number of the bin -> its size."""
        exponentials = [jnp.exp(each) for each in raw]
        rest = 2 * self._interval - len(raw) * LEAST
        unit = rest / sum(exponentials[1:], exponentials[0])
        return lambda k: exponentials[k] * unit + LEAST


def _positive(raw: Array) -> Array:
    """`smooth.positive` of raw numbers that are not large, which is cheaper."""
    return jnp.log1p(jnp.exp(raw + UNIT)) + LEAST


def _log_slope(z: Array, s: Array, d_0: Array, d_1: Array) -> Array:
    """log f' at the place z of a bin."""
    both = z * (1 - z)
    slope = d_1 * z * z + 2 * s * both + d_0 * (1 - z) ** 2
    ratio = s / (s + (d_0 + d_1 - 2 * s) * both)
    return jnp.log(slope * ratio * ratio)


def _or_identity(outside: Array, x: Array, y: Array, log_det: Array) -> tuple[Array, Array]:
    """(y, log_det), and outside (x, 0): by products with 0, so that NaN parameters stay NaN."""
    return jnp.where(outside, x + 0 * y, y), jnp.where(outside, 0 * log_det, log_det)
