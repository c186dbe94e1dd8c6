"""What a stage has tried: a family at parameters, and what its importance weights say."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from flowvi.families import Family, Whitened
from flowvi.params import PyTree
from flowvi.posteriors.diagnosis import Diagnosis
from flowvi.training import FitResult

#: A start is easy if the log evidence is within so many nats of its ELBO.
EASY = 0.05

#: A base is made wider where k-hat is above this, by one of these factors, for so many nats at most
#: and only if k-hat falls by more than its noise.
HEAVY, FACTORS, MOST_COST, KHAT_NOISE = 0.3, (1.003, 1.01, 1.02, 1.03, 1.04), 5e-3, 0.05


class Attempt(NamedTuple):
    """A family at parameters, how they were found, and what their importance weights say."""

    family: Family
    params: PyTree
    result: FitResult
    diagnosis: Diagnosis

    @property
    def score(self) -> float:
        return self.diagnosis.elbo.value if self.diagnosis.lost < 0.5 else -np.inf

    @property
    def gap(self) -> float:
        """Nats between log evidence and ELBO."""
        return self.diagnosis.log_evidence.value - self.diagnosis.elbo.value

    @property
    def is_easy(self) -> bool:
        """Whether little is left to gain."""
        return self.diagnosis.lost == 0 and self.gap < EASY


def widened(family: Whitened, judged: Callable[[PyTree], Attempt], fitted: Attempt) -> Attempt:
    """What was fitted, spread a little where the largest importance weights have a heavy tail."""
    # The best fit by ELBO is as often too narrow as too wide in each of its tails, and weights grow
    # without bound where it is too narrow. With a base 1 + e times as wide, at the price of about
    # D e^2 nats, the largest weights move to the middle.
    if fitted.diagnosis.lost > 0:
        return fitted
    tried, elbo = [fitted], fitted.diagnosis.elbo.value
    for factor in FACTORS:
        if tried[-1].diagnosis.khat <= HEAVY:
            return tried[-1]
        wide = judged(family.widen(fitted.params, factor))
        elbo = max(elbo, wide.diagnosis.elbo.value)
        if wide.diagnosis.lost > 0 or elbo - wide.diagnosis.elbo.value > MOST_COST:
            break
        tried.append(wide)
    best = min(tried, key=lambda each: each.diagnosis.khat)
    limit = max(HEAVY, fitted.diagnosis.khat - KHAT_NOISE)
    return best if best.diagnosis.khat <= limit else fitted
