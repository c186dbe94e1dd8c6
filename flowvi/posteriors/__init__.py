"""Posteriors: from a log density to draws, and to what they are worth."""

from flowvi.posteriors.defaults import default_family
from flowvi.posteriors.diagnosis import Diagnosis, PosteriorWarning
from flowvi.posteriors.posterior import Posterior, Summary
from flowvi.posteriors.recipe import fit_posterior
from flowvi.posteriors.target import Target

__all__ = [
    "Diagnosis",
    "Posterior",
    "PosteriorWarning",
    "Summary",
    "Target",
    "default_family",
    "fit_posterior",
]
