"""Networks from anywhere, made to look the same to a family."""

import dataclasses
import inspect
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

from flowvi import checks
from flowvi.networks.network import Network

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class HaikuNetwork(Network):
    """A transformed Haiku function of one input, without state.

    Attributes:
        transformed: what `hk.transform` returned.
        input_shape: the shape of one input.
    """

    transformed: hk.Transformed
    input_shape: tuple[int, ...]

    def init(self, key: Array) -> Any:
        """Fresh parameters."""
        return self.transformed.init(key, jnp.zeros(self.input_shape))

    def apply(self, params: Any, x: Array) -> Array:
        """The output for x of shape [..., *input_shape]."""
        # `hk.without_apply_rng` leaves the type as it is and takes the argument away.
        takes_rng = "rng" in inspect.signature(self.transformed.apply).parameters
        return self.transformed.apply(params, *([None] if takes_rng else []), x)


@dataclasses.dataclass(frozen=True)
class PlainNetwork(Network):
    """An object with `init(key, x) -> params` and `apply(params, x)`, such as a Flax module.

    Attributes:
        module: the object; it must be hashable.
        input_shape: the shape of one input.
    """

    module: Any
    input_shape: tuple[int, ...]

    def init(self, key: Array) -> Any:
        """Fresh parameters."""
        return self.module.init(key, jnp.zeros(self.input_shape))

    def apply(self, params: Any, x: Array) -> Array:
        """The output for x of shape [..., *input_shape]."""
        return self.module.apply(params, x)


def as_network(network: Any, input_shape: Any = None) -> Network:
    """A network in the form that families use.

    Args:
        network: one with `input_shape`, `init(key)` and `apply(params, x)`, such as
            `flowvi.networks.MLP`; the result of `hk.transform`; or an object with `init(key, x)`
            and `apply(params, x)`.
        input_shape: the shape of one input; needed where the network does not know it.

    Raises:
        TypeError: if it is none of these.
        ValueError: if the input shape is missing or contradicts the network's own.
    """
    if not hasattr(network, "init") or not hasattr(network, "apply"):
        raise TypeError(
            f"`network` must have `init` and `apply`; got {network!r}. Perhaps wrap a Haiku "
            "function in `hk.transform`?"
        )
    own = getattr(network, "input_shape", None)
    if own is not None:
        if input_shape is not None and checks.sizes("context_shape", input_shape) != own:
            raise ValueError(
                f"`context_shape` must be {own}, the input shape of {network!r}; "
                f"got {input_shape!r}."
            )
        return network
    if input_shape is None:
        raise ValueError(
            "`context_shape` must be given for a network that does not know its input shape; "
            f"got None for {network!r}."
        )
    shape = checks.sizes("context_shape", input_shape)
    if isinstance(network, hk.Transformed):
        return HaikuNetwork(network, shape)
    return PlainNetwork(network, shape)
