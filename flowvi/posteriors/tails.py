"""What is done for the tails, which the ELBO hardly sees and importance weights depend on."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flowvi.distributions import FlowDistribution, along
from flowvi.families import Whitened
from flowvi.objectives.variational import Variational, evaluate, finish, with_gradient
from flowvi.posteriors.diagnosis import diagnose
from flowvi.posteriors.posterior import NUM_DIAGNOSIS, draws
from flowvi.posteriors.target import Target

#: Draws are spread where k-hat, which has noise of 0.1 and more, is above this.
HEAVY = 0.3

#: By one of these factors.
FACTORS = (1.003, 1.01, 1.02, 1.03, 1.04)

#: For so many nats at most.
MOST_COST = 5e-3

#: A k-hat is smaller than another, from the same draws, if it is by this.
KHAT_NOISE = 0.05


@dataclasses.dataclass(frozen=True)
class WideELBO(Variational):
    """Minus the evidence lower bound of a flow, whose gradient is taken at wider draws.

    The path gradient vanishes draw by draw where q equals the posterior, of whatever distribution
    the draws are. Those of q itself are hardly ever in its tails. Here x is drawn from the base and
    y = f(width x), and the gradient is the mean of

        d/dy [log q(y) - log p(y)] dy

    so the tails are fitted with the rest. The value is that of the ELBO: at the same draws, with
    the self-normalised weights base(width x) / base(x).

    Attributes:
        width: how many times as wide as its base the draws are; of `ELBO` with `path` it is 1.
    """

    width: float = dataclasses.field(default=1.3, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_reparameterized("fv.objectives.ScoreFunction")
        if not self.width >= 1:
            raise ValueError(f"`width` must be at least 1; got {self.width!r}.")

    def __call__(self, params: Any, key: jax.Array, batch: Any) -> Any:
        """The loss, with metrics where there are any."""
        train_key, draw_key, model_key = jax.random.split(key, 3)
        approximation = self._approximation(params, train_key, batch)
        q = approximation.distribution
        if not isinstance(q, FlowDistribution):
            raise ValueError(f"`family` must be a flow; got {self.family!r}.")
        x = q.sample_root(draw_key, (self.num_samples,))
        z, log_q, score = q.push_with_score(self.width * x)
        z = self._guarded(z)
        log_joint, new = evaluate(self.log_joint, params, model_key, z, batch)
        path = jax.lax.stop_gradient(log_q) + along(z, score, len(self.family.event_shape))
        losses = path - log_joint
        good, metrics = self._good(losses)
        tilt = q.root.log_prob(self.width * x) - q.root.log_prob(x)
        if good is not None:
            tilt = jnp.where(good, tilt, -jnp.inf)
        shares = jax.nn.softmax(tilt, axis=0).astype(losses.dtype)
        rows = jnp.sum(jnp.where(shares == 0, 0, shares * losses), axis=0)
        loss = with_gradient(self._mean(rows, None, batch), self._mean(losses, good, batch))
        return finish(loss, metrics, params, {**approximation.new, **new})


def widened(family: Whitened, target: Target, params: Any, key: jax.Array) -> Any:
    """The parameters, spread a little where the largest importance weights have a heavy tail.

    The best fit by ELBO is as often too narrow as too wide in each of its tails, and weights grow
    without bound where it is too narrow. With a base 1 + e times as wide, at the price of about
    D e^2 nats, the largest weights move to the middle. The first factor that brings k-hat below its
    bound is taken. Where none does, the one that makes it smallest is, if by more than its noise.

    Args:
        family: the family.
        target: the target.
        params: the parameters of a fit.
        key: the key of the draws, the same ones for each factor.
    """
    seen: list[tuple[float, Any]] = []
    elbo = float("-inf")
    for factor in (1.0, *FACTORS):
        wide = params if factor == 1.0 else family.widen(params, factor)
        found = diagnose(draws(family, target, wide, key, NUM_DIAGNOSIS)[2])
        elbo = max(elbo, found.elbo.value)
        if found.lost > 0 or elbo - found.elbo.value > MOST_COST:
            break
        seen.append((found.khat, wide))
        if found.khat <= HEAVY:
            return wide
    if not seen:
        return params
    least, wide = min(seen, key=lambda each: each[0])
    return wide if least < seen[0][0] - KHAT_NOISE else params
