"""Families: distributions waiting for parameters and a context."""

from flowvi.families.conditional import Conditional, conditional
from flowvi.families.discrete import BernoulliFamily, bernoulli
from flowvi.families.family import Family
from flowvi.families.flow import Flow
from flowvi.families.flows import coupling, iaf, maf
from flowvi.families.location_scale import (
    FullGaussian,
    LocationScaleFamily,
    gaussian,
    gumbel,
    laplace,
    logistic,
)
from flowvi.families.normal import StandardNormal, full_rank, mean_field, standard_normal
from flowvi.families.parametric import Parametric
from flowvi.families.whitened import Whitened, whitened

__all__ = [
    "BernoulliFamily",
    "Conditional",
    "Family",
    "Flow",
    "FullGaussian",
    "LocationScaleFamily",
    "Parametric",
    "StandardNormal",
    "Whitened",
    "bernoulli",
    "conditional",
    "coupling",
    "full_rank",
    "gaussian",
    "gumbel",
    "iaf",
    "laplace",
    "logistic",
    "maf",
    "mean_field",
    "standard_normal",
    "whitened",
]
