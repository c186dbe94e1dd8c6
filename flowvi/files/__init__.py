"""Files: what a fit returns, parameters and checkpoints, in one format that executes nothing."""

from flowvi.files.checkpoints import Checkpoints
from flowvi.files.container import Path, read, write
from flowvi.files.objects import describe, difference, load, save

__all__ = ["Checkpoints", "Path", "describe", "difference", "load", "read", "save", "write"]
