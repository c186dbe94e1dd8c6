"""A finish that mends tails which the ELBO left too light."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax

from flowvi import diagnostics
from flowvi.families import Family
from flowvi.objectives import ELBO, ForwardKL
from flowvi.posteriors.posterior import draws
from flowvi.posteriors.target import Target
from flowvi.training import fit

Array = jax.Array

#: Tails are mended where k-hat is above the first, if the effective sample size is above the
#: second: from worse weights there is nothing to learn.
LIGHT, LEAST_ESS = 0.4, 0.3

#: Steps, draws of a step for each of the two divergences, learning rate.
NUM_STEPS, NUM_SAMPLES, LEARNING_RATE = 600, (128, 512), 1.5e-3

#: Nats of the ELBO that lighter weights may cost, and the draws that tell: what goes wrong in the
#: far tails goes wrong at one draw in ten thousand.
MOST_LOSS, NUM_LOOK = 0.003, 20_000


@functools.lru_cache(maxsize=1)
def _optimizer() -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, NUM_STEPS, 0.01)
    return optax.chain(optax.clip_by_global_norm(10.0), optax.adam(schedule))


@dataclasses.dataclass(frozen=True)
class _BothWays:
    """KL(q || p) + KL(p || q), up to a constant, as a loss for `fit`."""

    elbo: ELBO
    forward: ForwardKL

    def __call__(self, params: Any, key: Array, batch: Any) -> Array:
        keys = jax.random.split(key)
        return self.elbo(params, keys[0], batch)[0] + self.forward(params, keys[1], batch)[0]


def mend(family: Family, target: Target, params: Any, key: Array) -> Any:
    """Parameters whose importance weights have lighter tails, or the same ones.

    The ELBO hardly feels a tail that q lacks, since q does not draw there. The forward KL
    divergence does, and near the optimum the weights of q's own draws are good enough to estimate
    it. Alone it is led astray by single draws of large weight; the ELBO's path gradient, which is
    nearly free of noise there, holds q in place. The result is kept if k-hat falls and the ELBO
    does not.
    """
    fit_key, draw_key = jax.random.split(key)
    before = _look(family, target, params, draw_key)
    if before is None or before[0].khat <= LIGHT or before[0].ess < LEAST_ESS:
        return params
    joint, few, many = target.log_joint, *NUM_SAMPLES
    loss_fn = _BothWays(
        ELBO(family, joint, num_samples=few, path=True, skip_nonfinite=True),
        ForwardKL(family, joint, num_samples=many, skip_nonfinite=True),
    )
    result = fit(
        loss_fn,
        {"posterior": params},
        _optimizer(),
        key=fit_key,
        num_steps=NUM_STEPS,
        data=target.data,
        max_bad_steps=NUM_STEPS,
        progress=False,
    )
    mended = result.params["posterior"]
    after = _look(family, target, mended, draw_key)
    if after is None or after[0].khat >= before[0].khat or after[1] < before[1] - MOST_LOSS:
        return params
    return mended


def _look(
    family: Family, target: Target, params: Any, key: Array
) -> tuple[diagnostics.PSIS, float] | None:
    """The smoothed weights and the ELBO; None where draws have no density."""
    weights = draws(family, target, params, key, NUM_LOOK)[2]
    if not np.isfinite(weights).all():
        return None
    return diagnostics.psis(weights), float(weights.mean())
