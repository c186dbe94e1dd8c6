"""Linear maps of orthogonal matrices: products of reflections, QR and singular values."""

from collections.abc import Callable

import distrax
import jax
import jax.numpy as jnp

from flowvi.bijectors.linear import MAX_LOG_DIAGONAL, LULinear
from flowvi.params import Array, PyTree
from flowvi.smooth import bounded


def reflections(vectors: Array) -> Array:
    """The product of Householder's reflections I - 2 v v^T / |v|^2, orthogonal: [..., D, D].

    Args:
        vectors: of shape [..., K, D]; where one is 0 its reflection is left out.

    Source: Tomczak, Welling, "Improving Variational Auto-Encoders using Householder Flow", 2016.
    """
    size = vectors.shape[-1]
    eye = jnp.eye(size, dtype=vectors.dtype)

    def reflect(matrix: Array, v: Array) -> tuple[Array, None]:
        square = (v * v).sum(-1)[..., None, None]
        outer = v[..., :, None] * v[..., None, :]
        # A reflection at 0 would be no number.
        scale = jnp.where(square > 0, 2 / jnp.where(square > 0, square, 1), 0)
        return matrix - scale * (outer @ matrix), None

    start = jnp.broadcast_to(eye, (*vectors.shape[:-2], size, size))
    return jax.lax.scan(reflect, start, jnp.moveaxis(vectors, -2, 0))[0]


def _paired(raw: Array) -> Array:
    """2 D vectors around pairs of unit vectors, whose reflections undo each other for raw = 0."""
    size = raw.shape[-1]
    return raw + jnp.repeat(jnp.eye(size, dtype=raw.dtype), 2, axis=0)


class Orthogonal(distrax.Bijector):
    """y = Q x for an orthogonal Q, with log-determinant 0.

    Args:
        matrix: Q, of shape [..., D, D].

    Example:
        >>> import jax.numpy as jnp
        >>> from flowvi.bijectors import Orthogonal
        >>> Orthogonal(jnp.array([[0.0, -1.0], [1.0, 0.0]])).forward(jnp.array([1.0, 2.0]))
        Array([-2.,  1.], dtype=float32)
    """

    def __init__(self, matrix: Array):
        self._matrix = jnp.asarray(matrix)
        super().__init__(event_ndims_in=1, is_constant_jacobian=True)

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        self._check_forward_input_shape(x)
        return _turned(self._matrix, x)

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        self._check_inverse_input_shape(y)
        return _turned(jnp.swapaxes(self._matrix, -1, -2), y)

    def same_as(self, other: distrax.Bijector) -> bool:
        return isinstance(other, Orthogonal) and self._matrix is other._matrix


def _turned(matrix: Array, x: Array) -> tuple[Array, Array]:
    y = jnp.einsum("...ij,...j->...i", matrix, x)
    return y, jnp.zeros(y.shape[:-1], y.dtype)


def _scaling(raw: Array) -> distrax.Bijector:
    log_scale = bounded(raw, MAX_LOG_DIAGONAL)
    return distrax.Block(distrax.ScalarAffine(jnp.zeros_like(raw), log_scale=log_scale), 1)


def _householder(params: PyTree) -> list[distrax.Bijector]:
    return [Orthogonal(reflections(_paired(params["vectors"])))]


def _qr(params: PyTree) -> list[distrax.Bijector]:
    raw = params["matrix"]
    upper = jnp.eye(raw.shape[-1], dtype=raw.dtype) + jnp.triu(raw, 1) * raw.shape[-1] ** -0.5
    triangular = distrax.TriangularLinear(upper, is_lower=False)
    return [*_householder(params), triangular, _scaling(jnp.diagonal(raw))]


def _svd(params: PyTree) -> list[distrax.Bijector]:
    right = Orthogonal(reflections(_paired(params["right"])))
    return [*_householder(params), _scaling(params["scale"]), right]


Build = Callable[[PyTree], list[distrax.Bijector]]

#: Learned linear maps by name: the axes of their parameters beside the bias, 1 for D and 2 for 2 D;
#: and bijectors, the last one applied first. They start as the identity.
LINEAR: dict[str, tuple[dict[str, tuple[int, ...]], Build]] = {
    "lu": ({"matrix": (1, 1)}, lambda params: [LULinear(params["matrix"])]),
    "actnorm": ({"scale": (1,)}, lambda params: [_scaling(params["scale"])]),
    "householder": ({"vectors": (2, 1)}, _householder),
    "qr": ({"vectors": (2, 1), "matrix": (1, 1)}, _qr),
    "svd": ({"vectors": (2, 1), "scale": (1,), "right": (2, 1)}, _svd),
}


def init_linear(name: str, size: int) -> dict[str, Array]:
    """Zeros, at which the map of a name out of `LINEAR` is the identity."""
    shapes = {**LINEAR[name][0], "bias": (1,)}
    return {n: jnp.zeros(tuple(size * axis for axis in axes)) for n, axes in shapes.items()}


def linear(name: str, params: PyTree) -> distrax.Bijector:
    """The learned linear map y = A x + b of a name out of `LINEAR`.

        lu            L U, see `LULinear`
        actnorm       diagonal
        householder   Q, the product of 2 D reflections: orthogonal
        qr            Q R, with R upper triangular
        svd           Q diag(s) P, with Q and P orthogonal

    Log-scales are bounded by 5 nats, so that every finite parameter has an inverse.

    Source: Kingma, Dhariwal, "Glow", 2018, for actnorm, whose start from the first batch is the
    identity here: layers start as it, and placement has standardised the data; Hoogeboom, van den
    Berg, Welling, "Emerging Convolutions for Generative Normalizing Flows", 2019, for QR; Zhang,
    Lei, Dhillon, "Stabilizing Gradients for Deep Neural Networks via Efficient SVD
    Parameterization", 2018.
    """
    shift = distrax.Block(distrax.Shift(params["bias"]), 1)
    return distrax.Chain([shift, *LINEAR[name][1](params)])
