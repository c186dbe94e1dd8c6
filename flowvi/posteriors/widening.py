"""Draws spread a little, where importance weights would grow without bound."""

from typing import Any

import jax

from flowvi.families import Whitened
from flowvi.posteriors.diagnosis import diagnose
from flowvi.posteriors.posterior import NUM_DIAGNOSIS, draws
from flowvi.posteriors.target import Target

#: Draws are spread where k-hat, which has noise of 0.1 and more, is above this.
HEAVY = 0.3

#: By one of these factors.
FACTORS = (1.003, 1.01, 1.02, 1.03, 1.04)

#: For so many nats at most.
MOST_COST = 5e-3

#: A k-hat is smaller than another if it is by this.
KHAT_NOISE = 0.15


def widened(family: Whitened, target: Target, params: Any, key: jax.Array) -> Any:
    """The parameters, spread a little where the largest importance weights have a heavy tail.

    The best fit by ELBO is as often too narrow as too wide in each of its tails, and weights grow
    without bound where it is too narrow. Spread by a factor 1 + e, at the price of about D e^2 nats
    where it is nearly normal, the largest weights move to the middle. The first factor that brings
    k-hat below its bound is taken. Where none does, the one that makes it smallest is taken, if
    that is by more than its noise.

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
