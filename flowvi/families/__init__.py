"""Families: distributions waiting for parameters and a context."""

from flowvi.families.attention import transformer_flow
from flowvi.families.block import bnaf
from flowvi.families.choices import Annealing, mixture, relaxed
from flowvi.families.contexts import Conditional, Local, conditional, local, unconditional
from flowvi.families.continuous import continuous
from flowvi.families.custom import custom
from flowvi.families.family import Family, Wrapper, as_array, check_key, check_params
from flowvi.families.flow import Flow, full_rank, mean_field, standard_normal
from flowvi.families.flows import coupling, iaf, maf
from flowvi.families.joint import joint
from flowvi.families.labelled import Labelled, labelled
from flowvi.families.observations import (
    bernoulli,
    categorical,
    continuous_bernoulli,
    from_distrax,
    gaussian,
    gumbel,
    laplace,
    logistic,
)
from flowvi.families.placed import Gaussianized, Standardized, gaussianized, standardized
from flowvi.families.residual import residual
from flowvi.families.ridges import planar, radial, sylvester
from flowvi.families.torus import torus
from flowvi.families.whitened import Whitened, whitened

# fmt: off
__all__ = [
    "Annealing", "Conditional", "Family", "Flow", "Gaussianized", "Labelled", "Local",
    "Standardized", "Whitened", "Wrapper", "as_array", "bernoulli", "bnaf", "categorical",
    "check_key", "check_params", "conditional", "continuous", "continuous_bernoulli", "coupling",
    "custom", "from_distrax", "full_rank", "gaussian", "gaussianized", "gumbel", "iaf", "joint",
    "labelled", "laplace", "local", "logistic", "maf", "mean_field", "mixture", "planar", "radial",
    "relaxed", "residual", "standard_normal", "standardized", "sylvester", "torus",
    "transformer_flow", "unconditional", "whitened",
]
