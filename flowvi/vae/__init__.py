"""Latent-variable models whose prior, likelihood and posterior are families."""

from flowvi.vae.enumeration import ExactPosterior, exact_posterior, log_marginal
from flowvi.vae.evaluation import Evaluation
from flowvi.vae.fit import fit_vae
from flowvi.vae.model import VAE

__all__ = ["VAE", "Evaluation", "ExactPosterior", "exact_posterior", "fit_vae", "log_marginal"]
