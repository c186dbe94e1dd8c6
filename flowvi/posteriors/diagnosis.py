"""What a posterior says about itself, and what it warns of."""

import dataclasses
import warnings
from collections.abc import Iterable

import numpy as np
from jax.typing import ArrayLike

from flowvi import diagnostics
from flowvi.diagnostics import Estimate
from flowvi.posteriors.start import Start
from flowvi.posteriors.target import Target
from flowvi.training import FitResult

#: Beyond these a posterior warns.
MAX_KHAT, MIN_ESS, MAX_ERROR, MAX_GAP = 0.7, 0.2, 0.05, 0.5

#: Nats in the last twentieth of the steps that are no convergence.
STILL_RISING = 0.5

#: A mode is missing if weights around it are so many nats above the log evidence, and it has at
#: least this part of the mass. Directions in which the density is followed outwards.
LEFT_OUT, LEAST_MASS, MOST_DIRECTIONS = 5.0, 3e-5, 32


class PosteriorWarning(UserWarning):
    """A posterior that should not be trusted as it is."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a fit took.

    Attributes:
        num_gradients: evaluations of the density with its gradient; a Hessian counts D + 1.
        num_evaluations: those without.
        seconds: wall time, compilation included.
    """

    num_gradients: int
    num_evaluations: int
    seconds: float = dataclasses.field(default=0.0, compare=False)

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.num_gradients + other.num_gradients,
            self.num_evaluations + other.num_evaluations,
            self.seconds + other.seconds,
        )


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What importance weights say about a posterior, from fresh draws of it.

    Attributes:
        elbo: the evidence lower bound, in nats.
        log_evidence: the log of the normalising constant, by importance sampling.
        khat: the Pareto shape of the largest weights.
        ess: the effective sample size of the weights, as a fraction of the draws.
        lost: the fraction of draws at which the log density is not finite.
        messages: what is wrong; empty where nothing is.
        cost: what the fit took; None in a diagnosis of later draws.
    """

    elbo: Estimate
    log_evidence: Estimate
    khat: float
    ess: float
    lost: float
    messages: tuple[str, ...]
    cost: Cost | None = None

    def __str__(self) -> str:
        rows = [
            f"{name:<13} {each.value:12.4f} +- {each.standard_error:.4f}"
            for name, each in (("ELBO", self.elbo), ("log evidence", self.log_evidence))
        ]
        rows.append(f"Pareto k-hat  {self.khat:12.3f}   (trust below {MAX_KHAT})")
        rows.append(f"IS-ESS        {self.ess:12.3f}   (trust above {MIN_ESS})")
        if self.cost is not None:
            counts = f"{self.cost.num_gradients:,} gradients, {self.cost.num_evaluations:,} values"
            rows.append(f"cost          {counts}, {self.cost.seconds:.0f} s")
        return "\n".join(rows + [f"! {message}" for message in self.messages])

    def warn(self, more: Iterable[str], stacklevel: int) -> "Diagnosis":
        """The diagnosis with more messages first, and one `PosteriorWarning` if there are any."""
        messages = (*more, *self.messages)
        if messages:
            text = f"This posterior should not be trusted as it is. {' '.join(messages)}"
            warnings.warn(text, PosteriorWarning, stacklevel=stacklevel + 1)
        return dataclasses.replace(self, messages=messages)


def diagnose(log_weights: ArrayLike) -> Diagnosis:
    """The diagnosis of log weights, of shape [num_samples]; one not finite has no weight."""
    log_weights = np.asarray(log_weights, np.float64)
    good = np.isfinite(log_weights)
    lost = 1 - float(good.mean())
    if not good.any():
        nothing = Estimate(-np.inf, np.inf)
        message = "The log density is finite at none of the draws."
        return Diagnosis(nothing, nothing, np.inf, 0.0, 1.0, (message,))
    elbo = diagnostics.elbo(log_weights[good])
    weights = np.where(good, log_weights, -np.inf)
    evidence, smoothed = diagnostics.log_evidence(weights), diagnostics.psis(weights)
    found = Diagnosis(elbo, evidence, smoothed.khat, smoothed.ess, lost, ())
    return dataclasses.replace(found, messages=tuple(_warnings_of_weights(found)))


def _warnings_of_weights(found: Diagnosis) -> Iterable[str]:
    error, gap = found.log_evidence.standard_error, found.log_evidence.value - found.elbo.value
    if found.khat > MAX_KHAT:
        yield (
            f"Pareto k-hat is {found.khat:.2f}, above {MAX_KHAT}: the posterior has heavier tails "
            "than the approximation, and importance sampling does not mend it."
        )
    if found.ess < MIN_ESS:
        yield f"The effective sample size is {found.ess:.3f} of the draws, below {MIN_ESS}."
    if not error <= MAX_ERROR:
        yield f"The standard error of the log evidence is {error:.3f}, above {MAX_ERROR}."
    if gap > MAX_GAP:
        yield f"The ELBO lies {gap:.2f} nats below the log evidence, more than {MAX_GAP:g}."
    if found.lost > 0:
        where = f"at {found.lost:.2%} of the draws, which were left out"
        fix = "If it is cut off, perhaps give supports with `fv.Target.from_named`?"
        yield f"The log density is not finite {where}. {fix}"


def warnings_of_fit(target: Target, start: Start, result: FitResult) -> Iterable[str]:
    """What the density does far out, and how the steps ended: importance weights see none of it."""
    if rising := count_rising_directions(target, start):
        what = f"does not fall off in {rising} of the directions that were tried"
        yield f"The log density {what}: it may not be normalisable."
    losses = result.history["loss"]
    part = len(losses) // 20
    late, before = losses[len(losses) - part :], losses[-2 * part : -part]
    late, before = late[np.isfinite(late)], before[np.isfinite(before)]
    if min(len(late), len(before)) > 1:
        gain = float(np.mean(before) - np.mean(late))
        if gain > max(STILL_RISING, 5 * float(np.std(late)) / np.sqrt(len(late))):
            when = "in the last twentieth of the steps. Perhaps allow more with `num_steps`?"
            yield f"The ELBO still rose by {gain:.2g} nats {when}"
    if result.num_bad_steps > 0.1 * result.num_steps:
        why = "because the loss or its gradient was not finite"
        yield f"{result.num_bad_steps} of {result.num_steps} steps were skipped, {why}."


def warnings_of_modes(
    log_p: np.ndarray, log_q: np.ndarray, start: Start, log_evidence: float
) -> Iterable[str]:
    """Modes that runs ended in, by densities at `start.ends`, and that the posterior leaves out."""
    excess = log_p - log_q
    excess = np.where(np.isfinite(excess), excess, -np.inf).mean(-1) - log_evidence
    mass = start.end_elbos - log_evidence
    lost = (excess > LEFT_OUT) & (mass > np.log(LEAST_MASS))
    if lost.any():
        yield (
            f"{lost.sum()} of {len(lost)} runs of the optimiser ended where the posterior has next "
            f"to no density, around modes of up to {np.exp(mass[lost].max()):.1g} times the mass "
            "that it found: modes are missing. Perhaps fit with `tempering=0.1`?"
        )


def count_rising_directions(target: Target, start: Start) -> int:
    """How many directions there are along which the density does not fall off as 1 / distance."""
    # The widest directions of the start, both ways, a hundred and ten thousand of its standard
    # deviations away. Where the density of a line falls more slowly than that, and has not fallen
    # to nothing before, it has no integral.
    whitening = start.whitening
    if "matrix" in whitening:
        columns = whitening["matrix"].T
    else:
        columns = whitening["scale"] * whitening["basis"].T * (1 + whitening["gain"][:, None])
    widest = columns[np.argsort(-np.linalg.norm(columns, axis=-1))[:MOST_DIRECTIONS]]
    near, far = 1e2, 1e4
    points = np.array([0, near, far])[:, None, None] * np.concatenate([widest, -widest])
    values = np.asarray(target(whitening["loc"] + points), np.float64)
    with np.errstate(invalid="ignore"):
        falls = values[1] - values[2] >= np.log(far / near)
        vanishes = values[0] - values[2] > 4 * np.log(far)
    return int((np.isfinite(values).all(0) & ~falls & ~vanishes).sum())
