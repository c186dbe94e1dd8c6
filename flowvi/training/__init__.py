"""Training: the loop, its data, its stopping, its checkpoints, and the fit of a density."""

from flowvi.training.density import fit_density
from flowvi.training.loop import fit
from flowvi.training.result import FitResult, Look, StopReason, TrainingDiverged
from flowvi.training.stopping import Plateau
from flowvi.training.storage import load, save

__all__ = [
    "FitResult",
    "Look",
    "Plateau",
    "StopReason",
    "TrainingDiverged",
    "fit",
    "fit_density",
    "load",
    "save",
]
