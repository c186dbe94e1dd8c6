"""Convolutional networks between images and vectors, of any image size."""

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from flowvi import checks
from flowvi.masked import activation_function, add
from flowvi.networks.network import MLP, Activation, Array, Network, Shape, as_shape, leading_shape
from flowvi.params import PyTree

_LAYOUT = ("NHWC", "HWIO", "NHWC")


@dataclasses.dataclass(frozen=True)
class _Images:
    """What an encoder and a decoder of images share."""

    if TYPE_CHECKING:

        @property
        def image_shape(self) -> Shape: ...

    activation: Activation = dataclasses.field(default="silu", kw_only=True)
    kernel_size: int = dataclasses.field(default=3, kw_only=True)
    hidden_sizes: Shape = dataclasses.field(default=(256,), kw_only=True)
    channels: Shape = dataclasses.field(default=(32, 64), kw_only=True)

    def __post_init__(self) -> None:
        for name in ("image_shape", "channels", "hidden_sizes"):
            object.__setattr__(self, name, checks.sizes(name, getattr(self, name)))
        rule = "`image_shape` must be (height, width) or (height, width, channels)"
        checks.require(len(self.image_shape) in (2, 3), rule, self.image_shape)
        for name in {"input_size", "output_size"} & vars(self).keys():
            object.__setattr__(self, name, checks.size_or_shape(name, getattr(self, name)))
        checks.positive_int("kernel_size", self.kernel_size)
        activation_function(self.activation)

    @property
    def _image_channels(self) -> int:
        return self.image_shape[2] if len(self.image_shape) == 3 else 1

    def _image_sizes(self) -> list[Shape]:
        """(height, width) before the first and after each convolution of stride 2."""
        sizes = [self.image_shape[:2]]
        for _ in self.channels:
            sizes.append(tuple(-(-size // 2) for size in sizes[-1]))
        return sizes

    def _init_layers(self, key: Array, channels: Shape) -> tuple[dict[str, Array], ...]:
        """Kernels between these numbers of channels."""
        window, pairs = (self.kernel_size,) * 2, list(itertools.pairwise(channels))
        keys = jax.random.split(key, max(len(pairs), 1))
        return tuple(
            {"w": jax.random.normal(k, (*window, *pair)), "b": jnp.zeros(pair[1])}
            for k, pair in zip(keys, pairs, strict=False)
        )


def _weights(layer: dict[str, Array], stride: int = 1) -> Array:
    """Weights of unit variance, divided by the root of the number of inputs of one output."""
    # A transposed convolution spreads an input over stride^2 outputs, so that fewer meet in each.
    fan_in = math.prod(layer["w"].shape[:-1]) / stride**2
    return layer["w"] * max(fan_in, 1.0) ** -0.5


def _convolve(h: Array, layer: dict[str, Array], stride: int) -> Array:
    weights, strides = _weights(layer), (stride, stride)
    h = jax.lax.conv_general_dilated(h, weights, strides, "SAME", dimension_numbers=_LAYOUT)
    return add(h, layer["b"])


@dataclasses.dataclass(frozen=True, repr=False)
class ConvEncoder(_Images, Network):
    """Images of shape [..., height, width, channels] to arrays of shape [..., *output_size].

    Convolutions of stride 2, each of n to ceil(n / 2) pixels, then a dense network.

    Attributes:
        image_shape: (height, width, channels), or (height, width) for one channel without an axis.
        output_size: the length of the output, or its shape.
        channels: of each convolution. It takes `hidden_sizes`, `kernel_size` and `activation` too.

    Raises:
        ValueError: if a size is not positive.

    Source: LeCun, Bottou, Bengio, Haffner, "Gradient-Based Learning Applied to Document
    Recognition", 1998.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> encoder = ConvEncoder((9, 7, 3), 16, channels=(4, 8), hidden_sizes=(32,))
        >>> encoder.apply(encoder.init(jax.random.key(0)), jnp.zeros((5, 2, 9, 7, 3))).shape
        (5, 2, 16)
    """

    image_shape: Shape
    output_size: int | Shape

    def __repr__(self) -> str:
        return f"ConvEncoder({self.image_shape} -> {self.output_size})"

    @property
    def input_shape(self) -> Shape:
        return self.image_shape

    @property
    def _dense(self) -> MLP:
        channels = (self._image_channels, *self.channels)[-1]
        size = math.prod(self._image_sizes()[-1]) * channels
        return MLP(size, self.hidden_sizes, self.output_size, activation=self.activation)

    def init(self, key: Array) -> PyTree:
        first, second = jax.random.split(key)
        convolutions = self._init_layers(first, (self._image_channels, *self.channels))
        return {"convolutions": convolutions, "dense": self._dense.init(second)}

    def apply(self, params: PyTree, x: Array) -> Array:
        batch_shape = leading_shape(x, self)
        activation = activation_function(self.activation)
        num_rows = math.prod(batch_shape)
        h = x.reshape(num_rows, *self.image_shape[:2], self._image_channels)
        for layer in params["convolutions"]:
            h = activation(_convolve(h, layer, 2))
        output = self._dense.apply(params["dense"], h.reshape(num_rows, math.prod(h.shape[1:])))
        return output.reshape(batch_shape + output.shape[1:])


@dataclasses.dataclass(frozen=True, repr=False)
class ConvDecoder(_Images, Network):
    """Arrays of shape [..., *input_size] to images of shape [..., height, width, channels].

    A dense network, then transposed convolutions of stride 2, each of which doubles the image and
    cuts off the last row or column where the size is odd, and one convolution at full size.

    Attributes:
        input_size: the length of the input, or its shape.
        image_shape: (height, width, channels), or (height, width) for one channel without an axis.
            For a distribution of several arguments, `channels` of the image is their total: a
            `fv.gaussian((8, 8, 3))` with predicted scale takes (8, 8, 6).
        channels: as those of the `ConvEncoder` on the way down. It takes `hidden_sizes`,
            `kernel_size` and `activation` too.

    Raises:
        ValueError: if a size is not positive.

    Source: Dumoulin, Visin, "A Guide to Convolution Arithmetic for Deep Learning", 2016.

    Example:
        >>> import jax, jax.numpy as jnp, flowvi as fv
        >>> decoder = fv.networks.ConvDecoder(4, (12, 12, 1))
        >>> decoder.apply(decoder.init(jax.random.key(0)), jnp.ones((5, 4))).shape
        (5, 12, 12, 1)
    """

    input_size: int | Shape
    image_shape: Shape

    def __repr__(self) -> str:
        return f"ConvDecoder({self.input_size} -> {self.image_shape})"

    @property
    def input_shape(self) -> Shape:
        return as_shape(self.input_size)

    @property
    def _start(self) -> Shape:
        """The shape of the smallest image."""
        return (*self._image_sizes()[-1], (1, *self.channels)[-1])

    @property
    def _dense(self) -> MLP:
        return MLP(self.input_size, self.hidden_sizes, self._start, activation=self.activation)

    def init(self, key: Array) -> PyTree:
        first, second = jax.random.split(key)
        up = (*reversed(self.channels), (*self.channels, 1)[0])
        convolutions = self._init_layers(second, (*up, self._image_channels))
        return {"dense": self._dense.init(first), "convolutions": convolutions}

    def apply(self, params: PyTree, x: Array) -> Array:
        batch_shape = leading_shape(x, self)
        activation = activation_function(self.activation)
        h = self._dense.apply(params["dense"], x).reshape(math.prod(batch_shape), *self._start)
        *up, last = params["convolutions"]
        targets = reversed(self._image_sizes()[:-1])
        for layer, (height, width) in zip(up, targets, strict=True):
            weights, h = _weights(layer, 2), activation(h)
            h = jax.lax.conv_transpose(h, weights, (2, 2), "SAME", dimension_numbers=_LAYOUT)
            h = add(h[:, :height, :width], layer["b"])
        return _convolve(activation(h), last, 1).reshape(batch_shape + self.image_shape)
