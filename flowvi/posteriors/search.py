"""Optimisation paths, normal distributions along them, and what those are worth."""

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flowvi.compiling import compiled
from flowvi.params import Array, PyTree
from flowvi.posteriors import normals, vectorise
from flowvi.posteriors.normals import Normal
from flowvi.posteriors.target import Target, as_float

Places = list[tuple[int, int]]

#: Up to this size a Hessian is taken at every candidate, and up to the second one at all.
EVERY_HESSIAN, ANY_HESSIAN = 200, 2048

#: Runs of L-BFGS, their steps, pairs of differences that they remember, trials of a line search.
NUM_PATHS, NUM_STEPS, MEMORY, TRIALS = 6, 300, 10, 30

#: Draws that judge a candidate, at least, and the part of them that may lie outside the support;
#: where no candidate does better, the second one.
NUM_DRAWS, MAX_LOST, MOST_LOST = 128, 0.1, 0.9

#: Variational Newton steps, and pairs of draws of each: where Hessians are cheap, and where not.
ROUNDS, PAIRS = (24, 10), (32, 4)

#: Bound on the change of a precision in one such step.
CHANGE = 10.0

#: Standard deviations of the start that further runs begin away from it, in each direction.
WIDTHS = (3.0, 5.0, 8.0, 12.0, 20.0, 40.0)

#: Nats of the ELBO by which normal distributions at the ends of two runs differ where the ends do.
SAME_MODE = 0.1


class Path(NamedTuple):
    """What a run visited: points, of shape [num_steps + 1, D], the function's gradients and values.

    Beyond `length`, the steps done, the last point is repeated. `num_gradients` counts those of the
    line searches too.
    """

    x: Array
    gradient: Array
    value: Array
    length: Array
    num_gradients: Array


def lbfgs(function: Callable[[Array], Array], start: Array, num_steps: int) -> Path:
    """Minimises a function from one start, where it is finite, and keeps the path."""
    search = optax.scale_by_zoom_linesearch(TRIALS, initial_guess_strategy="one")
    solver = optax.lbfgs(memory_size=MEMORY, linesearch=search)
    value, gradient = jax.value_and_grad(function)(start)
    x, gradients, values = (jnp.repeat(a[None], num_steps + 1, 0) for a in (start, gradient, value))
    path = Path(x, gradients, values, jnp.zeros((), jnp.int32), jnp.ones((), jnp.int32))

    def advance(carry: tuple[Path, optax.OptState, Array]) -> tuple[Path, optax.OptState, Array]:
        path, state, _ = carry
        x, gradient, value, done = path.x[-1], path.gradient[-1], path.value[-1], path.length + 1
        given = {"value": value, "grad": gradient, "value_fn": function}
        update, state = solver.update(gradient, state, x, **given)
        new_gradient, new_value = optax.tree.get(state, "grad"), optax.tree.get(state, "value")
        found = jnp.any(update != 0) & _finite(new_gradient, new_value)
        tiny = 10 * jnp.finfo(value.dtype).eps
        stuck = jnp.abs(value - new_value) <= tiny * (1 + jnp.abs(new_value))
        later = found & (jnp.arange(num_steps + 1) >= done)
        points = jnp.where(later[:, None], (x + update)[None], path.x)
        gradients = jnp.where(later[:, None], new_gradient[None], path.gradient)
        trials = jnp.asarray(optax.tree.get(state, "num_linesearch_steps"), jnp.int32)
        values = jnp.where(later, new_value, path.value)
        path = Path(points, gradients, values, done, path.num_gradients + trials)
        return path, state, found & ~(stuck & (done > 3))

    def unfinished(carry: tuple[Path, optax.OptState, Array]) -> Array:
        return carry[2] & (carry[0].length < num_steps)

    state = solver.init(start)
    return jax.lax.while_loop(unfinished, advance, (path, state, _finite(gradient, value)))[0]


def _finite(gradient: Array, value: Array) -> Array:
    return jnp.isfinite(value) & jnp.isfinite(jnp.sum(jnp.abs(gradient)))


class Candidate(NamedTuple):
    """A normal distribution, its ELBO, how it was found, and at which path and point."""

    normal: Normal
    elbo: float
    origin: str
    place: tuple[int, int]


Candidates = list[Candidate]
elbo_of = operator.attrgetter("elbo")


class Search:
    """Candidates of one density, to an inverse temperature, all judged from the same draws."""

    def __init__(self, target: Target, power: float, rng: np.random.Generator):
        self.target, self.power, self.rng = target, power, rng
        self.num_gradients = self.num_evaluations = 0
        self.max_lost = MAX_LOST
        size = target.event_size
        self.cheap = size <= EVERY_HESSIAN
        num_draws = max(NUM_DRAWS, 3 * size) if self.cheap else NUM_DRAWS
        z = rng.standard_normal((num_draws // 2, size))
        if len(z) > size:
            # Of unit covariance: so ELBOs of normal distributions are exact for normal targets.
            z = np.linalg.solve(np.linalg.cholesky(z.T @ z / len(z)), z.T).T
        self.z = np.concatenate([z, -z])
        self._entropy = 0.5 * (self.z**2).sum(-1) + 0.5 * size * np.log(2 * np.pi)

    def paths(self, points: Array) -> Path:
        """The runs of L-BFGS from some points."""
        paths = jax.device_get(_paths(self.target, self.power, points, self.target.data))
        self.num_gradients += int(paths.num_gradients.sum())
        return paths

    def elbo(self, normal: Normal) -> float:
        """The ELBO of the part with a density, or -inf where too many draws have none."""
        u = as_float(normal.draw(self.z))
        values = _values(self.target, self.power, u, self.target.data)
        self.num_evaluations += len(u)
        terms = np.asarray(values, np.float64) + self._entropy + normal.log_det
        good = np.isfinite(terms)
        if good.mean() < 1 - self.max_lost:
            return -np.inf
        return float(terms[good].mean() + np.log(good.mean()))

    def judge(self, found: Iterable[Normal | None], places: Places, origin: str) -> Candidates:
        """The candidates that have an ELBO; None among them are passed over."""
        pairs = [(n, place) for n, place in zip(found, places, strict=True) if n is not None]
        scored = [Candidate(normal, self.elbo(normal), origin, place) for normal, place in pairs]
        return [each for each in scored if np.isfinite(each.elbo)]

    def pathfinders(self, paths: Path, indices: list[list[int]]) -> Candidates:
        """The candidates of what each run itself saw at its chosen points."""
        candidates = []
        for path, chosen in enumerate(indices):
            length = int(paths.length[path])
            x = np.asarray(paths.x[path, : length + 1], np.float64)
            gradient = np.asarray(paths.gradient[path, : length + 1], np.float64)
            steps, changes = np.diff(x, axis=0), np.diff(gradient, axis=0)
            diagonal, useful = normals.diagonals(steps, changes)
            found = []
            for index in chosen:
                recent = np.arange(max(index - MEMORY, 0), index)
                recent = recent[useful[recent]]
                last = diagonal[index - 1] if index else np.ones(x.shape[-1])
                pairs = steps[recent], changes[recent]
                found.append(normals.pathfinder(x[index], gradient[index], *pairs, last))
            candidates += self.judge(found, [(path, index) for index in chosen], "pathfinder")
        return candidates

    def derivatives(self, u: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The gradient and the Hessian at each row of u; one program for all calls."""
        batch = 2 * PAIRS[0] if self.cheap else 1
        for first in range(0, len(u), batch):
            rows = u[first : first + batch]
            padded = as_float(np.resize(rows, (batch, u.shape[-1])))
            both = _derivatives(self.target, self.power, padded, self.target.data)
            self.num_gradients += batch * (1 + u.shape[-1])  # a Hessian is D derivatives of one
            gradients, hessians = jax.device_get(both)
            yield from zip(gradients[: len(rows)], hessians[: len(rows)], strict=True)

    def laplaces(self, x: np.ndarray, places: Places) -> Candidates:
        """The candidates of the Hessian at each row of x."""
        resolution = 10 * float(jnp.finfo(jnp.result_type(float)).eps)
        found = (
            normals.laplace(point.astype(float), -hessian.astype(float), resolution)
            for point, (_, hessian) in zip(x, self.derivatives(x), strict=True)
        )
        return self.judge(found, places, "laplace")

    def refine(self, candidate: Candidate) -> Candidate:
        """The best of some variational Newton steps from a candidate, and of that itself."""
        normal = candidate.normal.dense()
        rounds, pairs = ROUNDS[not self.cheap], PAIRS[not self.cheap]
        for index in range(rounds):
            # Full steps first; then ever shorter ones, which average the noise.
            weight = 1.0 if index < rounds // 2 else 2.0 / (2 + index - rounds // 2)
            z = self.rng.standard_normal((pairs, len(normal.loc)))
            u = normal.draw(np.concatenate([z, -z]))
            both = [d for d in self.derivatives(u) if all(np.isfinite(each).all() for each in d)]
            if not both:
                break
            gradient, hessian = (np.asarray(d, float).mean(0) for d in zip(*both, strict=True))
            new = normals.newton(normal, gradient, hessian, weight, CHANGE)
            if new is None:
                break
            normal = new
            found = Candidate(normal, self.elbo(normal), "variational", candidate.place)
            candidate = max(candidate, found, key=elbo_of)
        return candidate

    def more_ends(self, ends: Candidates, normal: Normal) -> Candidates:
        """Candidates at the ends of more runs, which search for modes the first ones missed."""
        # The first runs begin near zero and may all end in one mode: some begin far away from it.
        z = self.rng.standard_normal((len(WIDTHS), len(normal.loc))) * np.array(WIDTHS)[:, None]
        points = [normal.draw(z), normal.draw(-z)]
        if np.ptp([each.elbo for each in ends]) > SAME_MODE:
            # Where coordinates have modes of their own, one that a run ends in by chance may have
            # next to no mass: a point with half of the start's coordinates leads to one of more.
            others = np.resize([each.normal.loc for each in ends], (NUM_PATHS, len(normal.loc)))
            points.append(np.where(self.rng.random(others.shape) < 0.5, others, normal.loc))
        return self.ends_from(np.concatenate(points))

    def ends_from(self, points: np.ndarray) -> Candidates:
        """Candidates at the ends of runs from points, of which there are a multiple of six."""
        found = []
        for each in np.split(points, len(points) // NUM_PATHS):  # the program is there
            x = np.asarray(self.paths(as_float(each)).x[:, -1])
            good = np.isfinite(x).all(-1)
            found += self.laplaces(x[good], [(0, 0)] * int(good.sum()))
        return found


def _density(target: Target, power: float) -> Callable[[Array, PyTree], Array]:
    return lambda u, data: power * target.at(u, data)


@compiled(2)
def _paths(target: Target, power: float, points: Array, data: PyTree) -> Path:
    density = _density(target, power)
    return vectorise.over(
        lambda u, data: lbfgs(lambda v: -density(v, data), u, NUM_STEPS), points, data
    )


@compiled(2)
def _values(target: Target, power: float, u: Array, data: PyTree) -> Array:
    return vectorise.over(_density(target, power), u, data)


@compiled(2)
def _derivatives(target: Target, power: float, u: Array, data: PyTree) -> tuple[Array, Array]:
    density = _density(target, power)
    gradient, hessian = jax.grad(density), jax.hessian(density)
    return vectorise.over(lambda u, data: (gradient(u, data), hessian(u, data)), u, data)
