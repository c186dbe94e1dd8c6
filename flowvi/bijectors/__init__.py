"""Bijectors: ordinary Distrax bijectors, forward from base to data."""

from flowvi.bijectors.autoregressive import IAF, MAF
from flowvi.bijectors.chain import Chain
from flowvi.bijectors.coupling import Coupling
from flowvi.bijectors.linear import LULinear
from flowvi.bijectors.permutation import Permutation
from flowvi.bijectors.stack import Stack
from flowvi.bijectors.units import Units
from flowvi.bijectors.whitening import Dense, LowRank

__all__ = [
    "IAF",
    "MAF",
    "Chain",
    "Coupling",
    "Dense",
    "LULinear",
    "LowRank",
    "Permutation",
    "Stack",
    "Units",
]
