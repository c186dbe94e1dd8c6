"""Where a fit starts: the best of many normal distributions along optimisation paths."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowvi.compiling import compiled
from flowvi.posteriors import normals, vectorise
from flowvi.posteriors.candidates import (
    EVERY_HESSIAN,
    Candidate,
    Judge,
    TemperedDensity,
    elbo_of,
    even_draws,
    laplaces,
    pathfinders,
    refine,
)
from flowvi.posteriors.paths import Path, lbfgs
from flowvi.posteriors.target import Target

Array = jax.Array

#: Runs of L-BFGS, their steps, and the points of each run that become candidates.
NUM_PATHS, NUM_STEPS, NUM_POINTS = 6, 300, 10

#: Draws around the end of a run, to look whether a posterior has anything there.
NUM_END_DRAWS = 32

#: Nats of the ELBO within which the narrowest candidate is taken. A flow that has to widen finds
#: narrow places that one which has to shrink leaves out.
SAME_ELBO = 1.0

#: Standard deviations of the start that further runs begin away from it, in each direction.
WIDTHS = (3.0, 5.0, 8.0, 12.0, 20.0, 40.0)

#: Nats of the ELBO by which normal distributions at the ends of two runs differ where the ends do.
SAME_MODE = 0.1

#: Scales around zero at which starting points are looked for; zero itself comes first.
SCALES = (1.0, 0.1, 1.0, 3.0, 1.0, 10.0, 0.3)

#: Distance from zero beyond which a run that still rises has gone.
FAR = 1e8


@dataclasses.dataclass(frozen=True)
class Start:
    """What the search for a start found.

    Attributes:
        whitening: the arguments of `flowvi.bijectors.Dense`, or of `LowRank`.
        best: those of the normal distribution of highest ELBO; the start is narrower where the two
            are nearly as good.
        elbo: the ELBO of the start, in nats, from a few hundred draws.
        origin: how it was found: "pathfinder", "laplace" or "variational".
        mode: the point of highest density that was seen.
        mode_value: the log density there.
        num_finite: how many of the first points had a density.
        ends: for each run that led to one, draws of the normal distribution around its end, of
            shape [number, draws, D]; empty where Hessians are dear or the density was tempered.
            Runs that look for further modes are among them.
        end_elbos: the ELBOs of those, in nats: each a lower bound on the mass around that end.
    """

    whitening: dict[str, np.ndarray]
    best: dict[str, np.ndarray]
    elbo: float
    origin: str
    mode: np.ndarray
    mode_value: float
    num_finite: int
    ends: np.ndarray
    end_elbos: np.ndarray


def find(
    target: Target, key: Array, start: Any = None, power: float = 1.0, rank: int | None = None
) -> Start:
    """The best normal distribution that optimisation paths lead to, by ELBO.

    L-BFGS runs from several points. Along each, two kinds of candidates are taken: the inverse
    Hessian that the run itself estimates (Pathfinder), and the Hessian at the point, made positive
    (Laplace). Where Hessians are at hand, variational Newton steps start from the best one of each
    run. The start is the narrowest of those whose ELBO is nearly the best.

    Densities and their derivatives are compiled; the little linear algebra between them is not.

    Args:
        target: the target.
        key: a random key.
        start: points to start from, in the user's space, or None.
        power: the inverse temperature.
        rank: where not None, the result is a diagonal with so many directions.

    Raises:
        ValueError: if the target has no density anywhere, is constant or rises without end, or no
            candidate has an ELBO.

    Source: Zhang, Carpenter, Gelman, Vehtari, "Pathfinder: Parallel Quasi-Newton Variational
    Inference", 2022; the variational Newton steps are those of Opper, Archambeau, "The Variational
    Gaussian Approximation Revisited", 2009.
    """
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    points, num_finite = starting_points(target, rng, start)
    density = TemperedDensity(target, power)
    paths = jax.device_get(_paths(density, points, target.data))
    _check_bounded(paths)
    size = target.event_size
    judge = Judge(density, even_draws(rng, size))
    indices = [_indices(int(length)) for length in paths.length]
    places = [(p, i) for p, path in enumerate(indices) for i in path]
    candidates = judge.all(pathfinders(paths, indices), places, "pathfinder")
    ends: list[Candidate] = []
    if rank is None and has_hessian(target):
        if size > EVERY_HESSIAN:
            top = _top(paths)
            places = [(top, int(paths.length[top]))]
        x = np.stack([paths.x[place] for place in places])
        around = judge.all(laplaces(density, x), places, "laplace")
        if size <= EVERY_HESSIAN and power == 1:
            ends = [each for each in around if each.place[1] == indices[each.place[0]][-1]]
        candidates += around
        # The best candidate of all may lead to a lesser optimum.
        first = _best_of_paths(candidates)[: NUM_PATHS if size <= EVERY_HESSIAN else 1]
        candidates = [refine(density, each, judge, rng) for each in first]
    if not candidates:
        raise ValueError(
            "`target` must have a density around the points that optimisation leads to; got none "
            f"where draws around {sum(map(len, indices))} of them fell. The density may be "
            "unbounded, or its support full of holes. Perhaps give supports with "
            "`fv.Target.from_named`?"
        )
    values = np.where(np.isfinite(paths.value), paths.value, np.inf)
    place = np.unravel_index(np.argmin(values), values.shape)
    best = max(candidates, key=elbo_of)
    # A flattened density is to be covered, and only refined candidates are near an optimum each.
    scored = best if power < 1 or best.origin != "variational" else _narrowest_of_good(candidates)
    dtype = jnp.result_type(float)
    if ends:
        ends += _more_ends(density, ends, scored.normal, judge, rng)
    return Start(
        whitening=_whitening(scored.normal, rank),
        best=_whitening(best.normal, rank),
        elbo=scored.elbo,
        origin=scored.origin,
        mode=paths.x[place],
        mode_value=-float(values[place]) / power,
        num_finite=num_finite,
        ends=np.array([end.normal.draw(judge.z[:NUM_END_DRAWS]) for end in ends], dtype),
        end_elbos=np.array([end.elbo for end in ends]),
    )


def starting_points(
    target: Target, rng: np.random.Generator, start: Any, num_paths: int = NUM_PATHS
) -> tuple[Array, int]:
    """Points where the target has a density and a gradient, of shape [num_paths, D].

    Args:
        target: the target.
        rng: random numbers.
        start: points of the user's, in the user's space, or None.
        num_paths: how many to return.

    Returns:
        (points, how many of those tried had a density).

    Raises:
        ValueError: if none has, or the density is the same at all of them.
    """
    if start is None:
        scales = np.r_[0.0, np.tile(SCALES, 9)]
        noise = rng.standard_normal((len(scales), target.event_size))
        points = jnp.asarray(noise * scales[:, None], jnp.result_type(float))
    else:
        points = jnp.atleast_2d(target.unconstrain(start))
    values, norms = map(np.asarray, _probe(target, points, target.data))
    finite = np.isfinite(values) & np.isfinite(norms)
    if not finite.any():
        got = values[~np.isfinite(values)]
        value = str(got[0]) if len(got) else "a gradient that is not finite"
        raise ValueError(
            "`target` must have a finite log density and gradient at one starting point at least; "
            f"got {value} at the first of {len(values)}, and nothing better at the others. Perhaps "
            "give the parameters' supports with `fv.Target.from_named`, or points inside with "
            "`start`?"
        )
    if (norms[finite] == 0).all() and np.ptp(values[finite]) == 0:
        raise ValueError(
            f"`target` must depend on its vector; got the constant log density {values[finite][0]} "
            f"at {finite.sum()} points. A constant density over all vectors cannot be normalised."
        )
    chosen = np.resize(np.flatnonzero(finite), num_paths)
    return points[chosen], int(finite.sum())


@compiled()
def _probe(target: Target, points: Array, data: Any) -> tuple[Array, Array]:
    values, gradients = vectorise.over(jax.value_and_grad(target.at), points, data)
    return values, jnp.sum(jnp.abs(gradients), -1)


def has_hessian(target: Target) -> bool:
    """Whether the target can be differentiated twice, by forward over reverse."""
    u = jax.ShapeDtypeStruct((target.event_size,), jnp.result_type(float))
    try:
        jax.eval_shape(jax.hessian(target.at), u, target.data)
    except (TypeError, ValueError, NotImplementedError):
        return False
    return True


@compiled()
def _paths(density: TemperedDensity, points: Array, data: Any) -> Path:
    def path(u: Array, data: Any) -> Path:
        return lbfgs(lambda u: -density(u, data), u, NUM_STEPS)

    return vectorise.over(path, points, data)


def _check_bounded(paths: Path) -> None:
    """Checks that no run went far away and would still gain by going twice as far.

    Raises:
        ValueError: if one did.
    """
    x, gradient = paths.x[:, -1], paths.gradient[:, -1]
    distance = np.abs(x).max(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        gain = -(x * gradient).sum(-1)
    gone = (distance > FAR) & ~(gain < 1)
    if gone.any():
        index = int(np.argmax(gone))
        raise ValueError(
            "`target` must be bounded above and fall off; got a log density of "
            f"{-paths.value[index, -1]:.3g} at a point {distance[index]:.1g} away from zero, where "
            "it still rises. It cannot be normalised."
        )


def _indices(length: int) -> list[int]:
    """The points of a path that become candidates: denser at its beginning, with its end."""
    share = np.arange(1, NUM_POINTS + 1) / NUM_POINTS
    return sorted(set(np.ceil(length * share**2).astype(int).tolist())) if length else [0]


def _top(paths: Path) -> int:
    """The path that ends highest."""
    ends = paths.value[:, -1]
    return int(np.argmin(np.where(np.isfinite(ends), ends, np.inf)))


def _narrowest_of_good(candidates: list[Candidate]) -> Candidate:
    """The narrowest of the candidates whose ELBO is nearly the best."""
    least = max(map(elbo_of, candidates)) - SAME_ELBO
    good = [each for each in candidates if each.elbo >= least]
    return min(good, key=lambda each: each.normal.log_det)


def _whitening(normal: normals.Dense | normals.LowRank, rank: int | None) -> dict[str, np.ndarray]:
    """The arguments of the affine map, in the form that belongs to this rank."""
    if isinstance(normal, normals.LowRank):
        normal = normal.dense() if rank is None else normal.padded(rank)
    dtype = jnp.result_type(float)
    return {name: leaf.astype(dtype) for name, leaf in normal.whitening().items()}


def _best_of_paths(candidates: list[Candidate]) -> list[Candidate]:
    """The best candidate of each path, the best of all first."""
    best: dict[int, Candidate] = {}
    for each in sorted(candidates, key=elbo_of, reverse=True):
        best.setdefault(each.place[0], each)
    return list(best.values())


def _more_ends(
    density: TemperedDensity,
    ends: list[Candidate],
    normal: normals.Dense | normals.LowRank,
    judge: Judge,
    rng: np.random.Generator,
) -> list[Candidate]:
    """Normal distributions at the ends of more runs, which look for modes the first ones missed.

    The first runs begin near zero and may all end in one mode: some begin many standard deviations
    away from it. Where ends differ, others begin between them and the start. Where coordinates have
    modes of their own there are very many together, and one that a run ends in by chance may have
    next to no mass: a point that takes half of its coordinates from the start leads to one of more.
    """
    z = rng.standard_normal((len(WIDTHS), len(normal.loc))) * np.array(WIDTHS)[:, None]
    points = [normal.draw(z), normal.draw(-z)]
    if np.ptp([each.elbo for each in ends]) > SAME_MODE:
        others = np.resize([each.normal.loc for each in ends], (NUM_PATHS, len(normal.loc)))
        points.append(np.where(rng.random(others.shape) < 0.5, others, normal.loc))
    found = []
    for each in points:
        # As many at once as before: the program is there.
        start = jnp.asarray(each, jnp.result_type(float))
        x = np.asarray(_paths(density, start, density.target.data).x[:, -1])
        found += judge.all(laplaces(density, x), [(0, 0)] * len(x), "laplace")
    return found
