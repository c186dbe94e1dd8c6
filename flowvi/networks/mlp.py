"""A dense network as pure functions, described by a hashable spec."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flowvi import checks
from flowvi.masked import activation_function, context_term, product
from flowvi.networks.network import Network

Array = jax.Array
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class MLP(Network):
    """A dense network: x of shape [..., *input_shape] to an array of shape [..., *output_shape].

        h_1 = a(x W_1 + c U + b_1),  h_l = a(h_{l-1} W_l + b_l),  output = h_L W + b

    Weights are stored with unit variance and divided by the square root of a layer's fan-in when
    they are used, as in `flowvi.masked`, so that one learning rate suits it and the flows here.
    Adam wants one about sqrt(width) times as large as for networks that store them divided.

    Attributes:
        input_size: the length of x, or the shape of one x, which is then flattened.
        hidden_sizes: widths of the hidden layers; any number of them, also none.
        output_size: the length of the output, or its shape.
        context_size: the length of a second input c whose leading axes broadcast against x, or
            None.
        activation: a name such as "silu", or a function.
        zero_output: whether the last layer starts at zero, and so does the output. For maps that
            start as the identity; elsewhere it hurts, because nothing flows back through zeros.

    Raises:
        ValueError, TypeError: if a size or the activation is none.

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
    activation: str | Callable[[Array], Array] = "silu"
    zero_output: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden_sizes", checks.sizes("hidden_sizes", self.hidden_sizes))
        for name in ("input_size", "output_size"):
            object.__setattr__(self, name, checks.size_or_shape(name, getattr(self, name)))
        if self.context_size is not None:
            size = checks.positive_int("context_size", self.context_size)
            object.__setattr__(self, "context_size", size)
        activation_function(self.activation)

    @property
    def input_shape(self) -> Shape:  # type: ignore[override]
        """The shape of one input."""
        return _as_shape(self.input_size)

    @property
    def output_shape(self) -> Shape:
        """The shape of one output."""
        return _as_shape(self.output_size)

    def init(self, key: Array) -> dict[str, Any]:
        """Fresh parameters: {"layers": ({"w", "b"}, ...)}, and "context" where there is one."""
        sizes = (math.prod(self.input_shape), *self.hidden_sizes, math.prod(self.output_shape))
        keys = jax.random.split(key, len(sizes))
        layers = [
            {"w": jax.random.normal(k, (size_in, size_out)), "b": jnp.zeros(size_out)}
            for k, size_in, size_out in zip(keys[1:], sizes[:-1], sizes[1:], strict=True)
        ]
        if self.zero_output:
            layers[-1]["w"] = jnp.zeros_like(layers[-1]["w"])
        params: dict[str, Any] = {"layers": tuple(layers)}
        if self.context_size is not None:
            w = jax.random.normal(keys[0], (self.context_size, sizes[1]))
            is_last = not self.hidden_sizes
            params["context"] = jnp.zeros_like(w) if is_last and self.zero_output else w
        return params

    def apply(self, params: dict[str, Any], x: Array, context: Array | None = None) -> Array:
        """The output, of shape [..., *output_shape].

        Raises:
            ValueError: if the last axes of x are not the input shape.
        """
        checks.trailing_shape("x", x, self.input_shape, "this network")
        activation = activation_function(self.activation)
        batch_shape = x.shape[: x.ndim - len(self.input_shape)]
        h = x.reshape(*batch_shape, math.prod(self.input_shape))
        for index, layer in enumerate(params["layers"]):
            h = h if index == 0 else activation(h)
            # It is the rows that are scaled: there are fewer of them than weights, most often.
            h = product(h * layer["w"].shape[0] ** -0.5, layer["w"]) + layer["b"]
            if index == 0 and self.context_size is not None:
                h = h + context_term(params, jnp.asarray(context))
        return h.reshape(h.shape[:-1] + self.output_shape)


def _as_shape(size: int | Shape) -> Shape:
    return (size,) if isinstance(size, int) else size
