"""Pictures. Matplotlib is imported when one is drawn."""

from flowvi.plotting.curves import curves
from flowvi.plotting.samples import density, marginals, pairs
from flowvi.plotting.vaes import latent_space, manifold, prior_samples, reconstructions

__all__ = [
    "curves",
    "density",
    "latent_space",
    "manifold",
    "marginals",
    "pairs",
    "prior_samples",
    "reconstructions",
]
