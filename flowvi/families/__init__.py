"""Families: distributions waiting for parameters and a context."""

from flowvi.families.conditional import Conditional, conditional
from flowvi.families.family import Family
from flowvi.families.flow import Flow
from flowvi.families.flows import coupling, iaf, maf
from flowvi.families.normal import StandardNormal, full_rank, mean_field, standard_normal
from flowvi.families.whitened import Whitened, whitened

__all__ = [
    "Conditional",
    "Family",
    "Flow",
    "StandardNormal",
    "Whitened",
    "conditional",
    "coupling",
    "full_rank",
    "iaf",
    "maf",
    "mean_field",
    "standard_normal",
    "whitened",
]
