"""Networks of series: convolutions along time."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp

from flowvi import checks
from flowvi.masked import activation_function, add
from flowvi.networks.network import MLP, Activation, Array, Network, Shape, leading_shape
from flowvi.params import PyTree


@dataclasses.dataclass(frozen=True, repr=False)
class SeriesEncoder(Network):
    """A series of shape [..., length, columns], or [..., length], to a vector [..., output_size].

    Convolutions of stride 2 along time, each of n to ceil(n / 2) steps, then the mean and the last
    steps through a dense network: what is stationary is in the one, what is not in the others.

    Attributes:
        input_shape: (length, columns), or (length,) for one column without an axis.
        output_size: the length of the output.
        channels: of each convolution.
        kernel_size: steps that a convolution sees.
        hidden_sizes: widths of the dense layers.
        activation: a name such as "silu", or a function.

    Raises:
        ValueError: if a size is not positive, or the shape of an input is none of these.

    Source: van den Oord et al., "WaveNet: A Generative Model for Raw Audio", 2016, for dilated
    convolutions.

    Example:
        >>> import jax
        >>> network = SeriesEncoder((100, 2), 8)
        >>> params = network.init(jax.random.key(0))
        >>> network.apply(params, jax.numpy.ones((3, 100, 2))).shape
        (3, 8)
    """

    input_shape: Shape
    output_size: int
    channels: Shape = (32, 64, 64)
    kernel_size: int = 5
    hidden_sizes: Shape = (64,)
    activation: Activation = "silu"

    def __post_init__(self) -> None:
        for name in ("input_shape", "channels", "hidden_sizes"):
            object.__setattr__(self, name, checks.sizes(name, getattr(self, name)))
        rule = "`input_shape` must be (length, columns) or (length,)"
        checks.require(len(self.input_shape) in (1, 2), rule, self.input_shape)
        for name in ("output_size", "kernel_size"):
            checks.positive_int(name, getattr(self, name))
        activation_function(self.activation)

    def __repr__(self) -> str:
        return f"SeriesEncoder({self.input_shape} -> {self.output_size})"

    @property
    def _sizes(self) -> Shape:
        """Columns before the first and after each convolution."""
        return ((*self.input_shape, 1)[1], *self.channels)

    @property
    def _dense(self) -> MLP:
        length = self.input_shape[0]
        for _ in self.channels:
            length = -(-length // 2)
        size = self._sizes[-1] * (length + 1)
        return MLP(size, self.hidden_sizes, self.output_size, None, self.activation)

    def init(self, key: Array) -> PyTree:
        keys = jax.random.split(key, len(self.channels) + 1)
        pairs = itertools.pairwise(self._sizes)
        convolutions = tuple(
            {"w": jax.random.normal(k, (self.kernel_size, *pair)), "b": jnp.zeros(pair[1])}
            for k, pair in zip(keys, pairs, strict=False)
        )
        return {"convolutions": convolutions, "dense": self._dense.init(keys[-1])}

    def apply(self, params: PyTree, x: Array) -> Array:
        batch, activation = leading_shape(x, self), activation_function(self.activation)
        h = x.reshape(math.prod(batch), self.input_shape[0], self._sizes[0])
        for layer in params["convolutions"]:
            weights = layer["w"] * math.prod(layer["w"].shape[:-1]) ** -0.5
            layout = ("NWC", "WIO", "NWC")
            h = jax.lax.conv_general_dilated(h, weights, (2,), "SAME", dimension_numbers=layout)
            h = activation(add(h, layer["b"]))
        h = jnp.concatenate([h.mean(1), h.reshape(len(h), -1)], 1)
        return self._dense.apply(params["dense"], h).reshape(*batch, self.output_size)
