"""Pictures: matplotlib figures.

Matplotlib is imported when one is drawn; where it is missing, an ImportError says what to install.
"""

from flowvi.plotting.curves import curves
from flowvi.plotting.samples import calibration, density, marginals, pairs
from flowvi.plotting.tables import table
from flowvi.plotting.uniform import null_test, uniformity
from flowvi.plotting.vaes import latent_space, manifold, prior_samples, reconstructions

__all__ = [
    "calibration",
    "curves",
    "density",
    "latent_space",
    "manifold",
    "marginals",
    "null_test",
    "pairs",
    "prior_samples",
    "reconstructions",
    "table",
    "uniformity",
]
