"""A fit that starts from a flattened density, so that no mode is left out."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flowvi import checks
from flowvi.distributions import along
from flowvi.objectives.forward import cross_entropy
from flowvi.objectives.variational import Variational, evaluate
from flowvi.params import Fixed

Array = jax.Array

#: The part of a fit in which the temperature falls to 1.
COOLING = 0.3

#: The weight of the forward divergence, were all draws effective.
FORWARD = 10.0


@dataclasses.dataclass(frozen=True)
class Tempered(Variational):
    """A loss for `fit` that sees all modes first and sets their weights right then.

    With e the effective sample size of the importance weights, as a part of the draws, it is

        KL(q || p^b) + 10 e KL(p || q)

    with path gradients of the first and self-normalised weights for the second. The power b rises
    from `power` to 1 in the first 0.3 of `num_steps` steps: while it is small the modes are
    bridged, and q covers all that its start covers. The gradient of the first divergence hardly
    sees the weights of modes that no draw connects; that of the second does. While its weights are
    a few draws' alone, it would undo what is found, and has next to no part; both of their
    gradients lose their noise at q = p.

    Both divergences come from the same draws of a flow: see `FlowDistribution.sample_with_score`.

    Attributes:
        power: the inverse temperature at the start, between 0 and 1.
        num_steps: the steps of the fit.
    """

    power: float = dataclasses.field(default=0.1, kw_only=True)
    num_steps: int = dataclasses.field(default=1000, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_reparameterized("fv.objectives.ScoreFunction")
        if not 0 < self.power <= 1:
            raise ValueError(f"`power` must be above 0 and at most 1; got {self.power!r}.")
        checks.positive_int("num_steps", self.num_steps)

    def init(self, key: Array) -> dict[str, Any]:
        """{"posterior": ..., "control": Fixed(steps done)}."""
        return {**super().init(key), "control": Fixed(jnp.zeros((), jnp.int32))}

    def __call__(self, params: Any, key: Array, batch: Any) -> Any:
        """The loss, metrics, and parameters with one more step done."""
        step = params["control"].value
        share = step / self.num_steps
        power = self.power ** (1 - jnp.minimum(share / COOLING, 1))
        train_key, draw_key, model_key = jax.random.split(key, 3)
        q = self._approximation(params, train_key, batch).distribution
        z, log_q, score = q.sample_with_score(draw_key, (self.num_samples,))
        z = self._guarded(z)
        log_joint, _ = evaluate(self.log_joint, params, model_key, z, batch)
        log_weights = jax.lax.stop_gradient(log_joint - log_q)
        good, metrics = self._good(log_weights)
        path = jax.lax.stop_gradient(log_q) + along(z, score, len(self.family.event_shape))
        elbo = self._mean(power * log_joint - path, good, batch)
        if good is not None:
            log_weights = jnp.where(good, log_weights, -jnp.inf)
        effective = 1 / (self.num_samples * jnp.sum(jnp.square(jax.nn.softmax(log_weights))))
        forward = FORWARD * effective * cross_entropy(log_weights, log_q, own=True)
        # The value stays that of the first divergence, on which progress is judged.
        loss = forward - jax.lax.stop_gradient(forward) - elbo
        return loss, metrics, {**params, "control": Fixed(step + 1)}
