"""Amortized posteriors: from a prior and a simulator, or from pairs, to the posterior of any x."""

from flowvi.amortized.fit import fit_amortized
from flowvi.amortized.likelihood import AmortizedLikelihood, fit_likelihood
from flowvi.amortized.posterior import AmortizationWarning, AmortizedPosterior, Weights
from flowvi.amortized.prior import Prior
from flowvi.amortized.rounds import fit_rounds

__all__ = [
    "AmortizationWarning",
    "AmortizedLikelihood",
    "AmortizedPosterior",
    "Prior",
    "Weights",
    "fit_amortized",
    "fit_likelihood",
    "fit_rounds",
]
