"""Amortized posteriors without pairs: by the evidence lower bound, from a known likelihood."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from flowvi.amortized.posterior import LogJoint
from flowvi.densities.training import default_optimizer
from flowvi.families import Standardized
from flowvi.objectives import ELBO
from flowvi.params import Array, PyTree
from flowvi.training import FitResult, fit

#: Steps, the rate of learning at its peak, rows of a batch, draws of each, and decay of averages.
NUM_STEPS, LEARNING_RATE, BATCH_SIZE, NUM_DRAWS, AVERAGING = 5_000, 5e-3, 64, 8, 0.995


@dataclasses.dataclass(frozen=True)
class OfRows:
    """log p(u, x) of draws [num_samples, n, D] at the rows of a batch."""

    joint: LogJoint

    def __call__(self, params: PyTree, key: Array, z: Array, batch: dict[str, Array]) -> Array:
        del params, key
        rows = jax.vmap(self.joint.at)
        return jax.vmap(lambda draws: rows(draws, batch["x"]))(z)


def _context(batch: dict[str, Array]) -> Array:
    return batch["x"]


def by_evidence(
    family: Standardized, params: PyTree, joint: LogJoint, x: np.ndarray, key: Array, options: dict
) -> FitResult:
    """Trains q(u | x) to the greatest mean evidence lower bound of observations [n, *x_shape]."""
    steps = options.get("num_steps") or NUM_STEPS
    size = options.get("batch_size") or min(BATCH_SIZE, len(x))
    settings = {
        "optimizer": default_optimizer(steps, LEARNING_RATE),
        "averaging": AVERAGING,
        **options,
        "num_steps": steps,
        "batch_size": size,
    }
    loss = ELBO(family, OfRows(joint), num_samples=NUM_DRAWS, context=_context)
    data = {"x": np.asarray(x, jnp.result_type(float))}
    result = fit(
        loss, {"posterior": params}, settings.pop("optimizer"), key=key, data=data, **settings
    )
    both = [each["posterior"] for each in (result.params, result.last_params)]
    return dataclasses.replace(result, params=both[0], last_params=both[1])
