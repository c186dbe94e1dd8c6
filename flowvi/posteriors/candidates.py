"""Candidates for a start: normal distributions along optimisation paths, judged by their ELBO."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flowvi.compiling import compiled
from flowvi.posteriors import normals, vectorise
from flowvi.posteriors.paths import MEMORY, Path
from flowvi.posteriors.target import Target

Array = jax.Array

#: Up to this size a Hessian is taken at every candidate, and up to the second one at all.
EVERY_HESSIAN, ANY_HESSIAN = 200, 2048

#: Draws that judge a candidate, at least, and the part of them that may lie outside the support.
NUM_DRAWS, MAX_LOST = 128, 0.1

#: Variational Newton steps, and pairs of draws of each: where Hessians are cheap, and where not.
ROUNDS, PAIRS = (24, 10), (32, 4)

#: Bound on the change of a precision in one such step.
CHANGE = 10.0


@dataclasses.dataclass(frozen=True)
class TemperedDensity:
    """The log density of a target, times the inverse temperature."""

    target: Target
    power: float = 1.0

    def __call__(self, u: Array, data: Any) -> Array:
        """The tempered log density at one vector."""
        return self.power * self.target.at(u, data)


class Candidate(NamedTuple):
    """A normal distribution, its ELBO, how it was found, and at which path and point."""

    normal: normals.Dense | normals.LowRank
    elbo: float
    origin: str
    place: tuple[int, int]


def elbo_of(scored: Candidate) -> float:
    """The ELBO, by which candidates are sorted."""
    return scored.elbo


def even_draws(rng: np.random.Generator, size: int) -> np.ndarray:
    """Standard normal draws in pairs of opposites, and to moderate size of unit covariance.

    The ELBO of a normal distribution is exact from them where the target is normal too, so noise
    does not choose between candidates there.
    """
    count = max(NUM_DRAWS, 3 * size) if size <= EVERY_HESSIAN else NUM_DRAWS
    z = rng.standard_normal((count // 2, size))
    if len(z) > size:
        z = np.linalg.solve(np.linalg.cholesky(z.T @ z / len(z)), z.T).T
    return np.concatenate([z, -z])


class Judge:
    """The ELBO of normal distributions, all from the same draws."""

    def __init__(self, density: TemperedDensity, z: np.ndarray):
        self._density = density
        self.z = z
        self._noise = 0.5 * (z**2).sum(-1) + 0.5 * z.shape[-1] * np.log(2 * np.pi)

    def elbo(self, normal: normals.Dense | normals.LowRank) -> float:
        """The ELBO, or -inf where too many draws have no density."""
        u = jnp.asarray(normal.draw(self.z), jnp.result_type(float))
        values = np.asarray(_values(self._density, u, self._density.target.data), np.float64)
        terms = values + self._noise + normal.log_det
        good = np.isfinite(terms)
        return float(terms[good].mean()) if good.mean() >= 1 - MAX_LOST else -np.inf

    def all(self, candidates: Any, places: list[tuple[int, int]], origin: str) -> list[Candidate]:
        """The candidates that have an ELBO; None among them are passed over."""
        scored = [
            Candidate(normal, self.elbo(normal), origin, place)
            for normal, place in zip(candidates, places, strict=True)
            if normal is not None
        ]
        return [each for each in scored if np.isfinite(each.elbo)]


@compiled()
def _values(density: TemperedDensity, u: Array, data: Any) -> Array:
    return vectorise.over(density, u, data)


def pathfinders(paths: Path, indices: list[list[int]]) -> Any:
    """For each chosen point of each path, what the run itself saw there; None if nothing."""
    for path, chosen in enumerate(indices):
        length = int(paths.length[path])
        x = np.asarray(paths.x[path, : length + 1], np.float64)
        gradient = np.asarray(paths.gradient[path, : length + 1], np.float64)
        steps, changes = np.diff(x, axis=0), np.diff(gradient, axis=0)
        diagonal, useful = normals.diagonals(steps, changes)
        for index in chosen:
            recent = np.arange(max(index - MEMORY, 0), index)
            recent = recent[useful[recent]]
            last = diagonal[index - 1] if index else np.ones(x.shape[-1])
            yield normals.pathfinder(
                x[index], gradient[index], steps[recent], changes[recent], last
            )


@compiled()
def _derivatives(density: TemperedDensity, u: Array, data: Any) -> tuple[Array, Array]:
    def both(u: Array, data: Any) -> tuple[Array, Array]:
        return jax.grad(density)(u, data), jax.hessian(density)(u, data)

    return vectorise.over(both, u, data)


def _in_batches(density: TemperedDensity, u: np.ndarray) -> Any:
    """Gradients and Hessians at each row of u, one after the other; one program for all calls."""
    batch = 2 * PAIRS[0] if u.shape[-1] <= EVERY_HESSIAN else 1
    for first in range(0, len(u), batch):
        rows = u[first : first + batch]
        padded = np.resize(rows, (batch, u.shape[-1]))
        both = _derivatives(
            density, jnp.asarray(padded, jnp.result_type(float)), density.target.data
        )
        gradients, hessians = jax.device_get(both)
        yield from zip(gradients[: len(rows)], hessians[: len(rows)], strict=True)


def _resolution() -> float:
    return 10 * float(jnp.finfo(jnp.result_type(float)).eps)


def laplaces(density: TemperedDensity, x: np.ndarray) -> Any:
    """For each row of x, the normal distribution of the Hessian there; None if there is none."""
    for point, (_, hessian) in zip(x, _in_batches(density, x), strict=True):
        yield normals.laplace(point.astype(np.float64), -hessian.astype(np.float64), _resolution())


def refine(
    density: TemperedDensity, scored: Candidate, judge: Judge, rng: np.random.Generator
) -> Candidate:
    """The best of some variational Newton steps from a normal distribution, and of that itself.

    In the coordinates in which q is standard normal, the best q near it has the precision
    -E_q Hessian and the mean shifted by precision^-1 E_q gradient.
    """
    normal = scored.normal
    normal = normal.dense() if isinstance(normal, normals.LowRank) else normal
    size = len(normal.loc)
    kind = int(size > EVERY_HESSIAN)
    half = ROUNDS[kind] // 2
    for index in range(ROUNDS[kind]):
        # Full steps first; then ever shorter ones, which average the noise.
        weight = 1.0 if index < half else 2.0 / (2 + index - half)
        z = rng.standard_normal((PAIRS[kind], size))
        gradient, hessian, count = np.zeros(size), np.zeros((size, size)), 0
        for g, h in _in_batches(density, normal.draw(np.concatenate([z, -z]))):
            if np.isfinite(g).all() and np.isfinite(h).all():
                gradient, hessian, count = gradient + g, hessian + h, count + 1
        if count == 0:
            break
        inner = -normal.matrix.T @ (hessian / count) @ normal.matrix
        if not np.isfinite(inner).all():
            break
        values, vectors = np.linalg.eigh(0.5 * (inner + inner.T))
        values = np.clip(np.abs(values), 1 / CHANGE, CHANGE)
        slope = normal.matrix.T @ (gradient / count)
        shift = weight * vectors @ (vectors.T @ slope / values)
        shift *= min(1.0, 2 * np.sqrt(size) / max(float(np.linalg.norm(shift)), 1e-300))
        root = values ** (0.5 * weight)
        normal = normals.Dense(
            normal.loc + normal.matrix @ shift,
            (normal.matrix @ vectors) / root,
            root[:, None] * (vectors.T @ normal.inverse),
        )
        if not (np.isfinite(normal.matrix).all() and np.isfinite(normal.loc).all()):
            break
        found = Candidate(normal, judge.elbo(normal), "variational", scored.place)
        scored = max(scored, found, key=elbo_of)
    return scored
