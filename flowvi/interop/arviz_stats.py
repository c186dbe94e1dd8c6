"""Convergence of chains, by arviz-stats."""

import numpy as np
from arviz_stats.base import array_stats


def rhat_and_ess(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """R-hat by rank, and effective sample sizes in the bulk, of [num_chains, num_draws, D]."""
    axes = {"chain_axis": 0, "draw_axis": 1}
    return array_stats.rhat(x, **axes), array_stats.ess(x, **axes)
