"""The coupling bijector: half of the coordinates move, by a map that depends on the other half."""

import distrax
import jax
import jax.numpy as jnp

from flowvi import checks
from flowvi.bijectors.autoregressive import ConditionerFn, TransformerFn, checked_theta
from flowvi.params import Array


class Coupling(distrax.Bijector):
    """Every other coordinate moves by a scalar map, whose parameters depend on those that stay.

        y_i = t(x_i; theta_i(x_stay)) where i moves,  y_i = x_i where it stays
        log |det J(x)| = sum over i that move of log |dt/dx (x_i; theta_i)|

    One pass of the conditioner in both directions. It sees, and gives parameters to, H = ceil(D /
    2) coordinates, so nothing is computed for what stays: where D is odd, and it is the smaller
    half, H holds a zero more.

    Args:
        conditioner: a callable from x_stay of shape [..., H] to theta of shape [..., H, P].
        transformer: a callable from theta of shape [..., P] to a scalar bijector, such as
            `flowvi.transformers.Affine()` or `Spline()`.
        event_size: D.
        odd: whether x_1, x_3, .. move; otherwise x_0, x_2, .. do. It may be traced.

    Source: Dinh, Sohl-Dickstein, Bengio, "Density Estimation using Real NVP", 2017.
    """

    def __init__(
        self,
        conditioner: ConditionerFn,
        transformer: TransformerFn,
        *,
        event_size: int,
        odd: Array | bool = False,
    ):
        self._conditioner, self._transformer = conditioner, transformer
        self._event_size, self._odd = event_size, odd
        super().__init__(event_ndims_in=1)

    def __repr__(self) -> str:
        parts = checks.shown(self._conditioner), checks.shown(self._transformer)
        return f"Coupling({', '.join(parts)}, event_size={self._event_size})"

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        self._check_forward_input_shape(x)
        moves, stays = self._split(x)
        moved, log_det = self._transformer(self._theta(stays)).forward_and_log_det(moves)
        return self._join(moved, stays), self._total(log_det)

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        self._check_inverse_input_shape(y)
        moved, stays = self._split(y, "y")
        moves, log_det = self._transformer(self._theta(stays)).inverse_and_log_det(moved)
        return self._join(moves, stays), self._total(log_det)

    def forward_with_score(self, x: Array, score: Array) -> tuple[Array, Array, Array]:
        # The Jacobian is triangular in two blocks, one diagonal and one the identity: the score of
        # what moved comes from slopes of t, that of what stays from one pass backwards.
        self._check_forward_input_shape(x)
        moves, stays = self._split(x)
        batch = jax.eval_shape(self._theta, stays).shape[:-2]
        moves, stays = (jnp.broadcast_to(part, (*batch, part.shape[-1])) for part in (moves, stays))
        theta, pull = jax.vjp(self._theta, stays)

        def transform(theta: Array, moves: Array) -> tuple[Array, Array]:
            return self._transformer(theta).forward_and_log_det(moves)

        moved, log_det = transform(theta, moves)
        _, slopes = jax.vjp(transform, *jax.lax.stop_gradient((theta, moves)))
        counts = jnp.broadcast_to(self._counts(), log_det.shape).astype(log_det.dtype)
        t_theta, t_x = slopes((jnp.ones_like(moved), jnp.zeros_like(log_det)))
        g_theta, g_x = slopes((jnp.zeros_like(moved), counts))
        score_moves, score_stays = self._split(score, "score")
        score_moved = (score_moves - g_x) / t_x
        (through,) = pull((t_theta * score_moved[..., None] + g_theta).astype(theta.dtype))
        new = self._join(score_moved, score_stays - through)
        return self._join(moved, stays), self._total(log_det), jax.lax.stop_gradient(new)

    def same_as(self, other: distrax.Bijector) -> bool:
        return (
            isinstance(other, Coupling)
            and self._conditioner is other._conditioner
            and self._transformer == other._transformer
            and self._odd is other._odd
        )

    def _theta(self, stays: Array) -> Array:
        return checked_theta(self._conditioner, self._transformer, stays)

    def _split(self, x: Array, name: str = "x") -> tuple[Array, Array]:
        """What moves and what stays, each of shape [..., H]."""
        x = jnp.asarray(x)
        checks.trailing_shape(name, x, (self._event_size,), self.name)
        if self._event_size % 2:
            x = jnp.concatenate([x, jnp.zeros_like(x[..., :1])], -1)
        even, odd = x[..., ::2], x[..., 1::2]
        return jnp.where(self._odd, odd, even), jnp.where(self._odd, even, odd)

    def _join(self, moved: Array, stays: Array) -> Array:
        """The two halves as one array of shape [..., D]."""
        even, odd = jnp.where(self._odd, stays, moved), jnp.where(self._odd, moved, stays)
        pairs = jnp.stack([even, odd], -1)
        return pairs.reshape(*pairs.shape[:-2], 2 * pairs.shape[-2])[..., : self._event_size]

    def _counts(self) -> Array:
        """Which of the H numbers of what moves are coordinates: the last may be a zero more."""
        half = (self._event_size + 1) // 2
        return jnp.arange(half) < jnp.where(self._odd, self._event_size // 2, half)

    def _total(self, log_det: Array) -> Array:
        return jnp.where(jnp.broadcast_to(self._counts(), log_det.shape), log_det, 0).sum(-1)
