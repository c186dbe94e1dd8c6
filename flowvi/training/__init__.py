"""Training: the loop, its data, its stopping and its checkpoints."""

from flowvi.training.arguments import TrainingOptions
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
    "fit",
]

from flowvi.files import load, save  # noqa: F401  (until the merge)

Look = Progress
