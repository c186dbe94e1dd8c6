"""Transformers without a formula for their inverse, which is a search; see `flowvi.roots`.

They are the transformers of `flowvi.transformers`: called with raw parameters theta of shape
[..., P] they give a scalar bijector, the identity for theta = 0. Raw parameters are bounded
smoothly, so that slopes stay between bounds and every finite theta has an inverse.
"""

import abc
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from flowvi import checks
from flowvi.roots import Increasing, Monotone
from flowvi.smooth import bounded

Array = jax.Array


class _Increasing(Increasing):
    """A transformer that is the function of its bijectors too."""

    def __call__(self, theta: Array) -> Monotone:
        return Monotone(self, theta)


@dataclasses.dataclass(frozen=True)
class _OnInterval(_Increasing):
    """A function on [-interval, interval] that goes on linearly outside of it."""

    interval: float = dataclasses.field(default=4.0, kw_only=True)

    def __post_init__(self) -> None:
        checks.require(self.interval > 0, "`interval` must be positive", self.interval)
        for field in dataclasses.fields(self):
            if field.name != "interval":
                checks.positive_int(field.name, getattr(self, field.name))

    @abc.abstractmethod
    def inside(self, theta: Array, z: Array) -> tuple[Array, Array]:
        """f / interval at x = interval z, z in [-1, 1], and its slope."""

    def evaluate(self, theta: Array, x: Array) -> tuple[Array, Array]:
        z = x / self.interval
        # The least and the largest are taken so: the slope of z itself counts at the very ends.
        clipped = jnp.where(abs(z) > 1, jnp.sign(z), z)
        y, slope = self.inside(theta, clipped)
        return self.interval * (y + slope * (z - clipped)), slope

    def bracket(self, theta: Array, y: Array) -> tuple[Array, Array]:
        sides = []
        for end, best in ((-self.interval, jnp.minimum), (self.interval, jnp.maximum)):
            value, slope = self.evaluate(theta, jnp.full_like(y, end))
            sides.append(end + best((y - value) / slope, 0))
        return sides[0], sides[1]


@dataclasses.dataclass(frozen=True)
class UMNN(_OnInterval):
    """An unconstrained monotone network: the integral of a positive one.

    On [-I, I], and linearly beyond, with z = x / I,

        y = I (m + int_0^z g(u) du),   log g(u) = B tanh((c + sum_k v_k tanh(w_k (u - a_k))) / B)

    for B = 3, by Gauss-Legendre quadrature at `num_nodes` points between 0 and z. Its slope is that
    of the quadrature, so that density and map agree whatever the number of nodes. The weights of
    the network are theta = (m, c, v, log w, a), the last two counted from K even places.

    Attributes:
        num_units: K, at least 1.
        num_nodes: at least 1.
        interval: I, in units of the layer's input; positive.

    Source: Wehenkel, Louppe, "Unconstrained Monotonic Neural Networks", 2019.
    """

    num_units: int = 6
    num_nodes: int = 20

    @property
    def num_params(self) -> int:
        """3 K + 2."""
        return 3 * self.num_units + 2

    def inside(self, theta: Array, z: Array) -> tuple[Array, Array]:
        count = self.num_units
        places = (np.arange(1 - count, count, 2) / count).tolist()
        rule = np.polynomial.legendre.leggauss(self.num_nodes)  # on [-1, 1]
        nodes, weights = (jnp.asarray(a, z.dtype) for a in ((rule[0] + 1) / 2, rule[1] / 2))
        theta = theta[..., None, :]  # against the nodes

        def integral(z: Array) -> Array:
            u = z[..., None] * nodes
            total = theta[..., 1]
            for k in range(count):
                v, w, a = (theta[..., 2 + i * count + k] for i in range(3))
                steepness = 0.5 * count * jnp.exp(bounded(w, 0.7))
                total = total + bounded(v, 1.0) * jnp.tanh(
                    steepness * (u - places[k] - bounded(a, 1.0))
                )
            return z * (jnp.exp(bounded(total, 3.0)) * weights).sum(-1)

        y, slope = jax.jvp(integral, (z,), (jnp.ones_like(z),))
        return theta[..., 0, 0] + y, slope


@dataclasses.dataclass(frozen=True)
class SumOfSquares(_OnInterval):
    """The integral of a sum of squares of polynomials, which any positive polynomial is.

    On [-I, I], and linearly beyond, with z = x / I,

        y = I (m + int_0^z (e + (1 - e) sum_k (sum_j c_kj u^j)^2) du),   e = 0.01

    in closed form. theta is m and the raw coefficients, whose bounded values are counted from
    constants that are not alike.

    Attributes:
        num_squares: the number of squares, at least 1.
        degree: that of the polynomials squared, at least 1.
        interval: I, in units of the layer's input; positive.

    Source: Jaini, Selby, Yu, "Sum-of-Squares Polynomial Flow", 2019.
    """

    num_squares: int = 3
    degree: int = 3

    @property
    def num_params(self) -> int:
        """1 + squares (degree + 1)."""
        return 1 + self.num_squares * (self.degree + 1)

    def inside(self, theta: Array, z: Array) -> tuple[Array, Array]:
        size, least = self.degree + 1, 0.01
        start = np.arange(self.num_squares, 0, -1)
        start = (start / np.linalg.norm(start)).tolist()
        slope, squares = jnp.zeros((), z.dtype), [jnp.zeros((), z.dtype)] * (2 * size - 1)
        for k in range(self.num_squares):
            c = [bounded(theta[..., 1 + k * size + j], 1.5) for j in range(size)]
            c[0] = c[0] + start[k]
            slope = slope + _polynomial(c, z) ** 2
            for i in range(size):
                for j in range(size):
                    squares[i + j] = squares[i + j] + c[i] * c[j]
        area = z * _polynomial([each / (n + 1) for n, each in enumerate(squares)], z)
        return theta[..., 0] + least * z + (1 - least) * area, least + (1 - least) * slope


def _polynomial(coefficients: list[Array], z: Array) -> Array:
    """c_0 + c_1 z + ..., by Horner's rule."""
    total = jnp.zeros_like(z)
    for c in reversed(coefficients):
        total = total * z + c
    return total


@dataclasses.dataclass(frozen=True)
class Bernstein(_OnInterval):
    """A Bernstein polynomial with increasing coefficients.

    On [-I, I], and linearly beyond, with u = (1 + x / I) / 2 and N the degree,

        y = I (m + sum_n c_n binomial(N, n) u^n (1 - u)^(N - n)),   c_n - c_{n-1} = 2 exp(r_n) / N

    where the c_n are centred: c_N = -c_0. theta is (m, r), and r is bounded by 3.

    Attributes:
        degree: N, at least 1.
        interval: I, in units of the layer's input; positive.

    Source: Sick, Hothorn, Duerr, "Deep Transformation Models", 2020; Ramasinghe, Fernando, Khan,
    Barnes, "Robust Normalizing Flows Using Bernstein-type Polynomials", 2021.
    """

    degree: int = 10

    @property
    def num_params(self) -> int:
        """N + 1."""
        return self.degree + 1

    def inside(self, theta: Array, z: Array) -> tuple[Array, Array]:
        n, u = self.degree, 0.5 * (1 + z)
        steps = 2 / n * jnp.exp(bounded(theta[..., 1:], 3.0))
        ends = jnp.cumsum(steps, -1)
        half = 0.5 * ends[..., -1:]
        c = jnp.concatenate([-half, ends - half], -1)
        slope = 0.5 * n * (steps * _bernstein(n - 1, u)).sum(-1)
        return theta[..., 0] + (c * _bernstein(n, u)).sum(-1), slope


def _bernstein(degree: int, u: Array) -> Array:
    """The Bernstein basis of a degree at u, of shape [..., degree + 1]."""
    ups, downs = [jnp.ones_like(u)], [jnp.ones_like(u)]
    for _ in range(degree):
        ups.append(ups[-1] * u)
        downs.append(downs[-1] * (1 - u))
    terms = [math.comb(degree, n) * ups[n] * downs[degree - n] for n in range(degree + 1)]
    return jnp.stack(terms, -1)


@dataclasses.dataclass(frozen=True)
class DeepSigmoid(_Increasing):
    """A mixture of K logistic distribution functions between the reals, as in neural AR flows.

        y = logit(sum_k w_k sigmoid(a_k x + b_k)),   w = softmax(p)

    It is linear far away. theta is (p, log a, b), bounded by 3, 2 and 6; numbers of different units
    count by different factors, for units that are alike at the start would stay so.

    Attributes:
        num_units: K, at least 1.

    Source: Huang, Krueger, Lacoste, Courville, "Neural Autoregressive Flows", 2018.
    """

    num_units: int = 8

    def __post_init__(self) -> None:
        checks.positive_int("num_units", self.num_units)

    @property
    def num_params(self) -> int:
        """3 K."""
        return 3 * self.num_units

    def _parts(self, theta: Array) -> tuple[Array, Array, Array]:
        """log w, a and b, each of shape [..., K]."""
        count = self.num_units
        factors = jnp.asarray(np.linspace(0.5, 2.0, count), theta.dtype)
        p, a, b = (theta[..., i * count : (i + 1) * count] for i in range(3))
        scale = jnp.exp(bounded(factors[::-1] * a, 2.0))
        return jax.nn.log_softmax(bounded(p, 3.0)), scale, bounded(factors * b, 6.0)

    def evaluate(self, theta: Array, x: Array) -> tuple[Array, Array]:
        log_w, a, b = self._parts(theta)
        z = a * x[..., None] + b
        below, above = log_w + jax.nn.log_sigmoid(z), log_w + jax.nn.log_sigmoid(-z)
        y = jax.nn.logsumexp(below, -1) - jax.nn.logsumexp(above, -1)
        # The slope of log p by that of log sigmoid, each of them positive.
        rising = jax.nn.softmax(below) * jax.nn.sigmoid(-z)
        falling = jax.nn.softmax(above) * jax.nn.sigmoid(z)
        return y, (a * (rising + falling)).sum(-1)

    def bracket(self, theta: Array, y: Array) -> tuple[Array, Array]:
        # A mean of sigmoids lies between the least and the largest.
        _, a, b = self._parts(theta)
        ends = (y[..., None] - b) / a
        return ends.min(-1), ends.max(-1)
