"""The map from standardised reals to the data's own units and support."""

import distrax
import jax.numpy as jnp

from flowvi._tfp import tfb
from flowvi.params import Array


class Units(distrax.Bijector):
    """Elementwise y = support(shift + scale * x).

    With bounds, the support map of a coordinate with v = shift + scale * x is

        y = v                                     where both bounds are infinite
        y = lower + exp(v)                        where only `lower` is finite
        y = upper - exp(v)                        where only `upper` is finite
        y = lower + (upper - lower) sigmoid(v)    where both are

    and results stay strictly between the bounds in floating point too. All arrays have the shape of
    an event; scales are positive, and bounds are infinite where there are none, or both None.
    """

    def __init__(
        self, shift: Array, scale: Array, lower: Array | None = None, upper: Array | None = None
    ):
        self._shift, self._scale = shift, scale
        self._bounds = None if lower is None or upper is None else (lower, upper)
        super().__init__(event_ndims_in=jnp.ndim(shift), is_constant_jacobian=self._bounds is None)

    def __repr__(self) -> str:
        bounded = "" if self._bounds is None else ", bounded"
        return f"Units(event_shape={jnp.shape(self._shift)}{bounded})"

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        self._check_forward_input_shape(x)
        shift, scale = self._rows(x)
        y = shift + scale * x
        log_det = jnp.broadcast_to(jnp.log(self._scale), y.shape)
        if self._bounds is not None:
            v = y
            for where, support in _supports(*self._bounds):
                # The untaken branch must stay finite, or its gradient turns into NaN.
                safe = jnp.where(where, v, 0)
                y = jnp.where(where, support.forward(safe), y)
                log_det += jnp.where(where, support.forward_log_det_jacobian(safe, 0), 0)
            y = jnp.clip(y, *_open_ends(*self._bounds, y.dtype))
        return y, log_det.sum(tuple(range(-self.event_ndims_in, 0)))

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        self._check_inverse_input_shape(y)
        v = jnp.asarray(y)
        log_det = jnp.broadcast_to(-jnp.log(self._scale), v.shape)
        if self._bounds is not None:
            lower, upper = self._bounds
            outside = (y <= lower) | (y >= upper)
            for where, support in _supports(lower, upper):
                safe = jnp.where(where & ~outside, y, support.forward(jnp.zeros_like(v)))
                v = jnp.where(where, support.inverse(safe), v)
                log_det += jnp.where(where, support.inverse_log_det_jacobian(safe, 0), 0)
            log_det = jnp.where(outside, -jnp.inf, log_det)  # The density there is zero.
        shift, scale = self._rows(v)
        return (v - shift) / scale, log_det.sum(tuple(range(-self.event_ndims_in, 0)))

    def _rows(self, x: Array) -> tuple[Array, Array]:
        """Shift and scale with as many axes as x."""
        lead = tuple(range(jnp.ndim(x) - self.event_ndims_in))
        return jnp.expand_dims(self._shift, lead), jnp.expand_dims(self._scale, lead)


def _supports(lower: Array, upper: Array) -> list[tuple[Array, tfb.Bijector]]:
    """Each kind of bounded support: where it holds, and its map from the reals."""
    has_lower, has_upper = jnp.isfinite(lower), jnp.isfinite(upper)
    both = has_lower & has_upper
    # Where a kind does not hold its bounds may be anything that keeps its map finite.
    low, high = jnp.where(has_lower, lower, 0), jnp.where(has_upper, upper, 0)
    interval = tfb.Sigmoid(jnp.where(both, low, 0), jnp.where(both, high, 1))
    above = tfb.Chain([tfb.Shift(low), tfb.Exp()])
    below = tfb.Chain([tfb.Shift(high), tfb.Scale(jnp.full_like(high, -1)), tfb.Exp()])
    return [(has_lower & ~has_upper, above), (has_upper & ~has_lower, below), (both, interval)]


def _open_ends(lower: Array, upper: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    """The smallest and the largest number inside the bounds.

    Rounding reaches a bound, or infinity, long before the real line ends. Beside a bound of zero
    that number is the smallest normal one, for processors flush smaller ones to zero.
    """
    lower, upper = jnp.asarray(lower, dtype), jnp.asarray(upper, dtype)
    tiny = jnp.finfo(dtype).tiny
    first = jnp.where(lower == 0, tiny, jnp.nextafter(lower, upper))
    last = jnp.where(upper == 0, -tiny, jnp.nextafter(upper, lower))
    return first, last
