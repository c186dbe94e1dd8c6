"""A fitted posterior: draws in the user's names, densities, and what to make of them."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flowvi import checks, diagnostics, plotting
from flowvi.compiling import compiled
from flowvi.diagnostics import PSIS, Estimate
from flowvi.families import Family
from flowvi.params import Array, PyTree
from flowvi.plotting.samples import as_table
from flowvi.posteriors.diagnosis import Diagnosis, diagnose
from flowvi.posteriors.start import Start
from flowvi.posteriors.target import Target, Theta, as_float
from flowvi.training import Fitted

if TYPE_CHECKING:
    from flowvi.plotting.curves import Figure

Draws = tuple[np.ndarray, np.ndarray, np.ndarray]

#: Draws of a diagnosis, and how many of them are evaluated together.
NUM_DIAGNOSIS, CHUNK = 10_000, 1000


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Posterior(Fitted):
    """What `fit_posterior` learned: a distribution over the unconstrained vector u.

    Attributes:
        target: the target.
        family: the family of the approximation q(u).
        start: where the fit started.
        diagnosis: what 10,000 importance weights said right after the fit.
    """

    target: Target
    family: Family
    start: Start
    diagnosis: Diagnosis

    def __repr__(self) -> str:
        found = self.diagnosis
        return (
            f"Posterior(event_size={self.target.event_size}, elbo={found.elbo.value:.4f}, "
            f"log_evidence={found.log_evidence.value:.4f}, khat={found.khat:.3f}, "
            f"ess={found.ess:.3f}, num_warnings={len(found.messages)})"
        )

    def sample(self, key: Array, num_samples: int) -> Theta:
        """Draws: {name: array of shape [num_samples, *shape]}, or an array [num_samples, D]."""
        return self.constrain(self._draws(key, num_samples)[0])

    def sample_and_log_prob(self, key: Array, num_samples: int) -> tuple[Array, Array]:
        """Draws u of shape [num_samples, D], unconstrained, and log q(u) of shape [num_samples]."""
        u, log_q, _ = self._draws(key, num_samples)
        return jnp.asarray(u), jnp.asarray(log_q)

    def log_prob(self, u: ArrayLike) -> Array:
        """log q(u) of shape [...], for unconstrained u of shape [..., D]."""
        return self.family.log_prob(self.params, as_float(u))

    def constrain(self, u: ArrayLike) -> Theta:
        """The user's parameters at u of shape [..., D]: {name: array}, or u itself."""
        return self.target.constrain(u)

    def log_weights(self, key: Array, num_samples: int) -> np.ndarray:
        """log p(u) - log q(u) at draws u of q, of shape [num_samples]."""
        return self._draws(key, num_samples)[2]

    def elbo(self, key: Array, num_samples: int = NUM_DIAGNOSIS) -> Estimate:
        """The evidence lower bound E_q [log p(u) - log q(u)], in nats; no draw may be NaN."""
        return diagnostics.elbo(self.log_weights(key, num_samples))

    def log_evidence(self, key: Array, num_samples: int = NUM_DIAGNOSIS) -> Estimate:
        """The log of the normalising constant, in nats, by importance sampling from q."""
        return diagnostics.log_evidence(_weightless(self.log_weights(key, num_samples)))

    def psis(self, key: Array, num_samples: int = NUM_DIAGNOSIS) -> PSIS:
        """Pareto-smoothed importance weights of the draws that `sample` gives at the same key."""
        return diagnostics.psis(_weightless(self.log_weights(key, num_samples)))

    def resample(self, key: Array, num_samples: int, *, num_proposals: int | None = None) -> Theta:
        """Draws as `sample` gives them, corrected by importance resampling.

        Draws of q, by default 10 times as many, are drawn again, with replacement, by their
        smoothed weights. That mends what k-hat below 0.7 leaves to be mended; it cannot find a
        missing mode.
        """
        num_samples = checks.positive_int("num_samples", num_samples)
        count = 10 * num_samples if num_proposals is None else num_proposals
        draw_key, choice_key = jax.random.split(key)
        u, _, weights = self._draws(draw_key, count, "num_proposals")
        smoothed = diagnostics.psis(_weightless(weights)).log_weights
        # One stratum for each draw: less noise than independent choices.
        rng = np.random.default_rng(np.asarray(jax.random.key_data(choice_key)).ravel())
        places = (np.arange(num_samples) + rng.random(num_samples)) / num_samples
        index = np.searchsorted(np.cumsum(np.exp(smoothed)), places).clip(0, len(u) - 1)
        return self.constrain(u[rng.permutation(index)])

    def diagnose(self, key: Array, num_samples: int = NUM_DIAGNOSIS) -> Diagnosis:
        """The diagnosis of fresh draws."""
        return diagnose(self.log_weights(key, num_samples))

    def summary(self, key: Array, num_samples: int = NUM_DIAGNOSIS) -> "Summary":
        """Mean, standard deviation and quantiles of every parameter, under q and reweighted."""
        u, _, log_weights = self._draws(key, num_samples)
        x = as_table(self.constrain(u))
        weights = np.exp(diagnostics.psis(_weightless(log_weights)).log_weights)
        mean = weights @ x
        sd = np.sqrt(weights @ (x - mean) ** 2)
        q05, median, q95 = np.quantile(x, [0.05, 0.5, 0.95], axis=0)
        return Summary(self.target.labels(), x.mean(0), x.std(0), q05, median, q95, mean, sd)

    def plot(
        self,
        names: Sequence[str] | None = None,
        *,
        key: Array | None = None,
        num_samples: int = 4_000,
        reference: ArrayLike | None = None,
    ) -> "Figure":
        """A picture of marginals and pairs; see `flowvi.plotting.pairs`."""
        key = jax.random.key(0) if key is None else key
        return plotting.pairs(self, key, names=names, num_samples=num_samples, reference=reference)

    def _draws(self, key: Array, num_samples: int, name: str = "num_samples") -> Draws:
        count = checks.positive_int(name, num_samples)
        return draws(self.family, self.target, self.params, key, count)


@dataclasses.dataclass(frozen=True)
class Summary:
    """A table of the parameters: one number for each of the `labels`.

    The first columns are those of draws, the weighted ones of the same by their importance weights.
    """

    labels: list[str]
    mean: np.ndarray
    sd: np.ndarray
    q05: np.ndarray
    median: np.ndarray
    q95: np.ndarray
    weighted_mean: np.ndarray
    weighted_sd: np.ndarray

    def __str__(self) -> str:
        labels, *columns = vars(self).values()
        width = max(10, *map(len, labels))
        heads = [name.replace("_", " ") for name in vars(self)][1:]
        rows = [" " * width + "".join(f"{head:>15}" for head in heads)]
        for label, *cells in zip(labels, *columns, strict=True):
            rows.append(f"{label:<{width}}" + "".join(f"{cell:15.4g}" for cell in cells))
        return "\n".join(rows)


def _weightless(log_weights: np.ndarray) -> np.ndarray:
    """Log weights, in which a draw without a density has no weight."""
    return np.where(np.isnan(log_weights), -np.inf, log_weights)


def draws(
    family: Family, target: Target, params: PyTree, key: Array, num_samples: int = NUM_DIAGNOSIS
) -> Draws:
    """(u, log q, log p - log q) of draws of q, by one program for any number of them."""
    keys = (jax.random.fold_in(key, index) for index in range(-(-num_samples // CHUNK)))
    parts = [jax.device_get(_chunk(family, target, params, k, target.data)) for k in keys]
    u, log_q, log_p = (np.concatenate(column)[:num_samples] for column in zip(*parts, strict=True))
    return u, log_q, log_p.astype(np.float64) - log_q


@compiled(2)
def _chunk(family: Family, target: Target, params: PyTree, key: Array, data: PyTree) -> PyTree:
    u, log_q = family.distribution(params).sample_and_log_prob(seed=key, sample_shape=CHUNK)
    return u, log_q, target.log_joint({}, key, u, data)
