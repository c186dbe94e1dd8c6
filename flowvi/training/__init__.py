"""Training: the loop, its data, its stopping and its checkpoints."""

from flowvi.training.arguments import TrainingOptions, check_names
from flowvi.training.loop import fit
from flowvi.training.result import FitResult, Fitted, Progress, StopReason, TrainingDiverged
from flowvi.training.stopping import Plateau

__all__ = [
    "FitResult",
    "Fitted",
    "Plateau",
    "Progress",
    "StopReason",
    "TrainingDiverged",
    "TrainingOptions",
    "check_names",
    "fit",
]
