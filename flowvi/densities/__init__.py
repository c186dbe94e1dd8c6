"""Densities that are fitted to data."""

from flowvi.densities.density import Density
from flowvi.densities.diagnosis import Calibration, DensityWarning
from flowvi.densities.fit import fit_density

__all__ = ["Calibration", "Density", "DensityWarning", "fit_density"]
