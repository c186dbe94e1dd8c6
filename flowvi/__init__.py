"""flowvi: normalizing flows on JAX, for densities and for posteriors."""

from flowvi import diagnostics, networks, objectives, testing
from flowvi.bijectors import IAF, MAF, Chain, LULinear, Permutation
from flowvi.diagnostics import Estimate
from flowvi.distributions import FlowDistribution
from flowvi.families import (
    Annealing,
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
    joint,
    laplace,
    logistic,
    maf,
    mean_field,
    mixture,
    relaxed,
    standard_normal,
    unconditional,
    whitened,
)
from flowvi.networks import MADE
from flowvi.params import Fixed
from flowvi.posteriors import Posterior, PosteriorWarning, Target, fit_posterior
from flowvi.training import FitResult, Plateau, TrainingDiverged, fit, fit_density, load, save
from flowvi.vae import VAE, exact_posterior, fit_vae, log_marginal

__version__ = "0.1.0"

__all__ = [
    "IAF",
    "MADE",
    "MAF",
    "VAE",
    "Annealing",
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
    "exact_posterior",
    "fit",
    "fit_density",
    "fit_posterior",
    "fit_vae",
    "from_distrax",
    "full_rank",
    "gaussian",
    "gumbel",
    "iaf",
    "joint",
    "laplace",
    "load",
    "log_marginal",
    "logistic",
    "maf",
    "mean_field",
    "mixture",
    "networks",
    "objectives",
    "relaxed",
    "save",
    "standard_normal",
    "testing",
    "unconditional",
    "whitened",
]
