"""Calibration of posteriors, amortized and global ones alike."""

from flowvi.calibration.calibrate import CalibrationWarning, PosteriorCalibration, calibrate
from flowvi.calibration.local import LocalTest, local_c2st
from flowvi.calibration.uniform import Uniformity

__all__ = [
    "CalibrationWarning",
    "LocalTest",
    "PosteriorCalibration",
    "Uniformity",
    "calibrate",
    "local_c2st",
]
