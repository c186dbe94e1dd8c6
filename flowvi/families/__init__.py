"""Families: distributions waiting for parameters and a context."""

from flowvi.families.conditional import Conditional, conditional
from flowvi.families.continuous import ContinuousBernoulliFamily, continuous_bernoulli
from flowvi.families.custom import Custom, custom
from flowvi.families.discrete import (
    BernoulliFamily,
    CategoricalFamily,
    OneHotFamily,
    bernoulli,
    categorical,
)
from flowvi.families.family import Family, Wrapper
from flowvi.families.flow import Flow
from flowvi.families.flows import coupling, iaf, maf
from flowvi.families.from_distrax import FromDistrax, from_distrax
from flowvi.families.joint import JointFamily, joint
from flowvi.families.local import Local, local
from flowvi.families.location_scale import (
    FullGaussian,
    LocationScaleFamily,
    gaussian,
    gumbel,
    laplace,
    logistic,
)
from flowvi.families.mixture import MixtureFamily, mixture
from flowvi.families.normal import StandardNormal, full_rank, mean_field, standard_normal
from flowvi.families.parametric import Parametric
from flowvi.families.relaxed import Annealing, Relaxed, relaxed
from flowvi.families.unconditional import Unconditional, unconditional
from flowvi.families.whitened import Whitened, whitened

__all__ = [
    "Annealing",
    "BernoulliFamily",
    "CategoricalFamily",
    "Conditional",
    "ContinuousBernoulliFamily",
    "Custom",
    "Family",
    "Flow",
    "FromDistrax",
    "FullGaussian",
    "JointFamily",
    "Local",
    "LocationScaleFamily",
    "MixtureFamily",
    "OneHotFamily",
    "Parametric",
    "Relaxed",
    "StandardNormal",
    "Unconditional",
    "Whitened",
    "Wrapper",
    "bernoulli",
    "categorical",
    "conditional",
    "continuous_bernoulli",
    "coupling",
    "custom",
    "from_distrax",
    "full_rank",
    "gaussian",
    "gumbel",
    "iaf",
    "joint",
    "laplace",
    "local",
    "logistic",
    "maf",
    "mean_field",
    "mixture",
    "relaxed",
    "standard_normal",
    "unconditional",
    "whitened",
]
