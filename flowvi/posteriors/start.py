"""Where a fit starts: the best of many normal distributions along optimisation paths."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flowvi.posteriors.paths import MEMORY, Path, lbfgs
from flowvi.posteriors.target import Target

Array = jax.Array

#: Up to this size a Hessian is taken at every candidate, and up to the second one at all.
EVERY_HESSIAN, ANY_HESSIAN = 200, 2048

#: Runs of L-BFGS, their steps, and the points of each run that become candidates.
NUM_PATHS, NUM_STEPS, NUM_POINTS = 6, 300, 12

#: Draws that judge a candidate, and the part of them that may fall where there is no density.
NUM_DRAWS, MAX_LOST = 64, 0.1

#: Scales around zero at which starting points are looked for.
SCALES = (0.0, 1.0, 0.1, 1.0, 3.0, 1.0, 10.0, 0.3)

#: Distance from zero beyond which a run that still rises has gone.
FAR = 1e8

#: Directions in which the density is followed outwards.
MOST_DIRECTIONS = 32

#: Bounds on the precision of a candidate, and on one change of it.
PRECISIONS, CHANGE = (1e-12, 1e18), 10.0


class Normal(NamedTuple):
    """A normal distribution as a map from standard normal draws.

    Attributes:
        loc: of shape [D].
        matrix: of shape [D, D]; the covariance is matrix matrix^T.
        inverse: of `matrix`.
        log_det: log |det matrix|.
    """

    loc: Array
    matrix: Array
    inverse: Array
    log_det: Array


class Start(NamedTuple):
    """What the search for a start found.

    Attributes:
        whitening: the arguments of `bijectors.whitening.Dense`, or of `LowRank`.
        elbo: the ELBO of that normal distribution, in nats.
        origin: how it was found: "pathfinder", "laplace" or "variational".
        mode: the point of highest density that was seen.
        mode_value: the log density there.
        num_finite: how many of the first points had a density.
    """

    whitening: dict[str, Array]
    elbo: float
    origin: str
    mode: Array
    mode_value: float
    num_finite: int


@dataclasses.dataclass(frozen=True)
class Tempered:
    """The log density of a target, times the inverse temperature."""

    target: Target
    power: float = 1.0

    def __call__(self, u: Array, data: Any) -> Array:
        """The tempered log density at one vector."""
        return self.power * self.target.at(u, data)


def starting_points(
    target: Target, key: Array, start: Any, num_paths: int = NUM_PATHS
) -> tuple[Array, int]:
    """Points where the target has a density and a gradient, of shape [num_paths, D].

    Args:
        target: the target.
        key: a random key.
        start: points of the user's, of shape [..., D], or None.
        num_paths: how many to return.

    Returns:
        (points, how many of those tried had a density).

    Raises:
        ValueError: if none has, or the density is the same at all of them.
    """
    if start is None:
        noise = np.asarray(
            jax.random.normal(key, (8 * len(SCALES), target.event_size)), dtype=np.float64
        )
        scales = np.tile(SCALES, 8)
        scales[len(SCALES) :: len(SCALES)] = 1.0  # zero once
        points = jnp.asarray(noise * scales[:, None], jnp.result_type(float))
    else:
        points = jnp.atleast_2d(target.unconstrain(start))
    values, norms = map(np.asarray, _probe(target, points, target.data))
    finite = np.isfinite(values) & np.isfinite(norms)
    fix = (
        "Perhaps give the parameters' supports with `fv.Target.from_named`, or points inside with "
        "`start`?"
    )
    if not finite.any():
        got = values[~np.isfinite(values)]
        value = got[0] if len(got) else "a gradient that is not finite"
        raise ValueError(
            f"`target` must have a finite log density and gradient at one starting point at least; "
            f"got {value} at the first of {len(values)}, and nothing better at the others. {fix}"
        )
    if (norms[finite] == 0).all() and np.ptp(values[finite]) == 0:
        raise ValueError(
            f"`target` must depend on its vector; got the constant log density {values[finite][0]} "
            f"at {finite.sum()} points. A constant density over all vectors cannot be normalised."
        )
    chosen = np.flatnonzero(finite)
    chosen = np.resize(chosen, num_paths) if len(chosen) < num_paths else chosen[:num_paths]
    return points[chosen], int(finite.sum())


@jax.jit(static_argnums=0)
def _probe(target: Target, points: Array, data: Any) -> tuple[Array, Array]:
    values, gradients = jax.vmap(jax.value_and_grad(target.at), in_axes=(0, None))(points, data)
    return values, jnp.sum(jnp.abs(gradients), -1)


def has_hessian(target: Target) -> bool:
    """Whether the target can be differentiated twice, by forward over reverse."""
    u = jax.ShapeDtypeStruct((target.event_size,), jnp.result_type(float))
    try:
        jax.eval_shape(jax.hessian(target.at), u, target.data)
    except (TypeError, ValueError, NotImplementedError):
        return False
    return True


def find(
    target: Target, key: Array, start: Any = None, power: float = 1.0, rank: int | None = None
) -> Start:
    """The best normal distribution that optimisation paths lead to, by ELBO.

    L-BFGS runs from several points. Along each, two kinds of candidates are taken: the inverse
    Hessian that the run itself estimates (Pathfinder), and the Hessian at the point, made positive
    (Laplace). The best one by ELBO, or where a Hessian is at hand the normal distribution that a
    few steps of variational Newton make of it, is the start.

    Args:
        target: the target.
        key: a random key.
        start: points to start from, or None.
        power: the inverse temperature.
        rank: where not None, the result is a diagonal with so many directions.

    Raises:
        ValueError: if the target has no density anywhere, or is constant, or no candidate has an
            ELBO.

    Source: Zhang, Carpenter, Gelman, Vehtari, "Pathfinder: Parallel Quasi-Newton Variational
    Inference", 2022; the variational Newton steps are those of Opper, Archambeau, "The Variational
    Gaussian Approximation Revisited", 2009.
    """
    size = target.event_size
    point_key, draw_key, refine_key = jax.random.split(key, 3)
    points, num_finite = starting_points(target, point_key, start)
    density = Tempered(target, power)
    paths = _paths(density, points, target.data)
    _check_bounded(paths)
    z = jax.random.normal(draw_key, (NUM_DRAWS, size))
    x, gradient, steps, changes, diagonal = _candidates(density, paths)
    found, elbos = _pathfinders(density, z, x, gradient, steps, changes, diagonal, target.data)
    best = int(np.argmax(elbos))
    whitening: dict[str, Array] = {name: leaf[best] for name, leaf in found.items()}
    elbo, origin = float(elbos[best]), "pathfinder"
    if rank is None:
        hessians = has_hessian(target)
        normal = _dense(whitening)
        if hessians:
            order = x if size <= EVERY_HESSIAN else x[_last_of_best(paths)][None]
            laplaces, scores = _laplaces(density, z, order, target.data)
            best = int(np.argmax(scores))
            if scores[best] > elbo:
                elbo, origin = float(scores[best]), "laplace"
                normal = jax.tree.map(lambda leaf: leaf[best], laplaces)
            few = size > EVERY_HESSIAN
            settings = (4, 10) if few else (32, 24)
            refined, score = _refine(density, settings, normal, refine_key, z, target.data)
            if score > elbo:
                normal, elbo, origin = refined, float(score), "variational"
        whitening = normal._asdict()
    if not np.isfinite(elbo):
        raise ValueError(
            "`target` must have a density around the points that optimisation leads to; got none "
            f"where draws around {len(x)} of them fell. The density may be unbounded, or its "
            "support full of holes. Perhaps give supports with `fv.Target.from_named`?"
        )
    values = np.asarray(paths.value).ravel()
    values = np.where(np.isfinite(values), values, np.inf)
    top = int(np.argmin(values))
    return Start(
        whitening=whitening,
        elbo=elbo,
        origin=origin,
        mode=paths.x.reshape(-1, size)[top],
        mode_value=-float(values[top]) / power,
        num_finite=num_finite,
    )


@jax.jit(static_argnums=0)
def _paths(density: Tempered, points: Array, data: Any) -> Path:
    def negative(u: Array) -> Array:
        return -density(u, data)

    return jax.vmap(lambda u: lbfgs(negative, u, NUM_STEPS))(points)


def _check_bounded(paths: Path) -> None:
    """Checks that no run went far away and would still gain by going twice as far.

    Raises:
        ValueError: if one did.
    """
    x, gradient = np.asarray(paths.x[:, -1]), np.asarray(paths.gradient[:, -1])
    values = -np.asarray(paths.value[:, -1])
    distance = np.abs(x).max(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        gain = -(x * gradient).sum(-1)
    gone = (distance > FAR) & ~(gain < 1)
    if gone.any():
        index = int(np.argmax(gone))
        raise ValueError(
            "`target` must be bounded above and fall off; got a log density of "
            f"{values[index]:.3g} at a point {distance[index]:.1g} away from zero, where it still "
            "rises. It cannot be normalised."
        )


def directions_that_do_not_fall(target: Target, found: Start) -> int:
    """How many directions there are along which the density does not fall off as 1 / distance.

    The widest directions of the start are tried, both ways, a hundred and ten thousand of its
    standard deviations away. Where the density of a line falls more slowly than that it has no
    integral.
    """
    loc = found.whitening["loc"]
    if "matrix" in found.whitening:
        columns = found.whitening["matrix"].T
    else:
        basis, gain = found.whitening["basis"].T, found.whitening["gain"]
        columns = found.whitening["scale"] * basis * (1 + gain[:, None])
    widest = np.argsort(-np.linalg.norm(np.asarray(columns), axis=-1))[:MOST_DIRECTIONS]
    steps = jnp.concatenate([columns[widest], -columns[widest]])
    near, far = 1e2, 1e4
    points = jnp.stack([loc + near * steps, loc + far * steps])
    values = np.asarray(target(points), np.float64)
    with np.errstate(invalid="ignore"):
        fall = values[0] - values[1]
    return int((np.isfinite(values).all(0) & (fall < np.log(far / near))).sum())


def _last_of_best(paths: Path) -> int:
    """The number of the last candidate of the path that ends highest."""
    values = np.asarray(paths.value[:, -1])
    best = int(np.argmin(np.where(np.isfinite(values), values, np.inf)))
    return best * NUM_POINTS + NUM_POINTS - 1


@jax.jit(static_argnums=0)
def _candidates(density: Tempered, paths: Path) -> tuple[Array, ...]:
    """(x, gradient, steps, changes, diagonal) at some points of each path, flat.

    `diagonal` estimates the inverse Hessian's diagonal from all steps so far (Gilbert, Lemarechal,
    "Some Numerical Experiments with Variable-Storage Quasi-Newton Algorithms", 1989).
    """
    del density

    def of_path(path: Path) -> tuple[Array, ...]:
        steps, changes = jnp.diff(path.x, axis=0), jnp.diff(path.gradient, axis=0)
        products = jnp.sum(steps * changes, -1)
        norms = jnp.linalg.norm(steps, axis=-1) * jnp.linalg.norm(changes, axis=-1)
        useful = (products > 1e-10 * norms) & (norms > 0)

        def update(alpha: Array, pair: Any) -> tuple[Array, Array]:
            s, y, b, use = pair
            b = jnp.where(use, b, 1)
            a, c = jnp.sum(y * alpha * y), jnp.sum(s / alpha * s)
            precision = a / (b * alpha) + y**2 / b - a * s**2 / (b * c * alpha**2)
            new = 1 / precision
            good = use & jnp.all(jnp.isfinite(new) & (new > 0))
            alpha = jnp.where(good, new, alpha)
            return alpha, alpha

        first = jnp.ones_like(path.x[0])
        _, alphas = jax.lax.scan(update, first, (steps, changes, products, useful))
        share = jnp.arange(1, NUM_POINTS + 1) / NUM_POINTS
        index = jnp.ceil(path.length * share**2).astype(jnp.int32)
        index = jnp.clip(index, 1, jnp.maximum(path.length, 1))
        recent = index[:, None] - MEMORY + jnp.arange(MEMORY)
        use = (recent >= 0) & useful[jnp.maximum(recent, 0)]
        recent = jnp.maximum(recent, 0)
        return (
            path.x[index],
            path.gradient[index],
            jnp.where(use[..., None], steps[recent], 0),
            jnp.where(use[..., None], changes[recent], 0),
            alphas[index - 1],
        )

    flat = jax.vmap(of_path)(paths)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), flat)


@jax.jit(static_argnums=0)
def _pathfinders(
    density: Tempered,
    z: Array,
    x: Array,
    gradient: Array,
    steps: Array,
    changes: Array,
    diagonal: Array,
    data: Any,
) -> tuple[dict[str, Array], Array]:
    """Candidates in low-rank form, as arguments of `LowRank`, and their ELBOs."""

    def one(item: Any) -> tuple[dict[str, Array], Array]:
        x, gradient, steps, changes, diagonal = item
        scale = jnp.sqrt(diagonal)
        # The compact form of L-BFGS; a pair that was left out has zeros in place of its columns.
        s, y = steps.T, changes.T
        upper = jnp.triu(s.T @ y)
        used = jnp.diag(upper) > 0
        upper = upper + jnp.diag(jnp.where(used, 0.0, 1.0))
        inverse = jax.scipy.linalg.solve_triangular(upper, jnp.eye(MEMORY, dtype=x.dtype))
        inner = jnp.diag(jnp.diag(upper)) + y.T @ (diagonal[:, None] * y)
        corner = inverse.T @ inner @ inverse
        middle = jnp.block([[jnp.zeros_like(inverse), -inverse], [-inverse.T, corner]])
        wide = jnp.concatenate([scale[:, None] * y, s / scale[:, None]], 1)
        basis, root = jnp.linalg.qr(wide)
        values, vectors = jnp.linalg.eigh(root @ middle @ root.T)
        gain = jnp.sqrt(jnp.maximum(1 + values, 1e-8)) - 1
        basis = basis @ vectors
        descent = scale * gradient
        step = descent + basis @ (((1 + gain) ** 2 - 1) * (basis.T @ descent))
        whitening = {"loc": x - scale * step, "scale": scale, "basis": basis, "gain": gain}

        def forward(z: Array) -> Array:
            return whitening["loc"] + scale * (z + (z @ basis * gain) @ basis.T)

        log_det = jnp.sum(jnp.log(scale)) + jnp.sum(jnp.log1p(gain))
        return whitening, _elbo(density, forward(z), z, log_det, data)

    return jax.lax.map(one, (x, gradient, steps, changes, diagonal))


def _elbo(density: Tempered, u: Array, z: Array, log_det: Array, data: Any) -> Array:
    """The ELBO of a normal distribution from draws u = loc + matrix z; -inf without a density."""
    values = jax.vmap(density, in_axes=(0, None))(u, data)
    entropy = 0.5 * jnp.sum(z**2, -1) + 0.5 * z.shape[-1] * jnp.log(2 * jnp.pi) + log_det
    weights = values + entropy
    good = jnp.isfinite(weights)
    mean = jnp.sum(jnp.where(good, weights, 0)) / jnp.maximum(jnp.sum(good), 1)
    enough = jnp.mean(good.astype(z.dtype)) >= 1 - MAX_LOST
    return jnp.where(enough & jnp.isfinite(mean), mean, -jnp.inf)


def _dense(low_rank: dict[str, Array]) -> Normal:
    scale, basis, gain = low_rank["scale"], low_rank["basis"], low_rank["gain"]
    eye = jnp.eye(scale.shape[0], dtype=scale.dtype)
    matrix = scale[:, None] * (eye + (basis * gain) @ basis.T)
    inverse = (eye - (basis * (gain / (1 + gain))) @ basis.T) / scale
    log_det = jnp.sum(jnp.log(scale)) + jnp.sum(jnp.log1p(gain))
    return Normal(low_rank["loc"], matrix, inverse, log_det)


def _normal(loc: Array, precision: Array) -> Normal:
    """N(loc, |precision|^-1), with each eigenvalue of the precision made positive."""
    values, vectors = jnp.linalg.eigh(precision)
    low = jnp.maximum(PRECISIONS[0], jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values)))
    root = jnp.sqrt(jnp.clip(jnp.abs(values), low, PRECISIONS[1]))
    return Normal(loc, vectors / root, root[:, None] * vectors.T, -jnp.sum(jnp.log(root)))


@jax.jit(static_argnums=0)
def _laplaces(density: Tempered, z: Array, x: Array, data: Any) -> tuple[Normal, Array]:
    def one(x: Array) -> tuple[Normal, Array]:
        hessian = jax.hessian(density)(x, data)
        good = jnp.isfinite(jnp.sum(jnp.abs(hessian)))
        normal = _normal(x, -jnp.where(good, hessian, -jnp.eye(x.shape[0], dtype=x.dtype)))
        u = normal.loc + z @ normal.matrix.T
        elbo = _elbo(density, u, z, normal.log_det, data)
        return normal, jnp.where(good, elbo, -jnp.inf)

    return jax.lax.map(one, x)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _refine(
    density: Tempered, settings: tuple[int, int], normal: Normal, key: Array, z: Array, data: Any
) -> tuple[Normal, Array]:
    """The best of some variational Newton steps from a normal distribution, and its ELBO.

    In the coordinates in which q is standard normal, the best q near it has the precision
    -E_q Hessian and the mean shifted by precision^-1 E_q gradient.
    """
    num_pairs, num_rounds = settings
    size = z.shape[-1]

    def moments(normal: Normal, noise: Array) -> tuple[Array, Array]:
        def at(z: Array) -> tuple[Array, Array, Array]:
            u = normal.loc + normal.matrix @ z
            gradient = jax.grad(density)(u, data)
            hessian = jax.hessian(density)(u, data)
            good = jnp.isfinite(jnp.sum(jnp.abs(hessian)) + jnp.sum(jnp.abs(gradient)))
            return jnp.where(good, gradient, 0), jnp.where(good, hessian, 0), good

        def add(total: Any, z: Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.tree.map(sum_rows, jax.vmap(at)(z))), None

        def sum_rows(leaf: Array) -> Array:
            return jnp.sum(leaf, 0).astype(z.dtype)

        both = jnp.concatenate([noise, -noise])
        chunk = min(16, len(both)) if size <= EVERY_HESSIAN else 1
        zero = jnp.zeros((), z.dtype)
        start = (jnp.zeros(size, z.dtype), jnp.zeros((size, size), z.dtype), zero)
        (gradient, hessian, count), _ = jax.lax.scan(add, start, both.reshape(-1, chunk, size))
        count = jnp.maximum(count, 1)
        inner = normal.matrix.T @ (hessian / count) @ normal.matrix
        return normal.matrix.T @ (gradient / count), -0.5 * (inner + inner.T)

    def advance(carry: Any, item: Any) -> tuple[Any, None]:
        normal, best, best_elbo = carry
        noise, weight = item
        gradient, precision = moments(normal, noise)
        values, vectors = jnp.linalg.eigh(precision)
        values = jnp.clip(jnp.abs(values), 1 / CHANGE, CHANGE)
        shift = weight * vectors @ (vectors.T @ gradient / values)
        longest = 2 * jnp.sqrt(size)
        shift = shift * jnp.minimum(1, longest / jnp.maximum(jnp.linalg.norm(shift), 1e-30))
        root = values ** (0.5 * weight)
        new = Normal(
            normal.loc + normal.matrix @ shift,
            (normal.matrix @ vectors) / root,
            root[:, None] * (vectors.T @ normal.inverse),
            normal.log_det - jnp.sum(jnp.log(root)),
        )
        good = jnp.isfinite(jnp.sum(jnp.abs(new.matrix)) + jnp.sum(jnp.abs(new.loc)))
        new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, normal)
        u = new.loc + z @ new.matrix.T
        elbo = _elbo(density, u, z, new.log_det, data)
        better = elbo > best_elbo
        best = jax.tree.map(lambda a, b: jnp.where(better, a, b), new, best)
        return (new, best, jnp.where(better, elbo, best_elbo)), None

    noise = jax.random.normal(key, (num_rounds, num_pairs, size), z.dtype)
    # Full steps first; then ever shorter ones, which average the noise.
    rounds = jnp.arange(num_rounds)
    half = num_rounds // 2
    weights = jnp.where(rounds < half, 1.0, 2.0 / (2 + rounds - half)).astype(z.dtype)
    first = jnp.full((), -jnp.inf, z.dtype)
    (_, best, elbo), _ = jax.lax.scan(advance, (normal, normal, first), (noise, weights))
    return best, elbo
