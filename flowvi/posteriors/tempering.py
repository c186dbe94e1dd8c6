"""A fit that starts from a flattened density, so that no mode is left out."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from flowvi import checks
from flowvi.objectives import ELBO, ForwardKL
from flowvi.objectives.variational import LogJoint, Variational
from flowvi.params import Fixed

Array = jax.Array

#: The parts of a fit: the temperature falls to 1 in the first, rests in the second, and in the
#: rest the weights of the modes are set right.
COOLING, RESTING = 0.4, 0.5


@dataclasses.dataclass(frozen=True)
class Powered:
    """A log joint density times an inverse temperature, params["power"]."""

    log_joint: LogJoint

    def __call__(self, params: Any, key: Array, z: Array, batch: Any) -> Array:
        """The tempered log joint density."""
        return params["power"] * self.log_joint(params, key, z, batch)


@dataclasses.dataclass(frozen=True)
class Tempered(Variational):
    """A loss for `fit` that goes through three parts of its `num_steps` steps.

    1. The ELBO of p(z)^b by path gradients, with b rising from `power` to 1. While b is small the
       modes are bridged, and q covers all that its start covers.
    2. The ELBO itself.
    3. The ELBO, and the forward KL divergence with self-normalised weights. The ELBO's gradient
       hardly sees the weights of modes that no draw connects; the other one does. In many
       coordinates its weights are few draws' alone, and the ELBO holds q in place.

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
        options: dict[str, Any] = {"num_samples": self.num_samples, "skip_nonfinite": True}
        elbo = ELBO(self.family, Powered(self.log_joint), path=True, **options)
        forward = ForwardKL(self.family, self.log_joint, **options)
        inputs = {"posterior": params["posterior"], "power": power}

        def both_ways() -> tuple[Array, dict[str, Array]]:
            keys = jax.random.split(key)
            loss, metrics = elbo(inputs, keys[0], batch)
            return loss + forward(inputs, keys[1], batch)[0], metrics

        loss, metrics = jax.lax.cond(share < RESTING, lambda: elbo(inputs, key, batch), both_ways)
        return loss, metrics, {**params, "control": Fixed(step + 1)}
