"""Bijectors: ordinary Distrax bijectors, forward from base to data."""

from flowvi.bijectors.autoregressive import IAF, MAF
from flowvi.bijectors.chain import Chain, Stack
from flowvi.bijectors.constrained import KINDS, Blocks, Constrained
from flowvi.bijectors.coupling import Coupling
from flowvi.bijectors.linear import Dense, LowRank, LULinear, Permutation
from flowvi.bijectors.marginal import Marginal
from flowvi.bijectors.orthogonal import Orthogonal
from flowvi.bijectors.planar import Planar, Radial, Sylvester
from flowvi.bijectors.units import Units

__all__ = [
    "IAF",
    "KINDS",
    "MAF",
    "Blocks",
    "Chain",
    "Constrained",
    "Coupling",
    "Dense",
    "LULinear",
    "LowRank",
    "Marginal",
    "Orthogonal",
    "Permutation",
    "Planar",
    "Radial",
    "Stack",
    "Sylvester",
    "Units",
]
