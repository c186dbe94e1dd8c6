"""Training: the loop, its data, its stopping, and the fit of a density."""

from flowvi.training.density import fit_density
from flowvi.training.loop import fit
from flowvi.training.result import FitResult, Look, StopReason, TrainingDiverged

__all__ = ["FitResult", "Look", "StopReason", "TrainingDiverged", "fit", "fit_density"]
