"""What a posterior says about itself."""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from flowvi import diagnostics
from flowvi.diagnostics import Estimate

#: Beyond these a posterior warns.
MAX_KHAT, MIN_ESS, MAX_ERROR, MAX_GAP = 0.7, 0.2, 0.05, 1.0


class PosteriorWarning(UserWarning):
    """A posterior that should not be trusted as it is."""


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What importance weights say about a posterior, from fresh draws of it.

    None of it sees a mode that the posterior misses altogether, and in high dimension tails are
    lost slowly before any of it moves.

    Attributes:
        elbo: the evidence lower bound, in nats.
        log_evidence: the log of the normalising constant, by importance sampling.
        khat: the Pareto shape of the largest weights.
        ess: the effective sample size of the weights, as a fraction of the draws.
        lost: the fraction of draws at which the log density is not finite.
        messages: what is wrong; empty where nothing is.
    """

    elbo: Estimate
    log_evidence: Estimate
    khat: float
    ess: float
    lost: float
    messages: tuple[str, ...]

    def __str__(self) -> str:
        rows = [
            f"ELBO          {self.elbo.value:12.4f} +- {self.elbo.standard_error:.4f}",
            f"log evidence  {self.log_evidence.value:12.4f} "
            f"+- {self.log_evidence.standard_error:.4f}",
            f"Pareto k-hat  {self.khat:12.3f}   (trust below {MAX_KHAT})",
            f"IS-ESS        {self.ess:12.3f}   (trust above {MIN_ESS})",
        ]
        return "\n".join([*rows, *(f"! {message}" for message in self.messages)])


def diagnose(log_weights: Any, remarks: Sequence[str] = ()) -> Diagnosis:
    """The diagnosis of log weights, of shape [num_samples].

    Args:
        log_weights: log p(u) - log q(u) at draws u of q; where not finite the draw has no weight.
        remarks: what is known to be wrong already.
    """
    log_weights = np.asarray(log_weights, np.float64)
    good = np.isfinite(log_weights)
    lost = 1 - good.mean()
    messages = list(remarks)
    if not good.any():
        nothing = Estimate(-np.inf, np.inf)
        messages.append("The log density is finite at none of the draws.")
        return Diagnosis(nothing, nothing, np.inf, 0.0, 1.0, tuple(messages))
    elbo = diagnostics.elbo(log_weights[good])
    weights = np.where(good, log_weights, -np.inf)
    evidence = diagnostics.log_evidence(weights)
    smoothed = diagnostics.psis(weights)
    if smoothed.khat > MAX_KHAT:
        messages.append(
            f"Pareto k-hat is {smoothed.khat:.2f}, above {MAX_KHAT}: the posterior has heavier "
            "tails than the approximation, and importance sampling does not mend it."
        )
    if smoothed.ess < MIN_ESS:
        messages.append(
            f"The effective sample size is {smoothed.ess:.3f} of the draws, below {MIN_ESS}."
        )
    if not evidence.standard_error <= MAX_ERROR:
        messages.append(
            f"The standard error of the log evidence is {evidence.standard_error:.3f}, above "
            f"{MAX_ERROR}."
        )
    gap = evidence.value - elbo.value
    if gap > MAX_GAP:
        messages.append(
            f"The ELBO lies {gap:.2f} nats below the log evidence, more than {MAX_GAP:g}."
        )
    if lost > 0:
        messages.append(
            f"The log density is not finite at {lost:.2%} of the draws, which were left out."
        )
    return Diagnosis(elbo, evidence, smoothed.khat, smoothed.ess, float(lost), tuple(messages))


def warn(diagnosis: Diagnosis, stacklevel: int) -> None:
    """One `PosteriorWarning` with all the messages of a diagnosis, if there are any."""
    if diagnosis.messages:
        text = " ".join(diagnosis.messages)
        warnings.warn(
            f"This posterior should not be trusted as it is. {text}",
            PosteriorWarning,
            stacklevel=stacklevel + 1,
        )
