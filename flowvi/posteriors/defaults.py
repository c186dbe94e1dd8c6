"""What is fitted by default: the family, how many steps and draws, the optimizer."""

import functools
from typing import NamedTuple

import numpy as np
import optax

from flowvi import checks
from flowvi.families import Family, Flow, Whitened, full_rank, iaf, mean_field, whitened
from flowvi.posteriors.search import ANY_HESSIAN
from flowvi.transformers import Transformer

#: Up to the first size there are autoregressive layers; beyond, marginal maps, and directions of a
#: low-rank start.
MODERATE, RANK = 200, 20


class Budget(NamedTuple):
    """What a fit of up to so many coordinates does by default; for the width, see `WideELBO`."""

    most_coordinates: float
    num_steps: int
    num_samples: int
    learning_rate: float
    careful_rate: float
    width: float


#: The careful rate is that of a user's family, whose networks may be of any kind, of a tempered
#: fit, which loses modes and tails at higher ones, and of a fit with little to gain. Wide draws
#: leave the bulk of the density where there are many coordinates.
BUDGETS = (
    Budget(10, 3_000, 128, 2e-2, 5e-3, 1.3),
    Budget(50, 2_500, 96, 5e-2, 1e-2, 1.0),
    Budget(MODERATE, 1_800, 128, 5e-2, 5e-3, 1.0),
    Budget(np.inf, 2_000, 64, 5e-3, 5e-3, 1.0),
)


def default_family(event_size: int, *, transformer: str | Transformer = "affine") -> Flow:
    """The flow that is fitted by default, in the units of the start.

    Four autoregressive layers that sample in one pass, and a triangular map after them; beyond 200
    coordinates a shift and a scale of each, after which `fit_posterior` puts marginal maps.
    """
    size = checks.positive_int("event_size", event_size)
    if size > MODERATE:
        return mean_field(size)
    hidden_sizes = (max(64, 2 * size),) * 2  # two units of each degree
    layers = iaf(size, num_layers=4, hidden_sizes=hidden_sizes, transformer=transformer)
    return Flow(layers, full_rank(size).transform)


@functools.lru_cache(maxsize=64)
def default_optimizer(num_steps: int, learning_rate: float) -> optax.GradientTransformation:
    """Adam with clipped gradients and a cosine decay."""
    schedule = optax.cosine_decay_schedule(learning_rate, num_steps, 0.01)
    return optax.chain(optax.clip_by_global_norm(10.0), optax.adam(schedule))


def placed(size: int, family: Family | None, tempering: float | None) -> Whitened:
    """A family, the default one by default, in the units of a start."""
    if isinstance(family, Whitened):
        return family
    marginal = "spline" if family is None and size > MODERATE else None
    if family is None:
        family = default_family(size, transformer="affine" if tempering is None else "spline")
    return whitened(family, rank=None if size <= ANY_HESSIAN else RANK, marginal=marginal)
