"""A triangular map along parabolas, whose scales depend on other coordinates too."""

import distrax
import jax
import jax.numpy as jnp

from flowvi.params import Array

#: The bound on log-scales, in nats.
MOST_LOG_SCALE = 30.0


class Curved(distrax.Bijector):
    """y_i = m_i + sum_j L_ij y_j + sum_jk Q_ijk y_j y_k + exp(s_i + sum_j S_ij y_j) x_i.

    The sums are over coordinates that stand before i in some order. `inverse` is one pass, and
    `forward` walks over the coordinates, at about the same cost.

    Args:
        order: a permutation of the coordinates: the first one depends on none.
        loc: m, of shape [D].
        linear: L, of shape [D, D], zero where j does not stand before i.
        log_scale: s, of shape [D]; the whole logarithm is bounded by 30.
        log_slope: S, as L.
        quadratic: Q, of shape [D, D, D], as L.

    Source: Parno, Marzouk, "Transport Map Accelerated Markov Chain Monte Carlo", 2018.
    """

    def __init__(
        self,
        order: Array,
        loc: Array,
        linear: Array,
        log_scale: Array,
        log_slope: Array,
        quadratic: Array,
    ):
        super().__init__(event_ndims_in=1)
        self.order, self.loc, self.linear = order, loc, linear
        self.log_scale, self.log_slope, self.quadratic = log_scale, log_slope, quadratic

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        self._check_forward_input_shape(x)

        def step(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], None]:
            y, log_det = carry
            shift = self.loc[i] + y @ self.linear[i]
            shift = shift + jnp.sum((y @ self.quadratic[i]) * y, -1)
            log_scale = _bounded(self.log_scale[i] + y @ self.log_slope[i])
            new = shift + jnp.exp(log_scale) * jnp.take(x, i, axis=-1)
            return (y.at[..., i].set(new), log_det + log_scale), None

        begin = jnp.zeros_like(x), jnp.zeros(x.shape[:-1], x.dtype)
        return jax.lax.scan(step, begin, self.order)[0]

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        self._check_inverse_input_shape(y)
        shift = self.loc + y @ self.linear.T
        shift = shift + jnp.einsum("...j,...k,ijk->...i", y, y, self.quadratic)
        log_scale = _bounded(self.log_scale + y @ self.log_slope.T)
        return (y - shift) * jnp.exp(-log_scale), -jnp.sum(log_scale, -1)

    def same_as(self, other: distrax.Bijector) -> bool:
        return self is other


def _bounded(log_scale: Array) -> Array:
    return jnp.clip(log_scale, -MOST_LOG_SCALE, MOST_LOG_SCALE)
