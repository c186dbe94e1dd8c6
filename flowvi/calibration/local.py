"""The local classifier two-sample test: whether a posterior is right at one observation."""

import dataclasses
import warnings
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.typing import ArrayLike
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

from flowvi import checks, plotting
from flowvi.calibration.calibrate import table_of_draws
from flowvi.families import check_key
from flowvi.layouts import Theta
from flowvi.params import Array, host_generator
from flowvi.plotting.samples import as_table

if TYPE_CHECKING:
    from flowvi.plotting.curves import Figure

#: Draws by which the units of each posterior are known.
NUM_UNITS = 100

#: Classifiers of shuffled labels, draws at the observation, and units of the hidden layers.
NUM_NULL, NUM_DRAWS, WIDTH = 20, 2_000, 32


@dataclasses.dataclass(frozen=True, eq=False)
class LocalTest:
    """Whether a posterior is right at one observation.

    Attributes:
        statistic: the mean of (p - 1/2)^2 over draws at the observation, where p is the probability
            by which a classifier takes them for the truth: 0 where it cannot tell.
        null: the same of classifiers that were trained on shuffled labels, in order of size.
        p_value: the part of the null at or above the statistic.
        probabilities: p of each draw. Above 1/2 there should be more draws, below fewer.
    """

    statistic: float
    null: np.ndarray = dataclasses.field(repr=False)
    p_value: float
    probabilities: np.ndarray = dataclasses.field(repr=False)

    def __str__(self) -> str:
        error = float(self.null.std())
        verdict = "is told from" if self.p_value <= 0.05 else "is not told from"
        return (
            f"local C2ST {self.statistic:.4f} +- {error:.4f}, p = {self.p_value:.3f}: "
            f"the posterior {verdict} the true one here"
        )

    def plot(self) -> "Figure":
        """A picture: the statistic among those of shuffled labels."""
        return plotting.null_test(self.statistic, self.null)


def local_c2st(
    posterior: Any,
    theta: Theta,
    x: ArrayLike,
    observed: ArrayLike,
    *,
    key: Array,
    num_draws: int = NUM_DRAWS,
    num_null: int = NUM_NULL,
) -> LocalTest:
    """Whether q(theta | x) is right at one observation, by a classifier of fresh pairs.

    A classifier learns to tell pairs (theta, x) of the simulator from pairs (a draw of q(. | x), x)
    and is then asked at draws of q for the observation alone. Where it is always at 1/2, q is right
    there, as far as it can see. Its statistic is held to those of classifiers of shuffled labels.

    Args:
        posterior: an `AmortizedPosterior`.
        theta: parameters of shape [n, *shape], or {name: array}, drawn from the prior.
        x: observations of shape [n, *x_shape], one made at each of them, that the posterior was not
            trained on; 1,000 or more.
        observed: the observation, of shape [*x_shape].
        key: a random key.
        num_draws: draws of q at the observation.
        num_null: classifiers of shuffled labels.

    Raises:
        ValueError: if rows of `x` and `theta` are not as many.

    Source: Linhart, Gramfort, Rodrigues, "L-C2ST: Local Diagnostics for Posterior Approximations in
    Simulation-Based Inference", 2023.

    Example:
        >>> import jax, flowvi as fv
        >>> import numpy as np
        >>> theta = jax.random.normal(jax.random.key(0), (1000, 1))
        >>> x = theta + jax.random.normal(jax.random.key(1), (1000, 1))
        >>> class Posterior:  # the true one, as an `AmortizedPosterior` would say it
        ...     def sample(self, x, key, n):
        ...         return x / 2 + np.sqrt(0.5) * jax.random.normal(key, (n, *x.shape))
        >>> test = fv.local_c2st(
        ...     Posterior(), theta, x, np.zeros(1), key=jax.random.key(2), num_null=2
        ... )
        >>> bool(test.statistic < 0.1)
        True
    """
    check_key(key)
    num_null = checks.positive_int("num_null", num_null)
    pair_key, draw_key, seed_key = jax.random.split(key, 3)
    rng = host_generator(seed_key)
    seen, truth = np.asarray(x, float), as_table(theta)
    rule = f"`x` must have a row for each of the {len(truth)} rows of `theta`"
    checks.require(len(seen) == len(truth), rule, f"shape {seen.shape}", say=str)
    some = table_of_draws(posterior.sample(seen, pair_key, 1 + NUM_UNITS))
    at = as_table(posterior.sample(np.asarray(observed), draw_key, num_draws))
    ours, loc, scale = some[0], some[1:].mean(0), _positive(some[1:].std(0))
    flat = seen.reshape(len(seen), -1)
    flat_at = np.broadcast_to(np.asarray(observed, float).ravel(), (len(at), flat.shape[1]))
    middle, spread = flat.mean(0), _positive(flat.std(0))

    def features(
        theta: np.ndarray, loc: np.ndarray, scale: np.ndarray, x: np.ndarray
    ) -> np.ndarray:
        # In the units of each posterior, so that what is wrong everywhere looks alike everywhere.
        whole = (theta - loc) / scale
        return np.concatenate([whole, whole**2, (x - middle) / spread], 1)

    rows = np.concatenate([features(each, loc, scale, flat) for each in (ours, truth)])
    asked = features(at, at.mean(0), _positive(at.std(0)), flat_at)
    labels = np.repeat([0, 1], len(truth))

    def probabilities(labels: np.ndarray) -> np.ndarray:
        seed = int(rng.integers(2**31))
        # Stopped early: a classifier that follows its pairs sees differences that are none.
        network = MLPClassifier((WIDTH, WIDTH), early_stopping=True, random_state=seed, alpha=1e-3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return network.fit(rows, labels).predict_proba(asked)[:, 1]

    found = probabilities(labels)
    statistic = float(((found - 0.5) ** 2).mean())
    null = np.empty(num_null)
    for number in range(num_null):
        # A pair keeps one of its two halves, whichever: so x tells nothing of the label.
        swapped = rng.random(len(truth)) < 0.5
        shuffled = np.where(np.tile(swapped, 2), 1 - labels, labels)
        null[number] = ((probabilities(shuffled) - 0.5) ** 2).mean()
    p_value = float((1 + (null >= statistic).sum()) / (1 + num_null))
    return LocalTest(statistic, np.sort(null), p_value, found)


def _positive(scale: np.ndarray) -> np.ndarray:
    return np.where(scale > 0, scale, 1)
