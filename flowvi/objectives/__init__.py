"""Objectives: functions that build a loss for `fit`."""

from flowvi.objectives.likelihood import NegativeLogLikelihood

__all__ = ["NegativeLogLikelihood"]
