"""Normal distributions as maps from standard normal draws, in double precision on the host.

`draw` maps z of shape [n, D], and `whitening` gives the arguments of the bijectors of these names.
"""

import dataclasses

import numpy as np

Array = np.ndarray

#: Bounds on the precision of a direction.
PRECISIONS = (1e-12, 1e18)


@dataclasses.dataclass(frozen=True)
class Dense:
    """u = loc + matrix z, with the inverse of the matrix."""

    loc: Array
    matrix: Array
    inverse: Array

    @property
    def log_det(self) -> float:
        return float(np.linalg.slogdet(self.matrix)[1])

    def draw(self, z: Array) -> Array:
        return self.loc + z @ self.matrix.T

    def whitening(self) -> dict[str, Array]:
        return {**vars(self), "log_det": np.asarray(self.log_det)}

    def dense(self) -> "Dense":
        return self


@dataclasses.dataclass(frozen=True)
class LowRank:
    """u = loc + scale * (z + basis (gain * (basis^T z))), the columns of the basis orthonormal."""

    loc: Array
    scale: Array
    basis: Array
    gain: Array

    @property
    def log_det(self) -> float:
        return float(np.log(self.scale).sum() + np.log1p(self.gain).sum())

    def draw(self, z: Array) -> Array:
        return self.loc + self.scale * (z + (z @ self.basis * self.gain) @ self.basis.T)

    def whitening(self) -> dict[str, Array]:
        return dict(vars(self))

    def padded(self, rank: int) -> "LowRank":
        """The same with at least so many directions, those that are missing without effect."""
        missing = max(rank - len(self.gain), 0)
        basis = np.pad(self.basis, ((0, 0), (0, missing)))
        return LowRank(self.loc, self.scale, basis, np.pad(self.gain, (0, missing)))

    def dense(self) -> Dense:
        eye = np.eye(len(self.loc))
        matrix = self.scale[:, None] * (eye + (self.basis * self.gain) @ self.basis.T)
        shrink = self.gain / (1 + self.gain)
        inverse = (eye - (self.basis * shrink) @ self.basis.T) / self.scale
        return Dense(self.loc, matrix, inverse)


Normal = Dense | LowRank


def laplace(loc: Array, precision: Array, resolution: float) -> Dense | None:
    """N(loc, |precision|^-1), with each eigenvalue made positive; None if that cannot be."""
    if not np.isfinite(precision).all():
        return None
    try:
        values, vectors = np.linalg.eigh(0.5 * (precision + precision.T))
    except np.linalg.LinAlgError:
        return None
    low = max(PRECISIONS[0], resolution * np.abs(values).max())  # less is rounding
    root = np.sqrt(np.clip(np.abs(values), low, PRECISIONS[1]))
    return Dense(loc, vectors / root, root[:, None] * vectors.T)


def newton(
    normal: Dense, gradient: Array, hessian: Array, weight: float, bound: float
) -> Dense | None:
    """A part `weight` of a variational Newton step from q; None where that is not finite."""
    # In the coordinates in which q is standard normal, the best q near it has the precision
    # -E_q Hessian and the mean shifted by precision^-1 E_q gradient.
    inner = -normal.matrix.T @ hessian @ normal.matrix
    if not np.isfinite(inner).all():
        return None
    values, vectors = np.linalg.eigh(0.5 * (inner + inner.T))
    values = np.clip(np.abs(values), 1 / bound, bound)
    shift = weight * vectors @ (vectors.T @ (normal.matrix.T @ gradient) / values)
    shift *= min(1.0, 2 * np.sqrt(len(shift)) / max(float(np.linalg.norm(shift)), 1e-300))
    root = values ** (0.5 * weight)
    loc, matrix = normal.loc + normal.matrix @ shift, (normal.matrix @ vectors) / root
    finite = np.isfinite(matrix).all() and np.isfinite(loc).all()
    return Dense(loc, matrix, root[:, None] * (vectors.T @ normal.inverse)) if finite else None


# What overflows, on a path through a steep place, is no candidate: both check what they return.
@np.errstate(over="ignore", invalid="ignore")
def pathfinder(
    x: Array, gradient: Array, steps: Array, changes: Array, diagonal: Array
) -> LowRank | None:
    """The normal distribution that L-BFGS sees at a point x; None if it sees none.

    Its covariance is the compact form of the inverse Hessian's estimate,

        diag + [diag Y, S] [[0, -R^-1], [-R^-T, R^-T (E + Y^T diag Y) R^-1]] [diag Y, S]^T

    for the latest steps S^T and changes Y^T of the gradient, of shape [J, D], with R the upper
    triangle of S^T Y and E its diagonal; its mean is a Newton step from x.

    Source: Byrd, Nocedal, Schnabel, "Representations of Quasi-Newton Matrices", 1994.
    """
    scale = np.sqrt(diagonal)
    s, y = steps.T, changes.T
    upper = np.triu(s.T @ y)
    try:
        inverse = np.linalg.inv(upper)
        corner = inverse.T @ (np.diag(np.diag(upper)) + y.T @ (diagonal[:, None] * y)) @ inverse
        middle = np.block([[np.zeros_like(inverse), -inverse], [-inverse.T, corner]])
        basis, root = np.linalg.qr(np.concatenate([scale[:, None] * y, s / scale[:, None]], 1))
        values, vectors = np.linalg.eigh(root @ middle @ root.T)
    except np.linalg.LinAlgError:
        return None
    gain = np.sqrt(np.maximum(1 + values, 1e-8)) - 1
    basis = basis @ vectors
    descent = scale * gradient
    step = descent + basis @ (((1 + gain) ** 2 - 1) * (basis.T @ descent))
    normal = LowRank(x - scale * step, scale, basis, gain)
    return normal if all(np.isfinite(leaf).all() for leaf in vars(normal).values()) else None


@np.errstate(all="ignore")
def diagonals(steps: Array, changes: Array) -> tuple[Array, Array]:
    """Estimates [T, D] of the inverse Hessian's diagonal, and which of T steps were of use.

    Source: Gilbert, Lemarechal, "Some Numerical Experiments with Variable-Storage Quasi-Newton
    Algorithms", 1989.
    """
    products = (steps * changes).sum(-1)
    norms = np.linalg.norm(steps, axis=-1) * np.linalg.norm(changes, axis=-1)
    useful = (products > 1e-10 * norms) & (norms > 0) & np.isfinite(products + norms)
    alpha = np.ones(steps.shape[-1])
    result = np.empty_like(steps)
    for index, (s, y, b) in enumerate(zip(steps, changes, products, strict=True)):
        if useful[index]:
            a, c = y @ (alpha * y), s @ (s / alpha)
            new = 1 / (a / (b * alpha) + y**2 / b - a * s**2 / (b * c * alpha**2))
            if np.isfinite(new).all() and (new > 0).all():
                alpha = new
        result[index] = alpha
    return result, useful
