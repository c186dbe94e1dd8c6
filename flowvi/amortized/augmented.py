"""More pairs than were simulated: from the likelihood that those teach.

Often x given theta is far simpler than theta given x: a flow learns the one from few pairs, and the
other needs many. So a flow is fitted to x given theta, fresh parameters are drawn from the prior,
and x at them from the flow: as many pairs as one wants, which are as good as that flow is. Whether
they helped, pairs of the simulator tell that were held out.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from flowvi.amortized.prior import Prior
from flowvi.amortized.simulations import unconstrained, vector
from flowvi.densities.data import Split
from flowvi.densities.training import Training, fresh
from flowvi.families import Standardized, conditional, maf, standardized
from flowvi.layouts import Layout, Theta
from flowvi.networks import MLP
from flowvi.params import Array, PyTree

#: Columns of x and pairs up to which a likelihood is learned; pairs that it makes, and steps.
MOST_COLUMNS, MOST_PAIRS, NUM_MADE, NUM_STEPS = 40, 100_000, 300_000, 10_000

#: Features, widths and layers of the flow of x given theta.
FEATURES, WIDTHS, NUM_LAYERS = 32, (64, 64), 3

#: Draws that are made together.
CHUNK = 20_000


@dataclasses.dataclass(frozen=True, eq=False)
class Likelihood:
    """A flow of x given the vector of all parameters."""

    family: Standardized
    params: PyTree

    def sample(self, theta: np.ndarray, key: Array) -> np.ndarray:
        """One x at each row of theta [n, K]."""
        found = []
        for start in range(0, len(theta), CHUNK):
            some = theta[start : start + CHUNK]
            own = jax.random.fold_in(key, start)
            found.append(np.asarray(self.family.sample(self.params, own, (), some)))
        return np.concatenate(found)


def learned(
    x: np.ndarray, theta: np.ndarray, held: np.ndarray, training: Training, key: Array
) -> Likelihood:
    """The likelihood that pairs teach; `held` are rows that are held out."""
    columns, size = x.shape[1], theta.shape[1]
    options: dict[str, Any] = {"num_layers": NUM_LAYERS, "hidden_sizes": WIDTHS}
    flow = maf(columns, context_size=FEATURES, transformer="scaled", **options)
    family = standardized(conditional(flow, MLP(size, WIDTHS, FEATURES)))
    split = Split(x, theta, held)
    params = family.place(fresh(family, key), *split.whole_training())
    return Likelihood(family, training.run(family, params, split, key).params)


def made(
    likelihood: Likelihood, prior: Prior, layout: Layout, key: Array, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """(unconstrained vectors, x) of fresh draws of the prior."""
    prior_key, key = jax.random.split(key)
    theta: Theta = jax.device_get(prior.sample(prior_key, number))
    x = likelihood.sample(vector(layout, theta), key)
    good = np.isfinite(x).all(1)
    return unconstrained(layout, theta)[good], x[good]
