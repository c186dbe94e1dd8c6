"""A map of each coordinate between a normal marginal and that of data, tails included."""

import distrax
import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr, ndtri
from jax.scipy.stats import norm

Array = jax.Array


class Marginal(distrax.Bijector):
    """x_i = Q_i(z_i): a monotone spline between knots, and a tail on each side of them.

    Between its knots each coordinate is a rational quadratic spline. Outside, with s the slope
    dz/dx at the last knot (x_K, z_K), t = Phi(-|z_K|) and u = |x - x_K|, the tail is one of

        normal:   z = z_K + s (x - x_K)
        Pareto:   Phi(-|z|) = t (1 + shape u / sigma)^(-1 / shape),       sigma = t / (s phi(z_K))
        bounded:  Phi(-|z|) = t (|x - bound| / |x_K - bound|)^alpha,

    where alpha = s phi(z_K) |x_K - bound| / t makes the density continuous, as sigma does. So a
    standard normal z gives x tails that fall like a normal's, like the power -1 - 1 / shape, or
    like a power of the distance to a bound.

    Args:
        x: knots of shape [D, K + 1], increasing.
        z: their images, likewise; negative at the first knot, positive at the last one.
        slope: dz/dx at the knots, positive.
        shape: of shape [D, 2], of the lower and the upper tail: positive, or 0 for a normal one.
        bound: of shape [D, 2]: finite where a tail is bounded.

    Source: Durkan, Bekasov, Murray, Papamakarios, "Neural Spline Flows", 2019, for the spline;
    McNeil, Frey, "Estimation of Tail-Related Risk Measures", 2000, for Pareto tails on a body.
    """

    def __init__(self, x: Array, z: Array, slope: Array, shape: Array, bound: Array):
        self._x, self._z, self._slope, self._shape, self._bound = x, z, slope, shape, bound
        super().__init__(event_ndims_in=1)

    def __repr__(self) -> str:
        size, knots = jnp.shape(self._x)
        return f"Marginal(event_size={size}, num_knots={knots})"

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        self._check_forward_input_shape(x)
        z, (low, high) = x, (self._z[:, 0], self._z[:, -1])
        result, log_slope = self._body(jnp.clip(z, low, high), self._z, self._x)
        for side in (0, 1):
            outside, tail = z < low if side == 0 else z > high, self._tail(side)
            value, log_det = tail.forward(jnp.where(outside, z, tail.z))
            result = jnp.where(outside, value, result)
            log_slope = jnp.where(outside, -log_det, log_slope)
        return result, jnp.sum(-log_slope, -1)

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        self._check_inverse_input_shape(y)
        x, (low, high) = jnp.asarray(y), (self._x[:, 0], self._x[:, -1])
        result, log_slope = self._body(jnp.clip(x, low, high), self._x, self._z)
        for side in (0, 1):
            outside, tail = x < low if side == 0 else x > high, self._tail(side)
            value, log_det = tail.inverse(jnp.where(outside, x, tail.x))
            result = jnp.where(outside, value, result)
            log_slope = jnp.where(outside, log_det, log_slope)
        return result, jnp.sum(log_slope, -1)

    def _tail(self, side: int) -> "_Tail":
        place = -side
        x, z, slope = (each[:, place] for each in (self._x, self._z, self._slope))
        return _Tail(2 * side - 1, x, z, slope, self._shape[:, side], self._bound[:, side])

    def _body(self, value: Array, own: Array, other: Array) -> tuple[Array, Array]:
        """The image of values on the side `own` of the knots, and log dz/dx there."""
        last = own.shape[-1] - 2
        bin_ = jnp.clip(jnp.sum(value[..., None] >= own, -1) - 1, 0, last)

        def at(table: Array, place: Array) -> Array:
            table = jnp.broadcast_to(table, (*value.shape, table.shape[-1]))
            return jnp.take_along_axis(table, place[..., None], -1)[..., 0]

        x_0, x_1, z_0, z_1, d_0, d_1 = (
            at(table, bin_ + i) for table in (self._x, self._z, self._slope) for i in (0, 1)
        )
        w, h = x_1 - x_0, z_1 - z_0
        s = h / w
        if own is self._x:
            part = jnp.clip((value - x_0) / w, 0, 1)
        else:
            y = jnp.clip((value - z_0) / h, 0, 1)
            b, c = d_0 - (d_0 + d_1 - 2 * s) * y, s * y
            root = jnp.sqrt(jnp.maximum(b * b + 4 * (s - b) * c, 0))
            # Of the two forms of the root the one that does not cancel.
            plus = b >= 0
            part = jnp.where(plus, 2 * c, root - b) / jnp.where(plus, b + root, 2 * (s - b))
            part = jnp.clip(part, 0, 1)
        both = part * (1 - part)
        ratio = s / (s + (d_0 + d_1 - 2 * s) * both)
        slope = d_1 * part * part + 2 * s * both + d_0 * (1 - part) ** 2
        log_slope = jnp.log(slope * ratio * ratio)
        if own is self._x:
            return z_0 + h * ratio * (part * part + d_0 / s * both), log_slope
        return x_0 + w * part, log_slope


class _Tail:
    """One tail, whose sign is -1 for the lower and 1 for the upper one, of all coordinates."""

    def __init__(self, sign: int, x: Array, z: Array, slope: Array, shape: Array, bound: Array):
        self.sign, self.x, self.z, self.slope = sign, x, z, slope
        self.is_pareto, self.is_bounded = shape > 0, jnp.isfinite(bound)
        self.shape = jnp.where(self.is_pareto, shape, 1)
        self.bound = jnp.where(self.is_bounded, bound, x + sign)
        self.log_mass = log_ndtr(-sign * z)
        # The density at the knot over the mass beyond it.
        self.rate = jnp.exp(jnp.log(slope) + norm.logpdf(z) - self.log_mass)
        self.alpha = self.rate * jnp.abs(x - self.bound)

    def inverse(self, x: Array) -> tuple[Array, Array]:
        """(z, log dz/dx) of points beyond the knot."""
        excess = self.shape * self.rate * self.sign * (x - self.x)
        grown = jnp.log1p(jnp.maximum(excess, 0))
        # Nothing beyond a bound has a density.
        beyond = self.is_bounded & (self.sign * (x - self.bound) >= 0)
        left = jnp.where(beyond, 1, (x - self.bound) / (self.x - self.bound))
        left = jnp.log(jnp.where(self.is_bounded, left, 1))
        log_part = jnp.where(self.is_bounded, self.alpha * left, -grown / self.shape)
        log_slope = jnp.where(self.is_bounded, log_part - left, -grown + log_part)
        least = jnp.log(jnp.finfo(x.dtype).tiny)
        z = -self.sign * ndtri(jnp.exp(jnp.maximum(log_part + self.log_mass, least)))
        log_slope = log_slope + jnp.log(self.rate) + self.log_mass - norm.logpdf(z)
        is_normal = ~self.is_pareto & ~self.is_bounded
        z = jnp.where(is_normal, self.z + self.slope * (x - self.x), z)
        log_slope = jnp.where(is_normal, jnp.log(self.slope), log_slope)
        return z, jnp.where(beyond, -jnp.inf, log_slope)

    def forward(self, z: Array) -> tuple[Array, Array]:
        """(x, log dx/dz) of points beyond the knot."""
        log_part = jnp.minimum(log_ndtr(-self.sign * z) - self.log_mass, 0)
        grown = -self.shape * log_part
        pareto = self.x + self.sign * jnp.expm1(grown) / (self.shape * self.rate)
        left = log_part / self.alpha
        bounded = self.bound + (self.x - self.bound) * jnp.exp(left)
        x = jnp.where(self.is_bounded, bounded, pareto)
        log_slope = jnp.where(self.is_bounded, log_part - left, log_part - grown)
        log_slope = log_slope + jnp.log(self.rate) + self.log_mass - norm.logpdf(z)
        is_normal = ~self.is_pareto & ~self.is_bounded
        x = jnp.where(is_normal, self.x + (z - self.z) / self.slope, x)
        x = jnp.where(self.is_bounded, self._inside(x), x)
        return x, -jnp.where(is_normal, jnp.log(self.slope), log_slope)

    def _inside(self, x: Array) -> Array:
        """Rounding reaches a bound long before the real line ends."""
        towards = jnp.nextafter(self.bound, self.x)
        # Processors flush numbers smaller than this to zero.
        tiny = -self.sign * jnp.finfo(x.dtype).tiny
        towards = jnp.where(self.bound == 0, tiny, towards).astype(x.dtype)
        return jnp.maximum(x, towards) if self.sign < 0 else jnp.minimum(x, towards)
