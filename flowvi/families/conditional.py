"""A family whose context goes through a network first."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import distrax
import jax
import jax.numpy as jnp

from flowvi.families.family import Array, Family, Params
from flowvi.families.parametric import Parametric
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
        features = self.network.apply(params["network"], self._input(params, context))
        return self.family.distribution(params["family"], features)

    def train_distribution(
        self, params: Params, key: Array, context: Array | None = None
    ) -> tuple[distrax.Distribution, Params]:
        """See `Family.train_distribution`; the network is in its training form too."""
        network_key, family_key = jax.random.split(key)
        x = self._input(params, context)
        features, network = self.network.train_apply(params["network"], network_key, x)
        inner, family = self.family.train_distribution(params["family"], family_key, features)
        if network is params["network"] and family is params["family"]:
            return inner, params
        return inner, {**params, "family": family, "network": network}

    def check_support(self, x: Any, name: str = "x") -> None:
        """See `Family.check_support`."""
        self.family.check_support(x, name)

    def _input(self, params: Params, context: Array | None) -> Array:
        """The context as the network takes it."""
        self.check_context(context)
        context = jnp.asarray(context)
        if "context_units" not in params:
            return context
        units = params["context_units"].value
        return (context - units["shift"]) / units["scale"]


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
    params = jax.eval_shape(network.init, jax.random.key(0))
    inputs = jax.ShapeDtypeStruct((*_BATCH, *network.input_shape), jnp.zeros(()).dtype)
    output = jax.eval_shape(network.apply, params, inputs)
    _check_output(family, network, output)
    trained, new = jax.eval_shape(network.train_apply, params, jax.random.key(0), inputs)
    if _describe((trained, new)) != _describe((output, params)):
        raise ValueError(
            "`network` must return outputs and parameters of the same shapes in training as in "
            f"evaluation; got {_describe(trained)} and {_describe(output)} from {network!r}."
        )
    return Conditional(family, network)


#: Leading axes of the input with which a network is tried.
_BATCH = (2, 3)


def _describe(tree: Any) -> Any:
    return jax.tree.map(lambda a: (jnp.shape(a), str(jnp.result_type(a))), tree)


def _check_output(family: Family, network: Network, output: Any) -> None:
    """Checks that the output of a network can be the context of a family."""
    arguments = family.arguments if isinstance(family, Parametric) else None
    wanted = f"an array of shape {family.context_shape}, the context shape of {family!r}"
    if arguments is not None:
        named = ", ".join(f'"{name}": {shape}' for name, shape in arguments.items())
        wanted = f"{wanted}, or a dict of arrays of shapes {{{named}}}"
    expected: Any
    if isinstance(output, Mapping):
        expected = None
        if arguments is not None:
            expected = {name: _BATCH + shape for name, shape in arguments.items()}
    else:
        expected = _BATCH + family.context_shape
    got: Any = jax.tree.map(lambda a: tuple(a.shape), output)
    if got != expected:
        shown = jax.tree.map(lambda a: a.shape[len(_BATCH) :], output)
        raise ValueError(f"`network` must return {wanted}; got {shown} from {network!r}.")
