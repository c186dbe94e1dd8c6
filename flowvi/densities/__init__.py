"""Densities that are fitted to data."""

from flowvi.densities.density import Density
from flowvi.densities.diagnosis import Calibration, DensityWarning
from flowvi.densities.fit import fit_density
from flowvi.densities.table_density import TableDensity
from flowvi.densities.table_frames import infer_schema

__all__ = [
    "Calibration",
    "Density",
    "DensityWarning",
    "TableDensity",
    "fit_density",
    "infer_schema",
]
