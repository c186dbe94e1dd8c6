"""Five tasks of simulation-based inference: a prior, a simulator and reference posteriors.

Source: Lueckmann, Boelts, Greenberg, Goncalves, Macke, "Benchmarking Simulation-Based Inference",
2021.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable

import distrax
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of the benchmark.

    Attributes:
        prior: a distribution of theta, a vector.
        simulator: (key, theta of shape [D]) -> x.
        support: where theta may lie.
        log_likelihood: (theta, x) -> log p(x | theta), where it is known.
    """

    prior: distrax.Distribution
    simulator: Callable[[Array, Array], Array]
    support: tuple[float, float] | None = None
    log_likelihood: Callable[[Array, Array], Array] | None = None


def _box(size: int, bound: float) -> distrax.Distribution:
    ends = (jnp.full(size, -bound), jnp.full(size, bound))
    return distrax.Independent(distrax.Uniform(*ends), 1)


def _normal(size: int, variance: float) -> distrax.Distribution:
    scale = jnp.full(size, math.sqrt(variance))
    return distrax.Independent(distrax.Normal(jnp.zeros(size), scale), 1)


def _log_normal(x: Array, scale: float) -> Array:
    return jnp.sum(-0.5 * (x / scale) ** 2 - math.log(scale * math.sqrt(2 * math.pi)))


def _two_moons(key: Array, theta: Array) -> Array:
    first, second = jax.random.split(key)
    angle = jax.random.uniform(first, minval=-math.pi / 2, maxval=math.pi / 2)
    radius = 0.1 + 0.01 * jax.random.normal(second)
    moon = radius * jnp.stack([jnp.cos(angle), jnp.sin(angle)])
    shift = jnp.stack(
        [0.25 - jnp.abs(theta[0] + theta[1]) / 2**0.5, (theta[1] - theta[0]) / 2**0.5]
    )
    return moon + shift


def _two_moons_likelihood(theta: Array, x: Array) -> Array:
    shift = jnp.stack(
        [0.25 - jnp.abs(theta[0] + theta[1]) / 2**0.5, (theta[1] - theta[0]) / 2**0.5]
    )
    first, second = x - shift
    radius = jnp.sqrt(first**2 + second**2 + 1e-12)
    found = _log_normal(radius - 0.1, 0.01) - jnp.log(math.pi * radius)
    return jnp.where(first > 0, found, -jnp.inf)


def _gaussian_linear(key: Array, theta: Array) -> Array:
    return theta + math.sqrt(0.1) * jax.random.normal(key, theta.shape)


def _gaussian_mixture(key: Array, theta: Array) -> Array:
    first, second = jax.random.split(key)
    scale = jnp.where(jax.random.bernoulli(first), 1.0, 0.1)
    return theta + scale * jax.random.normal(second, theta.shape)


def _gaussian_mixture_likelihood(theta: Array, x: Array) -> Array:
    each = [_log_normal(x - theta, scale) for scale in (1.0, 0.1)]
    return jnp.logaddexp(*each) - math.log(2)


def _slcp_factor(theta: Array) -> Array:
    first, second = theta[2] ** 2, theta[3] ** 2
    shared = jnp.tanh(theta[4]) * first * second
    # The Cholesky factor of the covariance, to whose diagonal 1e-6 is added.
    corner = jnp.sqrt(first**2 + 1e-6)
    below = shared / corner
    return jnp.array([[corner, 0.0], [below, jnp.sqrt(second**2 + 1e-6 - below**2)]])


def _slcp(key: Array, theta: Array) -> Array:
    noise = jax.random.normal(key, (4, 2))
    return (theta[:2] + noise @ _slcp_factor(theta).T).ravel()


def _slcp_likelihood(theta: Array, x: Array) -> Array:
    factor = _slcp_factor(theta)
    whole = jax.scipy.linalg.solve_triangular(factor, (x.reshape(4, 2) - theta[:2]).T, lower=True)
    return _log_normal(whole, 1.0) - 4 * jnp.log(jnp.diag(factor)).sum()


@functools.cache
def _design() -> np.ndarray:
    stimulus = np.random.RandomState(42).randn(100)
    delayed = [np.concatenate([np.zeros(k), stimulus[: 100 - k]]) for k in range(9)]
    return np.stack([np.ones(100), *delayed], 1)


def _bernoulli_glm(key: Array, theta: Array) -> Array:
    design = jnp.asarray(_design())
    spikes = jax.random.bernoulli(key, jax.nn.sigmoid(design @ theta))
    # Column k + 1 has the stimulus k steps before, so the sums are all sum_t y_t I_{t - k}.
    return design.T @ spikes.astype(design.dtype)


def _bernoulli_glm_likelihood(theta: Array, x: Array) -> Array:
    logits = jnp.asarray(_design()) @ theta
    return theta @ x - jax.nn.softplus(logits).sum()


def _bernoulli_glm_prior() -> distrax.Distribution:
    smooth = np.eye(9) - np.diag(np.ones(8), -1)
    factor = smooth @ smooth + np.diag(np.sqrt(np.arange(9) / 9))
    precision = np.zeros((10, 10))
    precision[0, 0], precision[1:, 1:] = 0.5, factor.T @ factor
    scale = np.linalg.cholesky(np.linalg.inv(precision))
    return distrax.MultivariateNormalTri(jnp.zeros(10), jnp.asarray(scale))


def tasks() -> dict[str, Task]:
    """The tasks by name."""
    return {
        "two_moons": Task(_box(2, 1.0), _two_moons, (-1.0, 1.0), _two_moons_likelihood),
        "gaussian_linear": Task(
            _normal(10, 0.1),
            _gaussian_linear,
            log_likelihood=lambda theta, x: _log_normal(x - theta, math.sqrt(0.1)),
        ),
        "gaussian_mixture": Task(
            _box(2, 10.0), _gaussian_mixture, (-10.0, 10.0), _gaussian_mixture_likelihood
        ),
        "slcp": Task(_box(5, 3.0), _slcp, (-3.0, 3.0), _slcp_likelihood),
        "bernoulli_glm": Task(
            _bernoulli_glm_prior(), _bernoulli_glm, log_likelihood=_bernoulli_glm_likelihood
        ),
    }


def references(folder: pathlib.Path, name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """(observation, 10,000 reference draws) of the observations 1 to 5."""
    with np.load(folder / f"{name}.npz") as found:
        return [(found[f"observation_{i}"].ravel(), found[f"posterior_{i}"]) for i in range(1, 6)]


def simulations(task: Task, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (theta, x) of a task, the same for all methods."""
    prior_key, key = jax.random.split(jax.random.key(seed))
    theta = task.prior.sample(seed=prior_key, sample_shape=(size,))
    x = jax.jit(jax.vmap(task.simulator))(jax.random.split(key, size), theta)
    return np.asarray(theta), np.asarray(x)
