"""Objectives: functions that build a loss for `fit`."""

from flowvi.objectives.bounds import CUBO, IWELBO, Renyi
from flowvi.objectives.elbo import ELBO
from flowvi.objectives.enumeration import Enumeration
from flowvi.objectives.forward import ForwardKL
from flowvi.objectives.likelihood import NegativeLogLikelihood
from flowvi.objectives.noise import GradientMoments, gradient_moments
from flowvi.objectives.score import (
    ControlVariate,
    LearnedBaseline,
    LeaveOneOut,
    RunningMean,
    RunningScale,
    ScoreFunction,
    SelfCritic,
)
from flowvi.objectives.variational import Joint, Variational

__all__ = [
    "CUBO",
    "ELBO",
    "IWELBO",
    "ControlVariate",
    "Enumeration",
    "ForwardKL",
    "GradientMoments",
    "Joint",
    "LearnedBaseline",
    "LeaveOneOut",
    "NegativeLogLikelihood",
    "Renyi",
    "RunningMean",
    "RunningScale",
    "ScoreFunction",
    "SelfCritic",
    "Variational",
    "gradient_moments",
]
