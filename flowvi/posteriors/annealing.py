"""Draws of a density that need not lie where an approximation does, by annealing.

Particles begin in a mixture of the approximation's base and of wider ones, and are led to the
density over a ladder of temperatures, by weighting, resampling, and Hamiltonian moves in the
coordinates of that base: adaptive sequential Monte Carlo. Where the approximation is right the
ladder has one rung.

Source: Del Moral, Doucet, Jasra, "Sequential Monte Carlo Samplers", 2006.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from distrax import Distribution
from jax.scipy.special import logsumexp

from flowvi.compiling import compiled
from flowvi.distributions import FlowDistribution
from flowvi.families import Family
from flowvi.params import Array, PyTree, host_generator
from flowvi.posteriors.target import Target

#: Widths of the base's mixture, over that of the approximation.
WIDTHS = (1.0, 1.5, 3.0, 6.0, 12.0, 24.0)

#: The width of the base of a search for modes.
FAR = 50.0

#: Particles, Hamiltonian trajectories at each temperature, and gradients of each.
NUM_PARTICLES, NUM_TRAJECTORIES, NUM_LEAPS = 1000, 3, 6

#: The effective sample size, as a part of the particles, of a step between temperatures; and how
#: many of those there are at most.
LEAST_ESS, MOST_RUNGS = 0.5, 60

#: The acceptance rate that step sizes are chosen for.
ACCEPTANCE = 0.75


#: Particles farther away than this lead nowhere.
FARTHEST = 1e12


@dataclasses.dataclass(frozen=True)
class _Coordinates:
    """A flow, in whose base particles move, and a distribution that is part of where they begin."""

    flow: Family
    own: Family | None

    def push(self, params: PyTree, x: Array) -> tuple[Array, Array]:
        """(u, log |det du/dx|) at points of the base."""
        return from_root(self.flow.distribution(params[0]), x)

    def log_base(self, params: PyTree, x: Array, u: Array, log_det: Array, base: PyTree) -> Array:
        """The log density that particles begin with, in the coordinates of the base."""
        widths, shares = base
        size = x.shape[-1]
        each = jnp.log(shares) - size * jnp.log(widths) - 0.5 * size * jnp.log(2 * jnp.pi)
        each = each - 0.5 * jnp.sum(x * x, -1)[:, None] / widths**2
        if self.own is not None:
            log_own = self.own.distribution(params[1]).log_prob(u) + log_det
            each = each.at[:, 0].set(jnp.log(shares[0]) + log_own)
        return logsumexp(each, axis=-1)


@dataclasses.dataclass(frozen=True)
class Particles:
    """Draws of a density, and what it took.

    Attributes:
        u: of shape [num_particles, D].
        early: particles after the first step, of shape [num_particles, D].
        log_density: of shape [num_particles].
        log_evidence: the log of the normalising constant, in nats.
        error: its standard error, of the weights of all steps.
        num_rungs: steps between temperatures.
        num_gradients: evaluations of the density with its gradient.
    """

    u: np.ndarray
    early: np.ndarray
    log_density: np.ndarray
    log_evidence: float
    error: float
    num_rungs: int
    num_gradients: int


def anneal(
    family: Family,
    target: Target,
    params: PyTree,
    key: Array,
    *,
    widths: tuple[float, ...] = WIDTHS,
    num_particles: int = NUM_PARTICLES,
    least_ess: float = LEAST_ESS,
    own: tuple[Family, PyTree] | None = None,
) -> Particles:
    """Particles of the target, from the base of a flow and wider ones.

    Half of them begin in the narrowest of the widths, or, with `own`, in that distribution.
    """
    rng = host_generator(key)
    size, dtype = target.event_size, jnp.result_type(float)
    shares = np.full(len(widths), 0.5 / max(len(widths) - 1, 1))
    shares[0] = 1 - shares[1:].sum()
    counts = np.diff(np.floor(np.cumsum(shares) * num_particles + 0.5).astype(int), prepend=0)
    x = rng.standard_normal((num_particles, size)) * np.repeat(widths, counts)[:, None]
    flow = _Coordinates(family, None if own is None else own[0])
    params = (params, None if own is None else own[1])
    if own is not None:
        key, draw_key = jax.random.split(key)
        drawn = _draws(flow, target, params, draw_key, num_particles)
        x[: counts[0]] = np.asarray(drawn)[: counts[0]]
    base = jnp.asarray(widths, dtype), jnp.asarray(counts / num_particles, dtype)
    start = _start(flow, target, params, jnp.asarray(x, dtype), base, target.data)
    log_base, log_p = (np.asarray(each, np.float64) for each in start)
    x, power, log_z, variance = np.asarray(x, dtype), 0.0, 0.0, 0.0
    step_size, num_gradients, rungs, early = 1.0, num_particles, 0, x
    while power < 1 and rungs < MOST_RUNGS:
        difference = np.where(np.isfinite(log_p), log_p - log_base, -np.inf)
        if not np.isfinite(difference).any():
            break
        new = _next_power(difference, power, least_ess)
        log_weights = (new - power) * difference
        top = log_weights.max()
        weights = np.exp(log_weights - top)
        log_z += top + np.log(weights.mean())
        variance += weights.var() / weights.mean() ** 2 / num_particles
        places = (np.arange(num_particles) + rng.random()) / num_particles
        index = np.searchsorted(np.cumsum(weights / weights.sum()), places)
        index = index.clip(0, num_particles - 1)
        x, power, rungs = x[index], new, rungs + 1
        factor = _factor(x)
        for _ in range(NUM_TRAJECTORIES):
            key, move_key = jax.random.split(key)
            given = tuple(jnp.asarray(each, dtype) for each in (power, step_size, factor))
            moved = _move(flow, target, params, move_key, jnp.asarray(x), base, given, target.data)
            x, log_base, log_p, rate = jax.device_get(moved)
            step_size = float(np.clip(step_size * np.exp(rate - ACCEPTANCE), 1e-3, 3.0))
            num_gradients += num_particles * (NUM_LEAPS + 1)
        log_base, log_p = log_base.astype(np.float64), log_p.astype(np.float64)
        early = x if rungs == 1 else early
    u, log_det = _push(flow, target, params, jnp.asarray(x))
    return Particles(
        np.asarray(u),
        np.asarray(_push(flow, target, params, jnp.asarray(early))[0]),
        log_p - np.asarray(log_det, np.float64),
        log_z if power == 1 else np.nan,
        float(np.sqrt(variance)),
        rungs,
        num_gradients,
    )


def near(u: np.ndarray) -> np.ndarray:
    """Which particles lead somewhere: a density without an integral leads them anywhere."""
    return np.isfinite(u).all(-1) & (np.abs(u) < FARTHEST).all(-1)


def _next_power(difference: np.ndarray, power: float, least: float) -> float:
    """The next temperature, by bisection on the effective sample size."""

    def ess(new: float) -> float:
        weights = np.exp((new - power) * (difference - difference.max()))
        weights = np.where(np.isfinite(difference), weights, 0)
        return float(weights.sum() ** 2 / (weights**2).sum() / np.isfinite(difference).sum())

    if ess(1.0) >= least:
        return 1.0
    low, high = power, 1.0
    for _ in range(50):
        middle = 0.5 * (low + high) if low > 0 else max(high * 0.1, 1e-12)
        if ess(middle) >= least:
            low = middle
        else:
            high = middle
        if high - low < 1e-3 * high:
            break
    return max(low, power + 1e-12)


def _factor(x: np.ndarray) -> np.ndarray:
    """A Cholesky factor of the particles' covariance: the inverse of the moves' mass."""
    count, size = x.shape
    covariance = np.atleast_2d(np.cov(x.T))
    diagonal = np.diag(np.diag(covariance))
    shrink = size / (size + count)  # of few particles the correlations are noise
    covariance = (1 - shrink) * covariance + shrink * diagonal
    covariance += 1e-9 * np.trace(covariance) / size * np.eye(size)
    return np.linalg.cholesky(covariance).astype(x.dtype)


def from_root(distribution: FlowDistribution, x: Array) -> tuple[Array, Array]:
    """(u, log |det du/dx|) at points of the base at the bottom of all maps."""
    inner: Array | float = 0.0
    if isinstance(distribution.distribution, FlowDistribution):
        x, inner = from_root(distribution.distribution, x)
    u, log_det = distribution.bijector.forward_and_log_det(x.astype(distribution.dtype))
    return u, log_det + inner


def to_root(distribution: Distribution, u: Array) -> Array:
    """The inverse of `from_root`."""
    while isinstance(distribution, FlowDistribution):
        u, distribution = distribution.bijector.inverse(u), distribution.distribution
    return u


@compiled(2)
def _push(family: _Coordinates, target: Target, params: PyTree, x: Array) -> tuple[Array, Array]:
    return family.push(params, x)


@compiled(2, static_argnums=(4,))
def _draws(
    family: _Coordinates, target: Target, params: PyTree, key: Array, num_samples: int
) -> Array:
    """Draws of `own`, in the coordinates of the base."""
    u = family.own.distribution(params[1]).sample(seed=key, sample_shape=num_samples)  # type: ignore[union-attr]
    return to_root(family.flow.distribution(params[0]), u)


def _densities(
    family: _Coordinates, target: Target, params: PyTree, x: Array, base: PyTree, data: PyTree
) -> tuple[Array, Array]:
    """The log densities, in the coordinates of the base, of where it begins and of the target."""
    u, log_det = family.push(params, x)
    log_base = family.log_base(params, x, u, log_det, base)
    return log_base, target.log_joint({}, None, u, data) + log_det


@compiled(2)
def _start(
    family: _Coordinates, target: Target, params: PyTree, x: Array, base: PyTree, data: PyTree
) -> tuple[Array, Array]:
    return _densities(family, target, params, x, base, data)


@compiled(2)
def _move(
    family: _Coordinates,
    target: Target,
    params: PyTree,
    key: Array,
    x: Array,
    base: PyTree,
    given: tuple[Array, ...],
    data: PyTree,
) -> tuple[Array, Array, Array, Array]:
    """One Hamiltonian trajectory of each particle, for base^(1 - power) p^power."""
    power, step_size, factor = given

    def density(x: Array) -> tuple[Array, tuple[Array, Array]]:
        log_base, log_p = _densities(family, target, params, x, base, data)
        return jnp.sum((1 - power) * log_base + power * log_p), (log_base, log_p)

    gradient_of = jax.value_and_grad(density, has_aux=True)
    momentum_key, size_key, choice_key = jax.random.split(key, 3)
    momentum = jax.random.normal(momentum_key, x.shape, x.dtype)
    # Of each trajectory another step size: no length of it is a period.
    sizes = step_size * jax.random.uniform(size_key, (len(x), 1), x.dtype, 0.3, 1.3)
    sizes = sizes * x.shape[-1] ** -0.25

    # Leapfrog steps whose first and last kick are halves: one gradient in the program.
    kicks = jnp.ones(NUM_LEAPS + 1, x.dtype).at[jnp.array([0, -1])].set(0.5)
    drifts = jnp.ones(NUM_LEAPS + 1, x.dtype).at[-1].set(0.0)

    def leap(carry: tuple[Array, Array], parts: tuple[Array, Array]) -> tuple[PyTree, PyTree]:
        x, momentum = carry
        (_, values), gradient = gradient_of(x)
        momentum = momentum + parts[0] * sizes * (gradient @ factor)
        return (x + parts[1] * sizes * (momentum @ factor.T), momentum), values

    (new, last), values = jax.lax.scan(leap, (x, momentum), (kicks, drifts))
    before, after = ([each[place] for each in values] for place in (0, -1))

    def energy(momentum: Array, log_base: Array, log_p: Array) -> Array:
        return (1 - power) * log_base + power * log_p - 0.5 * jnp.sum(momentum**2, -1)

    change = energy(last, *after) - energy(momentum, *before)
    change = jnp.where(jnp.isfinite(change) & jnp.all(jnp.isfinite(new), -1), change, -jnp.inf)
    taken = jnp.log(jax.random.uniform(choice_key, (len(x),), x.dtype)) < change
    log_base, log_p = (jnp.where(taken, a, b) for a, b in zip(after, before, strict=True))
    rate = jnp.mean(jnp.exp(jnp.minimum(change, 0)))
    return jnp.where(taken[:, None], new, x), log_base, log_p, rate
