"""Rounds of simulations for one observation, from truncated priors."""

import dataclasses
import warnings
from typing import Unpack, cast

import jax
import numpy as np
from jax.typing import ArrayLike

from flowvi import checks
from flowvi.amortized import simulations
from flowvi.amortized.fit import fit_amortized
from flowvi.amortized.posterior import AmortizationWarning, AmortizedPosterior
from flowvi.amortized.prior import Prior, as_prior
from flowvi.amortized.simulations import Simulator
from flowvi.families import Family, check_key
from flowvi.layouts import Theta
from flowvi.params import Array, PyTree
from flowvi.training import TrainingOptions

#: The probability that a truncation leaves out, and draws that tell the density at its border.
LEFT_OUT, NUM_BORDER = 1e-4, 20_000

#: Draws of the prior that are looked at together, and how many times at most.
CHUNK, MOST_CHUNKS = 50_000, 200


def fit_rounds(
    prior: object,
    simulator: Simulator,
    observed: ArrayLike,
    *,
    key: Array,
    num_rounds: int = 4,
    num_simulations: int = 10_000,
    num_processes: int | None = None,
    family: Family | None = None,
    embedding: PyTree = None,
    **options: Unpack[TrainingOptions],
) -> AmortizedPosterior:
    """Fits the posterior of one observation, with simulations where it matters.

    The first round draws parameters from the prior. Each later one draws from the prior too, but
    keeps only draws inside the region of highest density of the posterior so far, that with the
    probability 1 - 1e-4 at this observation. There the proposal is the prior up to a constant, so
    that the loss needs no correction; all rounds are trained on together.

    Args:
        prior: as in `fit_amortized`, as are `simulator`, `key` and `num_processes`.
        simulator: see there.
        observed: the observation, of shape [*x_shape].
        key: see there.
        num_rounds: rounds.
        num_simulations: pairs to simulate, in all rounds together.
        num_processes: see there.
        family: see there, as are `embedding` and `**options`.
        embedding: see there.
        **options: see there.

    Returns:
        An `AmortizedPosterior` that is right at `observed` only, and warns elsewhere.

    Raises:
        ValueError: if hardly anything of the prior is left.

    Source: Deistler, Goncalves, Macke, "Truncated Proposals for Scalable and Hassle-Free
    Simulation-Based Inference", 2022.

    Example:
        >>> import jax, flowvi as fv
        >>> import numpy as np
        >>> simulator = lambda key, theta: theta + 0.3 * jax.random.normal(key, (1,))
        >>> prior = fv.Prior(lambda key, n: jax.random.uniform(key, (n, 1)), support=(0, 1))
        >>> fitted = fv.fit_rounds(
        ...     prior,
        ...     simulator,
        ...     np.array([0.4]),
        ...     key=jax.random.key(0),
        ...     family=fv.maf(1, num_layers=1, hidden_sizes=[8], context_size=1),
        ...     num_rounds=2,
        ...     num_simulations=1000,
        ...     num_steps=20,
        ...     progress=False,
        ... )
        >>> fitted.observed
        array([0.4])
    """
    check_key(key)
    num_rounds = checks.positive_int("num_rounds", num_rounds)
    total = checks.positive_int("num_simulations", num_simulations)
    own = as_prior(prior)
    seen = np.asarray(observed)
    simulations.check_observations(seen, seen.shape)
    found: AmortizedPosterior | None = None
    thetas: list[Theta] = []
    xs: list[np.ndarray] = []
    for number in range(num_rounds):
        draw_key, sim_key, fit_key = jax.random.split(jax.random.fold_in(key, number), 3)
        size = total // num_rounds + (number < total % num_rounds)
        theta = _draws(own, found, seen, draw_key, size)
        thetas.append(theta)
        xs.append(simulations.simulated(simulator, theta, sim_key, num_processes))
        rule = f"`observed` must have the shape of simulations, {xs[0].shape[1:]}"
        checks.require(seen.shape == xs[0].shape[1:], rule, seen.shape)
        together = jax.tree.map(lambda *leaves: np.concatenate(leaves), *thetas)
        found = fit_amortized(
            own,
            pairs=(together, np.concatenate(xs)),
            key=fit_key,
            family=family,
            embedding=embedding,
            # Pairs that a likelihood makes would have to come from the same proposals.
            augment=False,
            **options,
        )
    return dataclasses.replace(cast(AmortizedPosterior, found), observed=seen)


def _draws(
    prior: Prior, found: AmortizedPosterior | None, observed: np.ndarray, key: Array, number: int
) -> Theta:
    """Draws of the prior, of those where the posterior so far has its mass."""
    if found is None:
        return jax.device_get(prior.sample(key, number))
    border_key, key = jax.random.split(key)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AmortizationWarning)
        _, log_q = found.sample_and_log_prob(observed, border_key, NUM_BORDER)
    border = np.quantile(log_q, LEFT_OUT)
    kept: list[Theta] = []
    count = 0
    for index in range(MOST_CHUNKS):
        theta = jax.device_get(prior.sample(jax.random.fold_in(key, index), CHUNK))
        inside = found.log_prob(observed, theta) > border
        kept.append(jax.tree.map(lambda leaf: leaf[inside], theta))  # noqa: B023
        count += int(inside.sum())
        if count >= number:
            together = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:number], *kept)
            return together
    looked = MOST_CHUNKS * CHUNK
    rule = f"`num_simulations` of {number} in a round must be found among {looked:,} of the prior"
    fix = "Perhaps fewer rounds?"
    raise ValueError(f"{rule}; got {count} where the posterior has its mass. {fix}")
