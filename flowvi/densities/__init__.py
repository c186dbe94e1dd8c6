"""Densities that are fitted to data."""

from flowvi.densities.density import Density
from flowvi.densities.fit import fit_density

__all__ = ["Density", "fit_density"]
