"""A family whose context goes through a network first."""

import dataclasses
from typing import Any

import distrax
import jax

from flowvi.families.family import Array, Family, Params
from flowvi.networks import Network, as_network
from flowvi.params import Fixed, Origin


@dataclasses.dataclass(frozen=True)
class Conditional(Family):
    """A family at context network(context); see `conditional`."""

    family: Family
    network: Network

    @property
    def event_shape(self) -> tuple[int, ...]:
        """That of the inner family."""
        return self.family.event_shape

    @property
    def context_shape(self) -> tuple[int, ...]:
        """The network's input shape."""
        return self.network.input_shape

    @property
    def reparameterized(self) -> bool:
        """That of the inner family."""
        return self.family.reparameterized

    @property
    def has_units(self) -> bool:  # type: ignore[override]
        """That of the inner family."""
        return self.family.has_units

    def init(self, key: Array) -> Params:
        """{"family", "network", "origin"}."""
        family_key, network_key = jax.random.split(key)
        return {
            "family": self.family.init(family_key),
            "network": self.network.init(network_key),
            "origin": Origin(self),
        }

    def with_units(self, params: Params, units: Any, context_units: Any = None) -> Params:
        """See `Family.with_units`; the context is standardised before it enters the network."""
        params = {**params, "family": self.family.with_units(params["family"], units)}
        return (
            params if context_units is None else {**params, "context_units": Fixed(context_units)}
        )

    def distribution(self, params: Params, context: Array | None = None) -> distrax.Distribution:
        """See `Family.distribution`."""
        self.check_context(context)
        context = jax.numpy.asarray(context)
        if "context_units" in params:
            units = params["context_units"].value
            context = (context - units["shift"]) / units["scale"]
        features = self.network.apply(params["network"], context)
        return self.family.distribution(params["family"], features)


def conditional(family: Family, network: Any, *, context_shape: Any = None) -> Conditional:
    """A family whose context goes through a network first.

    Args:
        family: a family with a context; its context is the network's output.
        network: a `flowvi.networks.MLP`, the result of `hk.transform`, or any hashable object with
            `init(key, x)` and `apply(params, x)`. Its parameters are part of the family's.
        context_shape: the shape of one input of the network; needed where it does not know it.

    Raises:
        TypeError: if one of them is not of this kind.
        ValueError: if the family takes no context, or the network's output is not of its shape.

    Example:
        >>> import jax
        >>> import flowvi as fv
        >>> from flowvi.networks import MLP
        >>> family = fv.conditional(fv.maf(2, context_size=4), MLP(10, (32,), 4))
        >>> params = family.init(jax.random.key(0))
        >>> family.sample(params, jax.random.key(1), context=jax.numpy.ones((5, 10))).shape
        (5, 2)
    """
    if not isinstance(family, Family):
        raise TypeError(f"`family` must be a family; got {family!r}.")
    if family.context_shape is None:
        raise ValueError(
            f"`family` must take a context; got {family!r}. Perhaps give it a `context_size`?"
        )
    network = as_network(network, context_shape)
    inputs = jax.ShapeDtypeStruct(network.input_shape, jax.numpy.zeros(()).dtype)
    params = jax.eval_shape(network.init, jax.random.key(0))
    output = jax.eval_shape(network.apply, params, inputs)
    if getattr(output, "shape", None) != family.context_shape:
        raise ValueError(
            f"`network` must return an array of shape {family.context_shape}, the context shape of "
            f"{family!r}; got {output} from {network!r}."
        )
    return Conditional(family, network)
