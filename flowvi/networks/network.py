"""What a family asks of a network, and the dense one."""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax.numpy as jnp

from flowvi import checks
from flowvi.masked import activation_function, add, context_term, init_layers, product
from flowvi.params import Array, PyTree, Shape

#: An output, or parameters, and what comes with it.
Pair = tuple[PyTree, PyTree]
Activation = str | Callable[[Array], Array]


class Network(abc.ABC):
    """A function of arrays with parameters: hashable and pure.

    Subclasses are frozen dataclasses, equal when they are configured equally, or else equal only to
    themselves; a network is part of a family, and families are static arguments of `jax.jit`. Its
    `input_shape` is the shape of one input.
    """

    if TYPE_CHECKING:
        # A field of some subclasses, of which a property here would be the default.
        @property
        def input_shape(self) -> Shape: ...

    @abc.abstractmethod
    def init(self, key: Array) -> PyTree:
        """Fresh parameters; what is no parameter, such as batch statistics, is `Fixed`."""

    @abc.abstractmethod
    def apply(self, params: PyTree, x: Array) -> PyTree:
        """The output in evaluation: without dropout, and with batch statistics at rest.

        For x of shape [*batch, *input_shape] an array of shape [*batch, ...], or a dict of them.
        """

    def train_apply(self, params: PyTree, key: Array, x: Array) -> Pair:
        """The output in training, and parameters with new `Fixed` leaves.

        The default is the evaluation form and unchanged parameters.
        """
        return self.apply(params, x), params


def leading_shape(x: Array, network: Network) -> Shape:
    """The leading axes of an input, whose last ones must be the input shape."""
    checks.trailing_shape("x", x, network.input_shape, f"{network!r}")
    return x.shape[: x.ndim - len(network.input_shape)]


def as_shape(size: int | Shape) -> Shape:
    """The shape behind a size."""
    return (size,) if isinstance(size, int) else size


@dataclasses.dataclass(frozen=True, repr=False)
class MLP(Network):
    """A dense network: x of shape [..., *input_shape] to an array of shape [..., *output_shape].

        h_1 = a(x W_1 + c U + b_1),  h_l = a(h_{l-1} W_l + b_l),  output = h_L W + b

    Weights are stored with unit variance and divided by the square root of a layer's fan-in when
    they are used, so that one learning rate suits it and the flows here: about sqrt(width) times
    as large as for networks that store them divided.

    Attributes:
        input_size: the length of x, or the shape of one x, which is then flattened.
        hidden_sizes: widths of the hidden layers; any number of them, also none.
        output_size: the length of the output, or its shape.
        context_size: the length of a second input c, whose leading axes broadcast; or None.
        activation: a name such as "silu", or a function.
        zero_output: whether the output starts at zero, for maps that start as the identity.

    Raises:
        ValueError: if a size is not positive.

    Source: Rumelhart, Hinton, Williams, "Learning Representations by Back-Propagating Errors",
    1986.

    Example:
        >>> import jax
        >>> network = MLP((28, 28), (16,), 4)
        >>> params = network.init(jax.random.key(0))
        >>> network.apply(params, jax.numpy.ones((3, 5, 28, 28))).shape
        (3, 5, 4)
    """

    input_size: int | Shape
    hidden_sizes: Shape
    output_size: int | Shape
    context_size: int | None = None
    activation: Activation = "silu"
    zero_output: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden_sizes", checks.sizes("hidden_sizes", self.hidden_sizes))
        for name in ("input_size", "output_size"):
            object.__setattr__(self, name, checks.size_or_shape(name, getattr(self, name)))
        checks.optional_int("context_size", self.context_size)
        activation_function(self.activation)

    def __repr__(self) -> str:
        sizes = [s[0] if len(s) == 1 else s for s in (self.input_shape, self.output_shape)]
        return f"MLP({sizes[0]} -> {sizes[1]})"

    @property
    def input_shape(self) -> Shape:
        return as_shape(self.input_size)

    @property
    def output_shape(self) -> Shape:
        """The shape of one output."""
        return as_shape(self.output_size)

    def init(self, key: Array) -> PyTree:
        sizes = (math.prod(self.input_shape), *self.hidden_sizes, math.prod(self.output_shape))
        return init_layers(key, sizes, self.context_size, zero_output=self.zero_output)

    def apply(self, params: PyTree, x: Array, context: Array | None = None) -> Array:
        h = x.reshape(*leading_shape(x, self), math.prod(self.input_shape))
        activation = activation_function(self.activation)
        for index, layer in enumerate(params["layers"]):
            h = h if index == 0 else activation(h)
            # It is the rows that are scaled: there are fewer of them than weights, most often.
            h = add(product(h * layer["w"].shape[0] ** -0.5, layer["w"]), layer["b"])
            if index == 0 and self.context_size is not None:
                h = add(h, context_term(params, jnp.asarray(context)))
        return h.reshape(h.shape[:-1] + self.output_shape)
