"""Distributions of flows and of relaxations, and draws with all gradients that they can carry."""

from flowvi.distributions.concrete import BinaryConcrete, OneHotConcrete, RelaxedDistribution
from flowvi.distributions.draws import draw, draw_each, num_choices, support, support_size
from flowvi.distributions.flow import FlowDistribution, along

__all__ = [
    "BinaryConcrete",
    "FlowDistribution",
    "OneHotConcrete",
    "RelaxedDistribution",
    "along",
    "draw",
    "draw_each",
    "num_choices",
    "support",
    "support_size",
]
