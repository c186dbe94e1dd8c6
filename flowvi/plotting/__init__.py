"""Pictures. Matplotlib is imported when one is drawn."""

from flowvi.plotting.posteriors import marginals, pairs
from flowvi.plotting.vaes import (
    curves,
    latent_space,
    manifold,
    prior_samples,
    reconstructions,
)

__all__ = [
    "curves",
    "latent_space",
    "manifold",
    "marginals",
    "pairs",
    "prior_samples",
    "reconstructions",
]
