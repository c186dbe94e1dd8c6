"""A triangular map whose shifts are quadratic, found by regression on draws."""

import dataclasses
import itertools

import distrax
import jax
import jax.numpy as jnp
import numpy as np

from flowvi.bijectors import MAF
from flowvi.families.family import Params
from flowvi.params import Array, Fixed
from flowvi.transformers import Affine

#: The bound on log-scales: a ridge may be thinner than a network should ever make one.
MOST_LOG_SCALE = 30.0

#: Standard errors from which on a term is kept, and rounds of leaving out.
CLEAR, NUM_SELECTIONS = 4.0, 4

#: The part of a coordinate's variance that regression regards as rounding.
ROUNDING = 1e-13


@dataclasses.dataclass(frozen=True)
class Curved:
    """The map z -> x of which each coordinate follows others along a parabola.

        x_i = m_i + sum_j L_ij x_j + sum_jk Q_ijk x_j x_k + s_i z_i

    over coordinates j, k that stand before i in some order. No optimizer moves it; at fresh
    parameters it is the identity.

    Source: Parno, Marzouk, "Transport Map Accelerated Markov Chain Monte Carlo", 2018.
    """

    event_size: int
    name = "curved"

    def init(self, key: Array) -> Params:
        del key
        size = self.event_size
        shapes = {"loc": (size,), "linear": (size,) * 2, "quadratic": (size,) * 3}
        zeros = {name: jnp.zeros(shape) for name, shape in shapes.items()}
        return {"curve": Fixed({**zeros, "log_scale": jnp.zeros(size)})}

    def bijector(self, params: Params, context: Array | None) -> distrax.Bijector:
        return MAF(Quadratic(**params["curve"].value), Affine(MOST_LOG_SCALE))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quadratic:
    """The conditioner of `Curved`: the affine map that takes x_i to z_i."""

    loc: Array
    linear: Array
    quadratic: Array
    log_scale: Array

    def __call__(self, x: Array) -> Array:
        shift = self.loc + x @ self.linear.T
        shift = shift + jnp.einsum("...j,...k,ijk->...i", x, x, self.quadratic)
        # `Affine` bounds what it is given by a tangent.
        raw = MOST_LOG_SCALE * jnp.arctanh(-self.log_scale / MOST_LOG_SCALE)
        scale = jnp.exp(-self.log_scale)
        return jnp.stack([-shift * scale, jnp.broadcast_to(raw, shift.shape)], -1)


def curve_of(x: np.ndarray) -> tuple[dict[str, np.ndarray], float]:
    """What `Curved` needs to follow draws of shape [n, D] in units of their own, and its gain.

    The gain is that of the mean log density over the best linear map, in nats, less what as many
    coefficients gain on noise.
    """
    orders = [tuple(range(x.shape[1])), tuple(range(x.shape[1]))[::-1], _greedy(x)]
    fits = [_along(x, order) for order in dict.fromkeys(orders)]
    curve = min(fits, key=lambda each: each["log_scale"].sum())
    linear = -0.5 * np.linalg.slogdet(np.cov(x.T).reshape(x.shape[1], -1))[1]
    count = (np.abs(curve["quadratic"]) > 0).sum()
    noise = 0.5 * count * np.log(len(x)) / len(x)
    return curve, float(-curve["log_scale"].sum() - linear - noise)


def _features(x: np.ndarray, before: tuple[int, ...]) -> np.ndarray:
    pairs = itertools.combinations_with_replacement(before, 2)
    columns = [np.ones(len(x)), *(x[:, j] for j in before), *(x[:, j] * x[:, k] for j, k in pairs)]
    return np.stack(columns, 1)


def _regressed(x: np.ndarray, i: int, before: tuple[int, ...]) -> tuple[np.ndarray, float]:
    """(coefficients, residual standard deviation) of x_i given others.

    A term that draws do not tell from noise is left out: far away from them it would be all.
    """
    features, y = _features(x, before), x[:, i]
    kept = np.ones(features.shape[1], bool)
    for last in (False,) * NUM_SELECTIONS + (True,):
        scale = np.linalg.norm(features[:, kept], axis=0)
        u, sizes, vt = np.linalg.svd(features[:, kept] / scale, full_matrices=False)
        good = sizes > sizes[0] * 1e-10
        vt, sizes, u = vt[good], sizes[good], u[:, good]
        found = vt.T @ ((u.T @ y) / sizes) / scale
        residual = y - features[:, kept] @ found
        variance = np.sum(residual**2) / max(len(x) - kept.sum(), 1) + ROUNDING * y.var()
        error = np.sqrt(variance * np.sum((vt.T / sizes) ** 2, axis=1)) / scale
        clear = np.abs(found) > CLEAR * error
        clear[0] = True
        if last or clear.all():
            break
        kept[np.flatnonzero(kept)[~clear]] = False
    coefficients = np.zeros(features.shape[1])
    coefficients[kept] = found
    residual = y - features @ coefficients
    return coefficients, float(np.sqrt(np.mean(residual**2) + ROUNDING * y.var()))


def _greedy(x: np.ndarray) -> tuple[int, ...]:
    """The order that leaves for the end what others tell most about."""
    rest = list(range(x.shape[1]))
    order: list[int] = []
    while len(rest) > 1:
        others = {i: tuple(j for j in rest if j != i) for i in rest}
        last = min(rest, key=lambda i: _regressed(x, i, others[i])[1] / x[:, i].std())
        order.insert(0, last)
        rest.remove(last)
    return (*rest, *order)


def _along(x: np.ndarray, order: tuple[int, ...]) -> dict[str, np.ndarray]:
    size = x.shape[1]
    curve = {"loc": np.zeros(size), "linear": np.zeros((size, size)), "log_scale": np.zeros(size)}
    quadratic = np.zeros((size,) * 3)
    for place, i in enumerate(order):
        before = order[:place]
        found, sd = _regressed(x, i, before)
        curve["loc"][i], curve["log_scale"][i] = found[0], np.log(sd)
        curve["linear"][i, list(before)] = found[1 : 1 + place]
        pairs = itertools.combinations_with_replacement(before, 2)
        for (j, k), value in zip(pairs, found[1 + place :], strict=True):
            quadratic[i, j, k] = value
    return {**curve, "quadratic": quadratic}
