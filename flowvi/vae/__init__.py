"""Latent-variable models whose prior, likelihood and posterior are families."""

from flowvi.vae.enumeration import ExactPosterior, exact_posterior, log_marginal
from flowvi.vae.evaluation import Evaluation
from flowvi.vae.fit import FittedVAE, fit_vae
from flowvi.vae.model import VAE
from flowvi.vae.rows import AmortizationGap, amortization_gap, fit_rows

__all__ = [
    "VAE",
    "AmortizationGap",
    "Evaluation",
    "ExactPosterior",
    "FittedVAE",
    "amortization_gap",
    "exact_posterior",
    "fit_rows",
    "fit_vae",
    "log_marginal",
]
