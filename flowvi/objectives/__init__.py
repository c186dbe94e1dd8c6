"""Objectives: functions that build a loss for `fit`."""

from flowvi.objectives.bounds import CUBO, ELBO, IWELBO, Renyi
from flowvi.objectives.enumeration import Enumeration
from flowvi.objectives.likelihood import ForwardKL, NegativeLogLikelihood
from flowvi.objectives.matching import FlowMatching, training_loss
from flowvi.objectives.score import (
    ControlVariate,
    GradientMoments,
    LearnedBaseline,
    LeaveOneOut,
    RunningMean,
    RunningScale,
    ScoreFunction,
    SelfCritic,
    gradient_moments,
)
from flowvi.objectives.variational import Joint, Variational

__all__ = [
    "CUBO",
    "ELBO",
    "IWELBO",
    "ControlVariate",
    "Enumeration",
    "FlowMatching",
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
    "training_loss",
]
