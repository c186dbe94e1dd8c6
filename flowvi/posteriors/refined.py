"""Exact draws: chains that move in the coordinates of a fitted flow."""

import dataclasses
import warnings
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from flowvi import checks, diagnostics, interop
from flowvi.compiling import compiled
from flowvi.diagnostics import Estimate
from flowvi.distributions import FlowDistribution
from flowvi.families import Family
from flowvi.families.copies import Copies, MixtureOfCopies
from flowvi.families.family import bare
from flowvi.params import Array, PyTree, host_generator
from flowvi.plotting.samples import as_table
from flowvi.posteriors.annealing import from_root, to_root
from flowvi.posteriors.diagnosis import PosteriorWarning
from flowvi.posteriors.target import Target, Theta

if TYPE_CHECKING:
    from flowvi.posteriors.posterior import Posterior

#: Beyond these chains warn: R-hat, the part of draws that diverged, the effective sample size of
#: each chain, and nats that the log evidence moves, beside its standard errors.
MAX_RHAT, MAX_DIVERGENT, LEAST_ESS, MAX_CHANGE = 1.01, 0.005, 50.0, 0.1


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Refined:
    """Draws of several chains, which are exact whatever the posterior they came from left out.

    Attributes:
        target: the target.
        u: of shape [num_chains, num_draws, D], unconstrained.
        log_density: of the target, of shape [num_chains, num_draws].
        is_divergent: whether NUTS diverged on its way to a draw, likewise.
        acceptance: the mean acceptance rate of each chain.
        rhat: the R-hat of each coordinate in the user's space, in the order of `labels`.
        ess: its effective sample size.
        log_evidence: by bridge sampling between draws of the posterior and of the chains.
        num_gradients: evaluations of the density with its gradient, warm-up included.
        messages: what is wrong; empty where nothing is.
    """

    target: Target
    u: np.ndarray
    log_density: np.ndarray
    is_divergent: np.ndarray
    acceptance: np.ndarray
    rhat: np.ndarray
    ess: np.ndarray
    log_evidence: Estimate
    num_gradients: int
    messages: tuple[str, ...]

    @property
    def draws(self) -> Theta:
        """{name: array of shape [num_chains, num_draws, *shape]}, or an array [..., D]."""
        return self.target.constrain(self.u)

    @property
    def labels(self) -> list[str]:
        """One label for each number, in the user's names."""
        return self.target.labels()

    def __repr__(self) -> str:
        chains, draws = self.u.shape[:2]
        return (
            f"Refined(num_chains={chains}, num_draws={draws}, max_rhat={self.rhat.max():.3f}, "
            f"min_ess={self.ess.min():.0f}, num_divergent={int(self.is_divergent.sum())}, "
            f"log_evidence={self.log_evidence.value:.4f})"
        )

    def __str__(self) -> str:
        x = as_table(self.target.constrain(self.u.reshape(-1, self.u.shape[-1])))
        columns = {
            "mean": x.mean(0),
            "sd": x.std(0),
            **dict(
                zip(("q05", "median", "q95"), np.quantile(x, (0.05, 0.5, 0.95), 0), strict=True)
            ),
            "ess": self.ess,
            "rhat": self.rhat,
        }
        width = max(10, *map(len, self.labels))
        rows = [" " * width + "".join(f"{name:>11}" for name in columns)]
        for index, label in enumerate(self.labels):
            cells = "".join(f"{column[index]:11.4g}" for column in columns.values())
            rows.append(f"{label:<{width}}{cells}")
        evidence = self.log_evidence
        rows.append(f"log evidence {evidence.value:.4f} +- {evidence.standard_error:.4f}")
        return "\n".join(rows + [f"! {message}" for message in self.messages])


def refine(
    posterior: "Posterior", key: Array, num_draws: int, num_chains: int, num_warmup: int
) -> Refined:
    """Chains by NUTS in the coordinates of a posterior's flow; see `Posterior.refine`."""
    sampler = interop.adapter("blackjax", "posterior.refine")
    stats = interop.adapter("arviz_stats", "posterior.refine")
    counts = {"num_draws": num_draws, "num_chains": num_chains, "num_warmup": num_warmup}
    for name, count in counts.items():
        checks.positive_int(name, count)
    family, target, params = posterior.family, posterior.target, posterior.params
    start_key, chain_key, bridge_key = jax.random.split(key, 3)
    weights = posterior.log_weights(start_key, 1000)
    u = posterior.sample_and_log_prob(start_key, 1000)[0]
    # Chains begin at draws by their weights: in all modes that were found.
    rng = host_generator(start_key)
    smoothed = diagnostics.psis(np.where(np.isfinite(weights), weights, -np.inf)).log_weights
    shares = np.exp(smoothed) if np.isfinite(smoothed).all() else np.isfinite(weights) * 1.0
    places = rng.choice(len(shares), num_chains, p=shares / shares.sum())
    keys = jax.random.split(chain_key, num_chains)
    given = keys, jnp.asarray(u)[places]
    u, chain = jax.device_get(
        _chains(family, target, sampler.run, params, *given, target.data, num_warmup, num_draws)
    )
    log_density = np.asarray(target(u.reshape(-1, u.shape[-1])), np.float64)
    x = as_table(target.constrain(u.reshape(-1, u.shape[-1])))
    rhat, ess = stats.rhat_and_ess(x.reshape(num_chains, num_draws, -1))
    log_q = np.asarray(posterior.log_prob(u.reshape(-1, u.shape[-1])), np.float64)
    own = posterior.log_weights(bridge_key, num_chains * num_draws)
    evidence = diagnostics.bridge(own, log_density - log_q, float(np.min(ess)))
    refined = Refined(
        target,
        u,
        log_density.reshape(num_chains, num_draws),
        chain.is_divergent,
        chain.acceptance.mean(-1),
        np.asarray(rhat),
        np.asarray(ess),
        evidence,
        int(chain.num_leaps.sum()),
        (),
    )
    messages = tuple(_messages(refined, posterior.diagnosis.log_evidence))
    if messages:
        text = f"These draws should not be trusted as they are. {' '.join(messages)}"
        warnings.warn(text, PosteriorWarning, stacklevel=3)
    return dataclasses.replace(refined, messages=messages)


def _messages(refined: Refined, before: Estimate) -> list[str]:
    messages, labels = [], refined.labels
    # Of a constant coordinate R-hat is no number.
    worst = int(np.nanargmax(refined.rhat)) if np.isfinite(refined.rhat).any() else 0
    if not refined.rhat[worst] <= MAX_RHAT:
        messages.append(f"R-hat of {labels[worst]} is {refined.rhat[worst]:.3f}, above {MAX_RHAT}.")
    few, chains = int(np.nanargmin(refined.ess)), len(refined.u)
    if not refined.ess[few] >= LEAST_ESS * chains:
        least = f"below {LEAST_ESS:g} for each chain"
        messages.append(
            f"The effective sample size of {labels[few]} is {refined.ess[few]:.0f}, {least}."
        )
    if refined.is_divergent.mean() > MAX_DIVERGENT:
        messages.append(f"{refined.is_divergent.mean():.1%} of the steps of NUTS diverged.")
    change = refined.log_evidence.value - before.value
    error = float(np.hypot(refined.log_evidence.standard_error, before.standard_error))
    if not abs(change) <= max(MAX_CHANGE, 4 * error):
        what = f"by {change:+.2f} +- {error:.2f} nats: that missed what chains found"
        messages.append(f"They move the log evidence of the posterior {what}.")
    return messages


@compiled(3, static_argnums=(7, 8))
def _chains(
    family: Family,
    target: Target,
    run: object,
    params: PyTree,
    keys: Array,
    u: Array,
    data: PyTree,
    num_warmup: int,
    num_draws: int,
) -> PyTree:
    """Chains from points u of shape [C, D]: (u of shape [C, num_draws, D], how they went)."""
    mixture = family.distribution(params)
    if not isinstance(family, Copies):  # one flow is a mixture of one
        family, stacked = Copies(family, 1), jax.tree.map(lambda a: a[None], bare(params))
        mixture = MixtureOfCopies(family.family, stacked, jnp.zeros(1, mixture.dtype))
    else:
        stacked = params["copies"]

    def member(index: Array) -> FlowDistribution:
        return family.family.distribution(jax.tree.map(lambda a: a[index], stacked))

    def log_share(u: Array, index: Array) -> Array | float:
        """log of the part of the density at u that belongs to a member; see `posteriors.modes`."""
        if family.count == 1:  # at every step of NUTS, and for an inverse of the flow
            return 0.0
        each = mixture.log_prob_each(u)
        return each[index] - jax.nn.logsumexp(each)

    def log_density(x: Array, index: Array) -> Array:
        u, log_det = from_root(member(index), x)
        return target.at(u, data) + log_det + log_share(u, index)

    def log_weight(u: Array) -> Array:
        return target.at(u, data) - mixture.log_prob(u)

    def switch(key: Array, x: Array, index: Array) -> tuple[Array, Array]:
        """A draw of the posterior instead, by Metropolis; then the member by its part there."""
        draw_key, take_key, index_key = jax.random.split(key, 3)
        u, other = from_root(member(index), x)[0], mixture.sample(seed=draw_key)
        change = log_weight(other) - log_weight(u)
        change = jnp.where(jnp.isnan(change), -jnp.inf, change)
        new = jnp.where(jnp.log(jax.random.uniform(take_key)) < change, other, u)
        index = jax.random.categorical(index_key, mixture.log_prob_each(new))
        return to_root(member(index), new), index

    def chain(key: Array, u: Array) -> PyTree:
        first_key, key = jax.random.split(key)
        index = jax.random.categorical(first_key, mixture.log_prob_each(u))
        x = to_root(member(index), u)
        made = run(log_density, switch, key, x, index, num_warmup, num_draws)  # type: ignore[operator]
        return jax.vmap(lambda x, i: from_root(member(i), x)[0])(made.x, made.member), made

    return jax.vmap(chain)(keys, u)
