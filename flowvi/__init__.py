"""flowvi: normalizing flows on JAX, for densities and for posteriors."""

from flowvi import diagnostics, networks, objectives, testing
from flowvi.bijectors import IAF, MAF, Chain, LULinear, Permutation
from flowvi.diagnostics import Estimate
from flowvi.distributions import FlowDistribution
from flowvi.families import (
    Family,
    bernoulli,
    categorical,
    conditional,
    continuous_bernoulli,
    coupling,
    custom,
    from_distrax,
    full_rank,
    gaussian,
    gumbel,
    iaf,
    laplace,
    logistic,
    maf,
    mean_field,
    mixture,
    standard_normal,
    whitened,
)
from flowvi.networks import MADE
from flowvi.params import Fixed
from flowvi.posteriors import Posterior, PosteriorWarning, Target, fit_posterior
from flowvi.training import FitResult, Plateau, TrainingDiverged, fit, fit_density, load, save
from flowvi.vae import VAE, fit_vae

__version__ = "0.1.0"

__all__ = [
    "IAF",
    "MADE",
    "MAF",
    "VAE",
    "Chain",
    "Estimate",
    "Family",
    "FitResult",
    "Fixed",
    "FlowDistribution",
    "LULinear",
    "Permutation",
    "Plateau",
    "Posterior",
    "PosteriorWarning",
    "Target",
    "TrainingDiverged",
    "bernoulli",
    "categorical",
    "conditional",
    "continuous_bernoulli",
    "coupling",
    "custom",
    "diagnostics",
    "fit",
    "fit_density",
    "fit_posterior",
    "fit_vae",
    "from_distrax",
    "full_rank",
    "gaussian",
    "gumbel",
    "iaf",
    "laplace",
    "load",
    "logistic",
    "maf",
    "mean_field",
    "mixture",
    "networks",
    "objectives",
    "save",
    "standard_normal",
    "testing",
    "whitened",
]
