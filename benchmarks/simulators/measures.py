"""How far draws are from those of a reference."""

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import KFold, cross_val_score
from sklearn.neural_network import MLPClassifier


def c2st(reference: np.ndarray, draws: np.ndarray, seed: int = 1) -> float:
    """The cross-validated accuracy of a classifier between two sets of draws: 0.5 is perfect.

    Source: Lopez-Paz, Oquab, "Revisiting Classifier Two-Sample Tests", 2017; with the settings of
    Lueckmann et al., "Benchmarking Simulation-Based Inference", 2021.
    """
    loc, scale = reference.mean(0), reference.std(0)
    rows = np.concatenate([(each - loc) / scale for each in (reference, draws)])
    labels = np.repeat([0, 1], [len(reference), len(draws)])
    width = 10 * rows.shape[1]
    classifier = MLPClassifier((width, width), max_iter=10_000, solver="adam", random_state=seed)
    folds = KFold(5, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return float(cross_val_score(classifier, rows, labels, cv=folds).mean())
