"""A scalar bijector whose tails are lighter or heavier than the identity's, side by side."""

from collections.abc import Callable

import distrax
import jax
import jax.numpy as jnp

Array = jax.Array


class PowerTails(distrax.Bijector):
    """The identity on [-I, I], and outside of it a power and an exponential.

    With r = |x| / I, and the side's own p and s,

        |y| = I + (exp(s I h) - 1) / (s I),   h = I (r^p - 1) / p

    The map and its slope are continuous. A standard normal x gets tails of y that are normal for
    p = 1 and s = 0, exponential for p = 2 and s = 0, and a power law of density |y|^(-1 - 1 / s)
    for p = 2; lighter than normal ones for p < 1.

    Args:
        interval: I.
        log_power: log p of the lower and of the upper side, which broadcast against x.
        shape: s of the lower and of the upper side, not negative, in the same way.

    Source: Hickling, Prangle, "Flexible Tails for Normalizing Flows", 2024, for power laws; Box,
    Cox, "An Analysis of Transformations", 1964, for p.
    """

    def __init__(self, interval: float, log_power: tuple[Array, Array], shape: tuple[Array, Array]):
        super().__init__(event_ndims_in=0)
        self._interval, self._log_power, self._shape = interval, log_power, shape

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        outside, size, log_power, shape = self._side(x)
        power, scale = jnp.exp(log_power), shape * self._interval
        log_r = jnp.log(size / self._interval)
        # Beyond this the image overflows, as it does in the tail of any heavy distribution.
        h = self._interval * _quotient(jnp.expm1, power, log_r)
        excess = _quotient(jnp.expm1, scale, h)
        y = jnp.sign(x) * (self._interval + excess)
        log_det = (power - 1) * log_r + scale * h
        return jnp.where(outside, y, x + 0 * y), jnp.where(outside, log_det, 0 * log_det)

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        outside, size, log_power, shape = self._side(y)
        power, scale = jnp.exp(log_power), shape * self._interval
        h = _quotient(jnp.log1p, scale, size - self._interval)
        log_r = _quotient(jnp.log1p, power, h / self._interval)
        x = jnp.sign(y) * self._interval * jnp.exp(log_r)
        log_det = -(power - 1) * log_r - scale * h
        return jnp.where(outside, x, y + 0 * x), jnp.where(outside, log_det, 0 * log_det)

    def same_as(self, other: distrax.Bijector) -> bool:
        return self is other

    def _side(self, value: Array) -> tuple[Array, Array, Array, Array]:
        """Where a value lies outside of [-I, I], its size there, and the parameters of its side."""
        size = jnp.abs(value)
        outside = size > self._interval
        lower = value < 0
        log_power = jnp.where(lower, *self._log_power)
        shape = jnp.where(lower, *self._shape)
        # What lies inside must not reach the formulas: its gradient would be no number.
        return outside, jnp.where(outside, size, self._interval), log_power, shape


def _quotient(function: Callable[[Array], Array], factor: Array, value: Array) -> Array:
    """function(factor value) / factor, for expm1 and log1p, with the limit `value` at 0."""
    tiny = jnp.asarray(1e-8, value.dtype)
    small = factor < tiny
    safe = jnp.where(small, 1, factor)
    half = 0.5 if function is jnp.expm1 else -0.5
    series = value * (1 + half * factor * value)
    return jnp.where(small, series, function(safe * value) / safe)
