"""The losses that `fit_posterior` minimises where `fv.objectives.ELBO` is not enough."""

import dataclasses

import jax
import jax.numpy as jnp

from flowvi import checks
from flowvi.distributions import FlowDistribution, along
from flowvi.objectives.likelihood import cross_entropy
from flowvi.objectives.variational import Loss, Params, Step, Variational, with_gradient
from flowvi.params import Array, Fixed

#: The part of a tempered fit in which the temperature falls to 1.
COOLING = 0.3

#: The weight of the forward divergence, were all draws effective.
FORWARD = 10.0


@dataclasses.dataclass(frozen=True)
class WideELBO(Variational):
    """Minus the evidence lower bound of a flow, whose gradient is taken at wider draws.

    The path gradient vanishes draw by draw where q is the posterior, of whatever distribution the
    draws are, and those of q are hardly ever in its tails. For x of the base and y = f(width x) it
    is the mean of d/dy [log q(y) - log p(y)] dy. The value is that of the ELBO: at the same draws,
    with the self-normalised weights base(width x) / base(x).
    """

    width: float = dataclasses.field(default=1.3, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_reparameterized()
        checks.require(self.width >= 1, "`width` must be at least 1", self.width)

    def _loss(self, step: Step) -> Loss:
        q, batch = step.q.distribution, step.batch
        checks.require(isinstance(q, FlowDistribution), "`family` must be a flow", self.family)
        x = q.sample_root(step.key, (self.num_samples,))
        z, log_q, score = q.push_with_score(self.width * x)
        z = self._guarded(z)
        log_joint, new = step.density(self.log_joint, z)
        losses = jax.lax.stop_gradient(log_q) + along(z, score, 1) - log_joint
        good, metrics = self._good(losses)
        tilt = q.root.log_prob(self.width * x) - q.root.log_prob(x)
        if good is not None:
            tilt = jnp.where(good, tilt, -jnp.inf)
        shares = jax.nn.softmax(tilt, axis=0).astype(losses.dtype)
        rows = jnp.sum(jnp.where(shares == 0, 0, shares * losses), axis=0)
        loss = with_gradient(self._mean(rows, None, batch), self._mean(losses, good, batch))
        return loss, metrics, new


@dataclasses.dataclass(frozen=True)
class Tempered(Variational):
    """KL(q || p^b) + 10 e KL(p || q), for e the effective sample size as a part of the draws.

    The power b rises from `power` to 1 in the first 0.3 of the steps: while it is small the modes
    are bridged, and q covers all that its start covers. The gradient of the first divergence hardly
    sees the weights of modes that no draw connects; that of the second does, by self-normalised
    weights. While those are a few draws' alone it would undo what is found, and has next to no
    part. Both gradients come from the same draws, and lose their noise at q = p.
    """

    power: float = dataclasses.field(default=0.1, kw_only=True)
    num_steps: int = dataclasses.field(default=1000, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_reparameterized()
        checks.require(0 < self.power <= 1, "`power` must be above 0 and at most 1", self.power)
        checks.positive_int("num_steps", self.num_steps)

    def init(self, key: Array) -> Params:
        """{"posterior": ..., "control": Fixed(steps done)}."""
        return {**super().init(key), "control": Fixed(jnp.zeros((), jnp.int32))}

    def _loss(self, step: Step) -> Loss:
        done = step.params["control"].value
        power = self.power ** (1 - jnp.minimum(done / self.num_steps / COOLING, 1))
        z, log_q, score = step.q.distribution.sample_with_score(step.key, (self.num_samples,))
        z = self._guarded(z)
        log_joint, new = step.density(self.log_joint, z)
        log_weights = jax.lax.stop_gradient(log_joint - log_q)
        good, metrics = self._good(log_weights)
        path = jax.lax.stop_gradient(log_q) + along(z, score, 1)
        elbo = self._mean(power * log_joint - path, good, step.batch)
        if good is not None:
            log_weights = jnp.where(good, log_weights, -jnp.inf)
        effective = 1 / (self.num_samples * jnp.sum(jnp.square(jax.nn.softmax(log_weights))))
        forward = FORWARD * effective * cross_entropy(log_weights, log_q, own=True)
        # The value stays that of the first divergence, on which progress is judged.
        loss = with_gradient(-elbo, forward - elbo)
        return loss, metrics, {**new, "control": Fixed(done + 1)}
