"""Training on pairs that are simulated as it goes: each is seen once, and none is stored."""

import dataclasses

import jax
import jax.numpy as jnp

from flowvi.amortized.prior import ONLY, Prior
from flowvi.amortized.simulations import Pairs, Simulator
from flowvi.densities.training import AVERAGING, BATCH_SIZE, MAX_STEPS, default_optimizer
from flowvi.families import Standardized
from flowvi.layouts import Layout
from flowvi.objectives import NegativeLogLikelihood
from flowvi.params import Array, PyTree
from flowvi.supports import Interval
from flowvi.training import FitResult, fit

#: Pairs that are simulated first: for units, and to be held out. Validations over a fit.
NUM_FIRST, VALIDATIONS = 10_000, 50


@dataclasses.dataclass(frozen=True, eq=False)
class FreshPairs:
    """The negative log likelihood of pairs that are simulated in the step; NaN is left out.

    Attributes:
        family: q(u | x) in units of its own.
        prior: of the parameters.
        layout: that of the parameters.
        simulator: (key, theta) -> x, of JAX.
        size: pairs of a step.
    """

    family: Standardized
    prior: Prior
    layout: Layout
    simulator: Simulator
    size: int

    def __call__(self, params: PyTree, key: Array, batch: None) -> tuple[Array, dict[str, Array]]:
        del batch
        prior_key, key, train_key = jax.random.split(key, 3)
        theta = self.prior.sample(prior_key, self.size)
        x = jax.vmap(self.simulator)(jax.random.split(key, self.size), theta)
        good = jnp.isfinite(x.reshape(self.size, -1)).all(1)
        x = jnp.where(good.reshape(-1, *[1] * (x.ndim - 1)), x, 0)
        distribution, _ = self.family.train_distribution(params, train_key, x)
        log_q = distribution.log_prob(self._unconstrained(theta))
        lost = 1 - good.mean()
        loss = -jnp.where(good, log_q, 0).sum() / jnp.maximum(good.sum(), 1)
        return loss, {"lost": lost}

    def _unconstrained(self, theta: PyTree) -> Array:
        named = theta if isinstance(theta, dict) else {ONLY: theta}
        parts = []
        for name, support in zip(self.layout.names, self.layout.supports, strict=True):
            inside = (
                support.moved_inside(named[name]) if isinstance(support, Interval) else named[name]
            )
            parts.append(jnp.reshape(inside, (self.size, -1)))
        theta = jnp.concatenate(parts, -1)
        bijector = self.layout.support.bijector()
        return theta if bijector is None else bijector.inverse(theta)


def on_fresh_pairs(
    loss: FreshPairs,
    params: PyTree,
    held_out: Pairs,
    key: Array,
    patience: int | None,
    options: dict,
) -> FitResult:
    """Trains on pairs without end, judged by some that are held out."""
    steps = options.get("num_steps") or MAX_STEPS
    dtype = jnp.result_type(float)
    settings = {
        "optimizer": default_optimizer(steps),
        "averaging": AVERAGING,
        **options,
        "num_steps": steps,
        "batch_size": None,
    }
    return fit(
        loss,
        params,
        settings.pop("optimizer"),
        key=key,
        validate=NegativeLogLikelihood(loss.family, training=False),
        validation_data={"x": held_out.u.astype(dtype), "context": held_out.x},
        validate_every=max(steps // VALIDATIONS, 1),
        patience=patience,
        **settings,
    )


def size_of(options: dict) -> int:
    """Pairs of a step."""
    return options.get("batch_size") or BATCH_SIZE
