"""A fit that starts from a flattened density, so that no mode is left out."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flowvi import checks
from flowvi.distributions import along
from flowvi.objectives.variational import Variational, evaluate
from flowvi.params import Fixed

Array = jax.Array

#: The parts of a fit: the temperature falls to 1 in the first, rests in the second, and in the
#: rest the weights of the modes are set right.
COOLING, RESTING = 0.3, 0.4


@dataclasses.dataclass(frozen=True)
class Tempered(Variational):
    """A loss for `fit` that goes through three parts of its `num_steps` steps.

    1. KL(q || p^b) by path gradients, with b rising from `power` to 1. While b is small the modes
       are bridged, and q covers all that its start covers.
    2. KL(q || p) alone.
    3. KL(q || p), and KL(p || q) by self-normalised weights. The gradient of the first hardly sees
       the weights of modes that no draw connects; that of the second does. In many coordinates its
       weights are few draws' alone, and the first holds q in place.

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
        power = self.power ** (1 - jnp.clip(share / COOLING, 0, 1))
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
        shares = jax.nn.softmax(log_weights)
        forward = -jnp.sum(jnp.where(shares > 0, shares * log_q, 0))
        # The value stays that of the first divergence, on which progress is judged.
        forward = jnp.where(share < RESTING, 0, forward - jax.lax.stop_gradient(forward))
        return forward - elbo, metrics, {**params, "control": Fixed(step + 1)}
