"""A dense network that stretches no distance by more than a bound, whatever its parameters."""

import dataclasses

import jax
import jax.numpy as jnp

from flowvi import checks
from flowvi.masked import add, context_term, init_layers, product, silu
from flowvi.params import Array, PyTree, Shape

#: Squarings of a Gram matrix: with five, the bound of a norm is above it by 3.3 % at rank 64.
NUM_SQUARINGS = 5

#: The slopes of s(x) = x sigmoid(x) and s(-x) have a norm of at most 1.10437, and at least 0.7071.
MAX_SLOPE = 1.1044


def spectral_bound(matrix: Array) -> Array:
    """A bound from above of the squared spectral norm of a matrix, smooth in its entries.

        ||W||^2 <= ||(W^T W)^m||_F^(1/m),  m = 2^5

    which is the squared Schatten norm of order 4 m, at most rank^(1 / 2m) times the left side.
    Unlike the estimate of power iteration it is never below the norm, and it has no state.

    Source: Delattre, Barthélemy, Araujo, Allauzen, "Efficient Bound of Lipschitz Constant for
    Convolutional Layers by Gram Iteration", 2023.
    """
    rows, columns = matrix.shape
    gram = matrix @ matrix.T if rows < columns else matrix.T @ matrix
    is_zero = jnp.trace(gram) == 0  # There the root has no derivative, but the result has: zero.
    power = jnp.where(is_zero, jnp.eye(len(gram), dtype=gram.dtype), gram)
    log_bound = jnp.zeros((), gram.dtype)
    for index in range(NUM_SQUARINGS):
        norm = jnp.linalg.norm(power)
        power, log_bound = power / norm, log_bound + jnp.log(norm) / 2**index
        power = power @ power
    log_bound = log_bound + jnp.log(jnp.linalg.norm(power)) / 2**NUM_SQUARINGS
    return jnp.where(is_zero, 0, jnp.exp(log_bound))


def bounded_matrix(raw: Array, bound: float) -> Array:
    """bound R / sqrt(1 + ||R||^2), whose spectral norm is below `bound` for every finite R."""
    # So that squares of large entries do not overflow; the result does not depend on it.
    size = jax.lax.stop_gradient(jnp.maximum(1, jnp.abs(raw).max()))
    scaled = raw / size
    return bound * scaled / jnp.sqrt(size**-2 + spectral_bound(scaled))


@dataclasses.dataclass(frozen=True)
class LipschitzNetwork:
    """g(x; c) of D coordinates with |g(x; c) - g(x'; c)| < lipschitz |x - x'| in Euclidean norm.

        h_1 = a(x W_1 + c U + b_1),  h_l = a(h_{l-1} W_l + b_l),  g = h_L W + b

    with a(x) = (s(x), s(-x)) / 1.1044, two numbers for each unit, s(x) = x sigmoid(x), whose slope
    has a norm between 0.64 and 1, so that little of the bound is lost; and each of the matrices W
    of spectral norm below lipschitz^(1 / number of matrices), by `bounded_matrix`. A new network
    returns zeros.

    Attributes:
        event_size: D.
        hidden_sizes: widths of the hidden layers.
        lipschitz: the bound, above 0 and below 1.
        context_size: the length of the context c, in which there is no bound; or None.

    Source: the activation is that of Perugachi-Diaz, Tomczak, Bhulai, "Invertible DenseNets with
    Concatenated LipSwish", 2021.
    """

    event_size: int
    hidden_sizes: Shape
    lipschitz: float
    context_size: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden_sizes", checks.sizes("hidden_sizes", self.hidden_sizes))
        rule = "`lipschitz` must be above 0 and below 1"
        checks.require(0 < self.lipschitz < 1, rule, self.lipschitz)

    def init(self, key: Array) -> dict[str, PyTree]:
        """Fresh parameters."""
        first, *keys = jax.random.split(key, 1 + len(self.hidden_sizes))
        sizes, count = (*self.hidden_sizes, self.event_size), len(keys)
        is_last = count == 0
        own = (self.event_size, sizes[0])
        params = init_layers(first, own, self.context_size, zero_output=is_last)
        for index, each in enumerate(keys):
            shape, is_last = (2 * sizes[index], sizes[index + 1]), index == count - 1
            params["layers"] += init_layers(each, shape, None, zero_output=is_last)["layers"]
        return params

    def bounded(self, params: PyTree) -> PyTree:
        """Parameters for `apply`, whose matrices are within their bounds."""
        # Less by more than rounding adds.
        bound = (1 - 1e-5) * self.lipschitz ** (1 / len(params["layers"]))
        layers = tuple(
            {"w": bounded_matrix(each["w"] * each["w"].shape[0] ** -0.5, bound), "b": each["b"]}
            for each in params["layers"]
        )
        return {**params, "layers": layers}

    def apply(self, bounded: PyTree, x: Array, context: Array | None = None) -> Array:
        """g(x; context), of shape [..., D]; leading axes broadcast."""
        h = x
        for index, layer in enumerate(bounded["layers"]):
            if index:
                up = silu(h)
                h = jnp.concatenate([up, up - h], -1) / MAX_SLOPE
            h = add(product(h, layer["w"]), layer["b"])
            if index == 0 and context is not None:
                h = add(h, context_term(bounded, context))
        return h
