"""flowvi: normalizing flows on JAX, for densities and for posteriors."""

from flowvi import testing
from flowvi.bijectors import IAF, MAF, Chain, LULinear, Permutation
from flowvi.distributions import FlowDistribution
from flowvi.families import (
    Family,
    conditional,
    coupling,
    full_rank,
    iaf,
    maf,
    mean_field,
    standard_normal,
)
from flowvi.networks import MADE
from flowvi.params import Fixed
from flowvi.training import FitResult, Plateau, TrainingDiverged, fit, fit_density, load, save

__version__ = "0.1.0"

__all__ = [
    "IAF",
    "MADE",
    "MAF",
    "Chain",
    "Family",
    "FitResult",
    "Fixed",
    "FlowDistribution",
    "LULinear",
    "Permutation",
    "Plateau",
    "TrainingDiverged",
    "conditional",
    "coupling",
    "fit",
    "fit_density",
    "full_rank",
    "iaf",
    "load",
    "maf",
    "mean_field",
    "save",
    "standard_normal",
    "testing",
]
