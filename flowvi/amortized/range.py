"""How far an observation is from all simulations: the failure that a posterior does not show."""

import dataclasses

import numpy as np

from flowvi.params import Array, host_generator

#: Simulations that distances are measured to, and held-out ones whose distances tell what is far.
NUM_NEAR, NUM_HELD_OUT = 2_000, 1_000

#: Directions in which x is looked at, by their variance; what else there is counts as one more.
MOST_DIRECTIONS = 64

#: Observations whose distances are computed together.
CHUNK = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Range:
    """Where simulations lie, and how far from them held-out ones do.

    The distance of x is that to the nearest of some simulations, in coordinates in which these are
    white: asinh of (x - median) / spread, turned and scaled by their covariance.

    Attributes:
        center: the medians of x, made a vector, [F].
        spread: their interquartile ranges, or 1.
        mean: the mean of what asinh makes of that.
        turn: the principal directions, each divided by its standard deviation, [F, directions].
        back: the directions themselves, [F, directions].
        rest: the standard deviation of what the directions leave out; 0 where there is nothing.
        near: simulations in these coordinates, [m, directions (+ 1)].
        held_out: the distances of other simulations to these, in order of size.
    """

    center: np.ndarray
    spread: np.ndarray
    mean: np.ndarray
    turn: np.ndarray
    back: np.ndarray
    rest: float
    near: np.ndarray
    held_out: np.ndarray

    def distances(self, x: np.ndarray) -> np.ndarray:
        """The distances of observations [n, F], of shape [n]."""
        return _nearest(_white(self, x), self.near)

    @property
    def far(self) -> float:
        """The distance that 99 of 100 simulations do not reach."""
        return float(np.quantile(self.held_out, 0.99))


def range_of(x: np.ndarray, key: Array) -> Range:
    """The range of simulations of shape [n, F]."""
    rng = host_generator(key)
    rows = rng.permutation(len(x))
    num_held = min(NUM_HELD_OUT, len(x) // 3)
    held, near = rows[:num_held], rows[num_held : num_held + NUM_NEAR]
    some = np.asarray(x[near], np.float64)
    low, center, high = np.quantile(some, [0.25, 0.5, 0.75], 0)
    spread = np.where(high > low, high - low, np.where(some.std(0) > 0, some.std(0), 1.0))
    z = np.arcsinh((some - center) / spread)
    mean = z.mean(0)
    _, sizes, turned = np.linalg.svd(z - mean, full_matrices=False)
    sds = sizes / np.sqrt(max(len(z) - 1, 1))
    kept = min(int((sds > 1e-6 * max(sds[0], 1e-300)).sum()), MOST_DIRECTIONS) or 1
    back = turned[:kept].T
    rest = (z - mean) - (z - mean) @ back @ back.T
    rest_sd = float(np.sqrt((rest**2).sum(1).mean())) if kept < z.shape[1] else 0.0
    # Where simulations leave a direction out altogether, an observation should not have it either.
    rest_sd = max(rest_sd, 1e-3) if kept < z.shape[1] else 0.0
    turn = back / np.maximum(sds[:kept], 1e-12)
    found = Range(center, spread, mean, turn, back, rest_sd, np.zeros((1, 1)), np.zeros(1))
    found = dataclasses.replace(found, near=_white(found, some))
    distances = found.distances(np.asarray(x[held], np.float64))
    return dataclasses.replace(found, held_out=np.sort(distances))


def _white(place: Range, x: np.ndarray) -> np.ndarray:
    z = np.arcsinh((np.asarray(x, np.float64) - place.center) / place.spread) - place.mean
    white = z @ place.turn
    if not place.rest:
        return white
    rest = np.linalg.norm(z - z @ place.back @ place.back.T, axis=1, keepdims=True)
    return np.concatenate([white, rest / place.rest], 1)


def _nearest(points: np.ndarray, near: np.ndarray) -> np.ndarray:
    squares = (near**2).sum(1)
    result = []
    for start in range(0, len(points), CHUNK):
        some = points[start : start + CHUNK]
        each = (some**2).sum(1)[:, None] - 2 * some @ near.T + squares
        result.append(np.sqrt(np.maximum(each.min(1), 0)))
    return np.concatenate(result) if result else np.zeros(0)
