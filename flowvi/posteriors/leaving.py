"""What draws that have left an approximation say of it."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from flowvi.diagnostics import Estimate
from flowvi.posteriors.annealing import Particles
from flowvi.posteriors.diagnosis import LEFT_OUT

#: Beyond these a posterior warns: nats of log evidence, the part of draws where q has next to no
#: density, and of means and standard deviations as parts of q's; the last three beside their noise.
MAX_CHANGE, MAX_LEFT_OUT, MAX_SHIFT, MAX_SPREAD = 0.1, 0.005, 0.15, 0.15

#: The part of draws that may lack a gradient.
MAX_WITHOUT = 0.001

#: Standard errors that noise is allowed, of which the largest of many coordinates are looked at.
ERRORS = 4.0


@dataclasses.dataclass(frozen=True)
class Departure:
    """How draws that have left q differ from it.

    Attributes:
        change: the log evidence they find above that of draws of q, in nats.
        left_out: the part of them at which q has next to no density.
        shift: by coordinate of the vector, the difference of means in q's standard deviations.
        spread: by coordinate, the logarithm of the ratio of standard deviations.
        allowed: of the last two, what noise may be.
        without_gradient: the part of draws of q with a density, but without a finite gradient.
    """

    change: Estimate
    left_out: float
    shift: np.ndarray
    spread: np.ndarray
    allowed: float
    without_gradient: float

    @property
    def is_suspicious(self) -> bool:
        """Whether anything is beyond its noise."""
        return any(True for _ in self.messages([""] * len(self.shift)))

    def messages(self, labels: list[str]) -> Iterable[str]:
        """What is wrong, in words."""
        how = "Short chains that start at draws of the posterior and around them"
        value, error = self.change.value, self.change.standard_error
        if not abs(value) <= max(MAX_CHANGE, ERRORS * error):
            yield f"{how} move the log evidence by {value:+.2f} +- {error:.2f} nats."
        if self.left_out > MAX_LEFT_OUT:
            yield f"{self.left_out:.1%} of short chains ended where it has next to no density."
        place = int(np.argmax(np.abs(self.shift)))
        if abs(self.shift[place]) > MAX_SHIFT + self.allowed:
            what = f"move the mean of {labels[place]} by {self.shift[place]:+.2f} of its "
            yield f"{how} {what}standard deviations."
        place = int(np.argmax(self.spread))
        if self.spread[place] > MAX_SPREAD + self.allowed:
            what = f"widen {labels[place]} by a factor of {np.exp(self.spread[place]):.2f}"
            yield f"{how} {what}."
        if self.without_gradient > MAX_WITHOUT:
            what = f"is not finite at {self.without_gradient:.1%} of the draws where the density is"
            yield f"The gradient {what}. Perhaps a `jnp.where` has a branch that is not safe?"


def departure(
    particles: Particles,
    log_q: np.ndarray,
    u: np.ndarray,
    log_evidence: Estimate,
    without_gradient: float = 0.0,
) -> Departure:
    """What particles say of q, from log q at them, draws u of q, and the log evidence by q."""
    excess = particles.log_density - np.asarray(log_q, np.float64) - log_evidence.value
    excess = np.where(np.isfinite(particles.log_density), excess, -np.inf)
    error = float(np.hypot(particles.error, log_evidence.standard_error))
    change = Estimate(particles.log_evidence - log_evidence.value, error)
    shift, spread = _moved(particles.u, u)
    return Departure(
        change,
        float((excess > LEFT_OUT).mean()),
        shift,
        spread,
        ERRORS * 1.3 / np.sqrt(len(particles.u)),
        without_gradient,
    )


@np.errstate(over="ignore", invalid="ignore")  # heavy tails reach any number
def _moved(new: np.ndarray, old: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By coordinate, how far the middle moved, in old scales, and the log ratio of the scales.

    Of moments and of quantiles, what moved less: heavy tails make noise of the former, two modes of
    the latter.
    """
    low, median, high = np.quantile(old, [0.16, 0.5, 0.84], axis=0)
    new_low, new_median, new_high = np.quantile(new, [0.16, 0.5, 0.84], axis=0)
    tiny = np.finfo(float).tiny
    scale = np.maximum((high - low) / 2, tiny)
    sd = np.maximum(old.std(0), tiny)
    shifts = np.stack([(new_median - median) / scale, (new.mean(0) - old.mean(0)) / sd])
    ratios = np.stack([(new_high - new_low) / (2 * scale), new.std(0) / sd])
    spreads = np.log(np.maximum(ratios, tiny))
    return tuple(  # type: ignore[return-value]
        np.take_along_axis(each, np.abs(each).argmin(0)[None], 0)[0] for each in (shifts, spreads)
    )
