"""Families: distributions waiting for parameters and a context."""

from flowvi.families.contexts import (
    Conditional,
    Local,
    Unconditional,
    conditional,
    local,
    unconditional,
)
from flowvi.families.custom import Custom, custom
from flowvi.families.discrete import (
    BernoulliFamily,
    CategoricalFamily,
    ContinuousBernoulliFamily,
    OneHotFamily,
    bernoulli,
    categorical,
    continuous_bernoulli,
)
from flowvi.families.family import Composed, Family, Wrapper, as_array, check_key, check_params
from flowvi.families.flow import Flow, StandardNormal
from flowvi.families.flows import coupling, iaf, maf
from flowvi.families.from_distrax import FromDistrax, from_distrax
from flowvi.families.joint import JointFamily, joint
from flowvi.families.location_scale import (
    FullGaussian,
    LocationScaleFamily,
    gaussian,
    gumbel,
    laplace,
    logistic,
)
from flowvi.families.mixture import MixtureFamily, mixture
from flowvi.families.normal import full_rank, mean_field, standard_normal
from flowvi.families.parametric import Parametric
from flowvi.families.placed import Standardized, Whitened, standardized, whitened
from flowvi.families.relaxed import Annealing, Relaxed, relaxed

__all__ = [
    "Annealing",
    "BernoulliFamily",
    "CategoricalFamily",
    "Composed",
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
    "Standardized",
    "Unconditional",
    "Whitened",
    "Wrapper",
    "as_array",
    "bernoulli",
    "categorical",
    "check_key",
    "check_params",
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
    "standardized",
    "unconditional",
    "whitened",
]
