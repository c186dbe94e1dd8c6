"""Where a fit starts: the best of many normal distributions along optimisation paths."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flowvi.compiling import compiled
from flowvi.params import Array, PyTree, host_generator
from flowvi.posteriors import normals, vectorise
from flowvi.posteriors.normals import Normal
from flowvi.posteriors.search import (
    MOST_LOST,
    NUM_PATHS,
    Candidate,
    Candidates,
    Path,
    Search,
    elbo_of,
)
from flowvi.posteriors.target import Target, Theta, as_float

#: Points of each run that become candidates, and draws around its end.
NUM_POINTS, NUM_END_DRAWS = 10, 32

#: Nats of the ELBO within which the narrowest candidate is taken. A flow that has to widen finds
#: narrow places that one which has to shrink leaves out.
SAME_ELBO = 1.0

#: Candidates that are refined in any case, and the distance from those, in their standard
#: deviations, from which on another one is.
LEAST_REFINED, ELSEWHERE = 2, 3.0

#: Scales around zero at which starting points are tried; zero itself comes first.
SCALES = (1.0, 0.1, 1.0, 3.0, 1.0, 10.0, 0.3)

#: Distance from zero beyond which a run that still rises has diverged.
FAR = 1e8


@dataclasses.dataclass(frozen=True)
class Start:
    """What the search for a start found.

    Attributes:
        whitening: the arguments of `flowvi.bijectors.Dense`, or of `LowRank`.
        best: those of the normal distribution of highest ELBO, which may be a little wider.
        elbo: the ELBO of the start, in nats, from a few hundred draws.
        origin: how it was found: "pathfinder", "laplace" or "variational".
        mode: the point of highest density that was seen.
        ends: draws of normal distributions around the ends of runs, of shape [number, draws, D];
            empty where Hessians are dear or the density was tempered.
        end_elbos: the ELBOs of those, in nats: each a lower bound on the mass around that end.
    """

    whitening: dict[str, np.ndarray]
    best: dict[str, np.ndarray]
    elbo: float
    origin: str
    mode: np.ndarray
    ends: np.ndarray
    end_elbos: np.ndarray


class Found(NamedTuple):
    """A start, the normals at the ends of all runs of the optimiser, and the search."""

    start: Start
    ends: Candidates
    search: Search

    def with_ends(self, ends: Candidates) -> "Found":
        """The same with the ends of more runs."""
        ends = [*self.ends, *ends]
        draws = [end.normal.draw(self.search.z[:NUM_END_DRAWS]) for end in ends]
        start = dataclasses.replace(
            self.start,
            ends=np.array(draws, jnp.result_type(float)),
            end_elbos=np.array([end.elbo for end in ends]),
        )
        return self._replace(start=start, ends=ends)


def find(
    target: Target, key: Array, start: Theta = None, power: float = 1.0, rank: int | None = None
) -> Found:
    """The best normal distribution that optimisation paths lead to, by ELBO.

    Of each path two kinds of candidates are taken: the inverse Hessian that L-BFGS estimates itself
    (Pathfinder), and the Hessian at the point, made positive (Laplace). Where Hessians are at hand,
    variational Newton steps start from the best one of each path.

    Source: Zhang, Carpenter, Gelman, Vehtari, "Pathfinder: Parallel Quasi-Newton Variational
    Inference", 2022; for the Newton steps, Opper, Archambeau, "The Variational Gaussian
    Approximation Revisited", 2009.
    """
    rng = host_generator(key)
    points = starting_points(target, rng, start)
    search = Search(target, power, rng)
    paths = search.paths(points)
    _check_bounded(paths)
    values = np.where(np.isfinite(paths.value), paths.value, np.inf)
    indices = [_indices(int(length)) for length in paths.length]
    candidates, ends = _candidates(search, paths, values, indices, rank)
    if not candidates:  # a density that is cut off
        search.max_lost = MOST_LOST
        candidates, ends = _candidates(search, paths, values, indices, rank)
    if not candidates:
        raise ValueError(
            "`target` must have a density around the points that optimisation leads to; got none "
            f"at draws around {sum(map(len, indices))} of them. It may be unbounded, or have holes "
            "in its support. Perhaps give supports with `fv.Target.from_named`?"
        )
    best = max(candidates, key=elbo_of)
    # A flattened density is to be covered, and only refined candidates are near an optimum each.
    chosen = best if power < 1 or best.origin != "variational" else _narrowest_of_good(candidates)
    if ends:
        ends += search.more_ends(ends, chosen.normal)
    whitening = _whitening(chosen.normal, rank)
    place = np.unravel_index(np.argmin(values), values.shape)
    begun = Start(
        whitening=whitening,
        best=whitening if best is chosen else _whitening(best.normal, rank),
        elbo=chosen.elbo,
        origin=chosen.origin,
        mode=np.asarray(paths.x)[place],
        ends=np.empty(0),
        end_elbos=np.empty(0),
    )
    return Found(begun, [], search).with_ends(ends)


def _candidates(
    search: Search,
    paths: Path,
    values: np.ndarray,
    indices: list[list[int]],
    rank: int | None,
) -> tuple[Candidates, Candidates]:
    """(normals that may be the start, those at the ends of the runs)."""
    candidates = search.pathfinders(paths, indices)
    ends: Candidates = []
    if rank is None and has_hessian(search.target):
        places = [(path, index) for path, chosen in enumerate(indices) for index in chosen]
        if not search.cheap:
            top = int(np.argmin(values[:, -1]))
            places = [(top, int(paths.length[top]))]
        around = search.laplaces(np.stack([paths.x[place] for place in places]), places)
        if search.cheap and search.power == 1:
            ends = [each for each in around if each.place[1] == indices[each.place[0]][-1]]
        # The best candidate of all may lead to a lesser optimum.
        first = _best_of_paths(candidates + around)[: NUM_PATHS if search.cheap else 1]
        candidates = []
        for index, each in enumerate(first):
            if index < LEAST_REFINED or all(_is_elsewhere(each, other) for other in candidates):
                candidates.append(search.refine(each))
    return candidates, ends


def _is_elsewhere(one: Candidate, other: Candidate) -> bool:
    """Whether the middle of a normal is far outside of another one."""
    dense = other.normal.dense()
    return bool(np.linalg.norm(dense.inverse @ (one.normal.loc - dense.loc)) > ELSEWHERE)


def starting_points(target: Target, rng: np.random.Generator, start: Theta) -> Array:
    """Points with a density and a gradient."""
    if start is None:
        scales = np.r_[0.0, np.tile(SCALES, 9)]
        points = as_float(rng.standard_normal((len(scales), target.event_size)) * scales[:, None])
    else:
        points = target.unconstrain(start).reshape(-1, target.event_size)
    values, norms = map(np.asarray, probe(target, points, target.data))
    finite = np.isfinite(values) & np.isfinite(norms)
    if not finite.any():
        bad = values[~np.isfinite(values)]
        got = str(bad[0]) if len(bad) else "a gradient that is not finite"
        raise ValueError(
            "`target` must have a finite log density and gradient at one starting point at least; "
            f"got {got} at the first of {len(values)}. Perhaps give the parameters' supports with "
            "`fv.Target.from_named`, or points inside with `start`?"
        )
    # At a mode that was given the gradient is zero too.
    if start is None and (norms[finite] == 0).all() and np.ptp(values[finite]) == 0:
        got = f"the constant log density {values[finite][0]} at {finite.sum()} points"
        raise ValueError(f"`target` must depend on its vector; got {got}.")
    return points[np.resize(np.flatnonzero(finite), NUM_PATHS)]


def has_hessian(target: Target) -> bool:
    """Whether the target can be differentiated twice, by forward over reverse."""
    u = jax.ShapeDtypeStruct((target.event_size,), jnp.result_type(float))
    try:
        jax.eval_shape(jax.hessian(target.at), u, target.data)
    except (TypeError, ValueError, NotImplementedError):
        return False
    return True


@compiled()
def probe(target: Target, points: Array, data: PyTree) -> tuple[Array, Array]:
    """Log densities of shape [n] at points, and sums of the sizes of their gradients."""
    values, gradients = vectorise.over(jax.value_and_grad(target.at), points, data)
    return values, jnp.sum(jnp.abs(gradients), -1)


def _check_bounded(paths: Path) -> None:
    """Raises a ValueError if a run went far away and would still gain by going twice as far."""
    x, gradient = paths.x[:, -1], paths.gradient[:, -1]
    distance = np.abs(x).max(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        gain = -(x * gradient).sum(-1)
    diverged = (distance > FAR) & ~(gain < 1)
    if diverged.any():
        index = int(np.argmax(diverged))
        raise ValueError(
            f"`target` must be bounded above and fall off; got {-paths.value[index, -1]:.3g} at a "
            f"point {distance[index]:.1g} away from zero, where its log density still rises."
        )


def _indices(length: int) -> list[int]:
    """The points of a path that become candidates: denser at its beginning, with its end."""
    share = np.arange(1, NUM_POINTS + 1) / NUM_POINTS
    return sorted(set(np.ceil(length * share**2).astype(int).tolist())) if length else [0]


def _narrowest_of_good(candidates: Candidates) -> Candidate:
    """The narrowest of the candidates whose ELBO is nearly the best."""
    least = max(map(elbo_of, candidates)) - SAME_ELBO
    return min((c for c in candidates if c.elbo >= least), key=lambda c: c.normal.log_det)


def _best_of_paths(candidates: Candidates) -> Candidates:
    """The best candidate of each path, the best of all first."""
    best: dict[int, Candidate] = {}
    for each in sorted(candidates, key=elbo_of, reverse=True):
        best.setdefault(each.place[0], each)
    return list(best.values())


def _whitening(normal: Normal, rank: int | None) -> dict[str, np.ndarray]:
    """The arguments of the affine map, in the form that belongs to this rank."""
    if isinstance(normal, normals.LowRank):
        normal = normal.dense() if rank is None else normal.padded(rank)
    dtype = jnp.result_type(float)
    return {name: leaf.astype(dtype) for name, leaf in normal.whitening().items()}
