"""A posterior of several modes: a mixture of normals found by sampling, and a flow for each.

With r_k(u) the share of component k in a mixture of normals at u, the parts p(u) r_k(u) of a
density add up to it. Each has one mode, is fitted alone, and brings its own evidence, which is its
weight. The divergence of the mixture is at most the mean of those of its parts.
"""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from flowvi.families import marginals
from flowvi.params import Array, PyTree
from flowvi.posteriors.annealing import Particles
from flowvi.posteriors.normals import Dense
from flowvi.posteriors.search import Candidates
from flowvi.posteriors.start import Found
from flowvi.posteriors.target import Target, as_float

#: Numbers of components that are tried, and how many without a new best end the search.
SIZES, MOST_WORSE = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40, 48), 3

#: Rounds of importance sampling from the mixture at most, draws of each and for each component, and
#: the part of wider ones. The rounds end where the mixture is so many nats from right, or where one
#: gains less.
ROUNDS, DRAWS, EACH_DRAWS, WIDE_PART, WIDE = 10, 4000, 2000, 0.2, 2.0
RIGHT, LEAST_GAIN = 0.003, 0.001

#: A normal is new where its draws have so many nats less by all others; it is passed over if its
#: ELBO is so many nats behind the best. Draws that say so, and the weight it gets at first.
NEW, MOST_BEHIND, END_DRAWS, ADDED_SHARE = 5.0, 7.0, 64, 0.1

#: A component of a smaller share is dropped.
LEAST_SHARE = 2e-3


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Normals with weights.

    Attributes:
        normals: K normals.
        log_weights: of shape [K].
        elbo: the evidence lower bound of the mixture, in nats.
        log_evidence: that of the target, by importance sampling from the mixture.
        num_evaluations: of the density, to find it.
    """

    normals: tuple[Dense, ...]
    log_weights: np.ndarray
    elbo: float = -np.inf
    log_evidence: float = -np.inf
    num_evaluations: int = 0

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What `log_shares` asks for."""
        return {
            "loc": np.stack([each.loc for each in self.normals]),
            "inverse": np.stack([each.inverse for each in self.normals]),
            "log_det": np.array([each.log_det for each in self.normals]),
            "log_weights": self.log_weights,
        }

    def draw(self, rng: np.random.Generator, count: int, width: float = 1.0) -> np.ndarray:
        """Draws, of normals so many times as wide."""
        shares = np.exp(self.log_weights - np.logaddexp.reduce(self.log_weights))
        z = width * rng.standard_normal((count, len(self.normals[0].loc)))
        choice = rng.choice(len(shares), size=count, p=shares)
        u = np.empty_like(z)
        for k, normal in enumerate(self.normals):
            u[choice == k] = normal.draw(z[choice == k])
        return u

    @np.errstate(over="ignore")
    def parts(self, u: np.ndarray, width: float = 1.0) -> np.ndarray:
        """Log weights plus log densities of the components, [K, n], at u of shape [n, D]."""
        size, each = u.shape[1], []
        for normal, weight in zip(self.normals, self.log_weights, strict=True):
            z = (u - normal.loc) @ normal.inverse.T / width
            constant = normal.log_det + size * (np.log(width) + 0.5 * np.log(2 * np.pi))
            each.append(weight - constant - 0.5 * (z**2).sum(-1))
        return np.stack(each)

    def log_prob(self, u: np.ndarray, width: float = 1.0) -> np.ndarray:
        """Log densities at u of shape [n, D]."""
        return np.logaddexp.reduce(self.parts(u, width), axis=0)


def log_shares(mixture: dict[str, Array], u: Array) -> Array:
    """log r_k(u) of shape [..., K], at u of shape [..., D]."""
    z = jnp.einsum("...kd,ked->...ke", u[..., None, :] - mixture["loc"], mixture["inverse"])
    each = mixture["log_weights"] - mixture["log_det"] - 0.5 * jnp.sum(z * z, -1)
    return jax.nn.log_softmax(each, axis=-1)


@dataclasses.dataclass(frozen=True)
class Part:
    """The log density of the part of a target that params["part"] names, as objectives call it."""

    target: Target

    def __call__(self, params: PyTree, key: Array | None, z: Array, batch: PyTree) -> Array:
        part = params["part"].value
        share = jnp.take(log_shares(part["mixture"], z), part["index"], axis=-1)
        return self.target.log_joint({}, key, z, batch) + share


def distinct(found: Found, ends: Candidates, rng: np.random.Generator) -> list[Dense]:
    """The normals at ends of the optimiser's runs that have a mass of their own, and the start's.

    Those that others cover are left out, and those of hardly any mass.
    """
    best = found.start.elbo
    kept: list[Dense] = []
    whitening = found.start.whitening
    if "matrix" in whitening:
        kept.append(Dense(*(np.asarray(whitening[n], float) for n in ("loc", "matrix", "inverse"))))
    for end in sorted(ends, key=lambda each: -each.elbo):
        normal = end.normal
        if isinstance(normal, Dense) and end.elbo > best - MOST_BEHIND:
            u = normal.draw(rng.standard_normal((END_DRAWS, len(normal.loc))))
            own = Mixture((normal,), np.zeros(1)).log_prob(u)
            others = [Mixture((each,), np.zeros(1)).log_prob(u) for each in kept]
            if not others or np.mean(np.max(others, axis=0) - own) < -NEW:
                kept.append(normal)
    return kept


def mixture_of(
    target: Target, particles: Particles, seen: list[Dense], rng: np.random.Generator
) -> Mixture:
    """The mixture of normals that describes particles best, and then the target's draws.

    Its size is chosen by BIC; normals that were `seen` and that it does not cover are added; its
    parameters are improved by rounds of importance sampling.

    Source: Cappe, Douc, Guillin, Marin, Robert, "Adaptive Importance Sampling in General Mixture
    Classes", 2008.
    """
    from threadpoolctl import threadpool_limits

    white = normal_of(particles.u)
    with threadpool_limits(1):
        mixture = _with(_chosen(particles.u, white, rng), seen, rng)
        best, evaluations = mixture, 0
        for round_ in range(ROUNDS):
            count = max(DRAWS, EACH_DRAWS * len(mixture.normals))
            wide = int(WIDE_PART * count)
            u = np.concatenate([mixture.draw(rng, count - wide), mixture.draw(rng, wide, WIDE)])
            parts = [mixture.log_prob(u), mixture.log_prob(u, WIDE)]
            log_base = np.logaddexp(parts[0] + np.log1p(-WIDE_PART), parts[1] + np.log(WIDE_PART))
            log_p = np.asarray(target(as_float(u)), np.float64)
            log_p = np.where(np.isfinite(log_p), log_p, -np.inf)
            evaluations += count
            log_weights = log_p - log_base
            own = log_p[: count - wide] - parts[0][: count - wide]
            elbo = own[np.isfinite(own)].mean() if np.isfinite(own).mean() > 0.98 else -np.inf
            log_evidence = np.logaddexp.reduce(log_weights) - np.log(count)
            mixture = dataclasses.replace(mixture, elbo=float(elbo), log_evidence=log_evidence)
            gain = mixture.elbo - best.elbo
            best = max(best, mixture, key=lambda each: each.elbo)
            if not np.isfinite(log_evidence) or log_evidence - elbo < RIGHT:
                break
            if round_ >= 2 and gain < LEAST_GAIN:
                break
            weights = np.exp(log_weights - log_weights.max())
            if round_ == 0:
                # Draws that are kept at most once: of repeated ones a component would be a point.
                kept = u[rng.random(count) < weights / np.quantile(weights, 0.95)]
                if len(kept) > count / 8:
                    mixture = _with(_chosen(kept, white, rng), seen, rng)
                    continue
            mixture = _updated(mixture, u, weights)
    return dataclasses.replace(best, num_evaluations=evaluations)


def _with(mixture: Mixture, seen: list[Dense], rng: np.random.Generator) -> Mixture:
    """A mixture with the normals that it does not cover, of a small weight each."""
    for normal in seen:
        u = normal.draw(rng.standard_normal((END_DRAWS, len(normal.loc))))
        own = Mixture((normal,), np.zeros(1)).log_prob(u)
        if np.mean(mixture.log_prob(u) - own) < -NEW:
            log_weights = np.append(mixture.log_weights, np.log(ADDED_SHARE))
            log_weights -= np.logaddexp.reduce(log_weights)
            mixture = Mixture((*mixture.normals, normal), log_weights)
    return mixture


def _updated(mixture: Mixture, u: np.ndarray, weights: np.ndarray) -> Mixture:
    """One step of expectation and maximisation, from weighted draws.

    A component that too few draws speak of stays as it is.
    """
    shares = mixture.parts(u)
    shares = np.exp(shares - np.logaddexp.reduce(shares, axis=0)) * (weights / weights.sum())
    normals = []
    for normal, share in zip(mixture.normals, shares, strict=True):
        if share.sum() ** 2 > 5 * (u.shape[1] + 1) * (share**2).sum():
            z = (u - normal.loc) @ normal.inverse.T  # near white: nothing is lost by squares
            share = share / share.sum()
            loc = share @ z
            covariance = (share[:, None] * (z - loc)).T @ (z - loc) + 1e-9 * np.eye(len(loc))
            matrix = normal.matrix @ np.linalg.cholesky(covariance)
            normal = Dense(normal.loc + normal.matrix @ loc, matrix, np.linalg.inv(matrix))
        normals.append(normal)
    mass = np.maximum(shares.sum(1), 1e-6)
    return Mixture(tuple(normals), np.log(mass / mass.sum()))


def normal_of(u: np.ndarray) -> Dense:
    """The normal of the mean and the covariance of draws."""
    factor = np.linalg.cholesky(marginals.covariance(u))
    return Dense(u.mean(0), factor, np.linalg.inv(factor))


def _chosen(u: np.ndarray, white: Dense, rng: np.random.Generator) -> Mixture:
    """The mixture of the best BIC."""
    best, best_bic = _fit(u, white, SIZES[0], rng)
    worse = 0
    for size in SIZES[1:]:
        if size * u.shape[1] > len(u) / 4 or worse == MOST_WORSE:
            break
        mixture, bic = _fit(u, white, size, rng)
        worse = 0 if bic < best_bic else worse + 1
        if bic < best_bic:
            best, best_bic = mixture, bic
    return best


def _fit(
    u: np.ndarray,
    white: Dense,
    size: int,
    rng: np.random.Generator,
) -> tuple[Mixture, float]:
    """The mixture of some size by scikit-learn, in coordinates in which u is white; its BIC."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    loc, scale, inverse = white.loc, white.matrix, white.inverse
    w = (u - loc) @ inverse.T
    model = GaussianMixture(
        size,
        reg_covar=1e-9,
        random_state=int(rng.integers(2**31)),
        max_iter=100,
        init_params="k-means++",
        n_init=3,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(w)
    keep = model.weights_ > LEAST_SHARE
    normals = []
    for mean, covariance in zip(model.means_[keep], model.covariances_[keep], strict=True):
        matrix = scale @ np.linalg.cholesky(covariance)
        normals.append(Dense(loc + scale @ mean, matrix, np.linalg.inv(matrix)))
    log_weights = np.log(model.weights_[keep] / model.weights_[keep].sum())
    return Mixture(tuple(normals), log_weights), float(model.bic(w))
