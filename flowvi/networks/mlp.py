"""A dense network as pure functions, described by a hashable spec."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flowvi import checks
from flowvi.masked import activation_function

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class MLP:
    """A dense network: x of shape [..., input_size] to an array of shape [..., output_size].

        h_1 = a(x W_1 + c U + b_1),  h_l = a(h_{l-1} W_l + b_l),  output = h_L W + b

    Weights are stored with unit variance and divided by the square root of a layer's fan-in when
    they are used, as in `flowvi.masked`. The last layer starts at zero.

    Attributes:
        input_size: the length of x.
        hidden_sizes: widths of the hidden layers; any number of them, also none.
        output_size: the length of the output.
        context_size: the length of a second input c whose leading axes broadcast against x, or
            None.
        activation: a name such as "silu", or a function.

    Raises:
        ValueError, TypeError: if a size or the activation is none.

    Example:
        >>> import jax
        >>> network = MLP(3, (16,), 4)
        >>> params = network.init(jax.random.key(0))
        >>> network.apply(params, jax.numpy.ones((5, 3))).shape
        (5, 4)
    """

    input_size: int
    hidden_sizes: tuple[int, ...]
    output_size: int
    context_size: int | None = None
    activation: str | Callable[[Array], Array] = "silu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden_sizes", checks.sizes("hidden_sizes", self.hidden_sizes))
        for name in ("input_size", "output_size", "context_size"):
            value = getattr(self, name)
            if value is not None or name != "context_size":
                object.__setattr__(self, name, checks.positive_int(name, value))
        activation_function(self.activation)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return (self.input_size,)

    def init(self, key: Array) -> dict[str, Any]:
        """Fresh parameters: {"layers": ({"w", "b"}, ...)}, and "context" where there is one."""
        sizes = (self.input_size, *self.hidden_sizes, self.output_size)
        keys = jax.random.split(key, len(sizes))
        layers = [
            {"w": jax.random.normal(k, (size_in, size_out)), "b": jnp.zeros(size_out)}
            for k, size_in, size_out in zip(keys[1:], sizes[:-1], sizes[1:], strict=True)
        ]
        layers[-1]["w"] = jnp.zeros_like(layers[-1]["w"])
        params: dict[str, Any] = {"layers": tuple(layers)}
        if self.context_size is not None:
            w = jax.random.normal(keys[0], (self.context_size, sizes[1]))
            params["context"] = w if self.hidden_sizes else jnp.zeros_like(w)
        return params

    def apply(self, params: dict[str, Any], x: Array, context: Array | None = None) -> Array:
        """The output, of shape [..., output_size].

        Raises:
            ValueError: if the last axis of x is not the input size.
        """
        checks.trailing_shape("x", x, self.input_shape, "this network")
        activation = activation_function(self.activation)
        h = x
        for index, layer in enumerate(params["layers"]):
            h = h if index == 0 else activation(h)
            h = h @ (layer["w"] * layer["w"].shape[0] ** -0.5) + layer["b"]
            if index == 0 and self.context_size is not None:
                h = h + context @ (params["context"] * self.context_size**-0.5)
        return h
