"""A family whose context goes through a network first."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import distrax
import jax
import jax.numpy as jnp

from flowvi.families.family import Array, Family, Params, Wrapper
from flowvi.families.parametric import Parametric
from flowvi.networks import Network, as_network
from flowvi.params import Fixed, Origin


@dataclasses.dataclass(frozen=True)
class Conditional(Wrapper):
    """A family at context network(context); see `conditional`."""

    family: Family
    network: Network

    @property
    def context_shape(self) -> tuple[int, ...]:
        """The network's input shape."""
        return self.network.input_shape

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

    def features(self, params: Params, context: Array | None) -> Any:
        """What the network makes of the context: the context of the inner family."""
        return self.network.apply(params["network"], self._input(params, context))

    def distribution(self, params: Params, context: Array | None = None) -> distrax.Distribution:
        """See `Family.distribution`."""
        return self.family.distribution(params["family"], self.features(params, context))

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
        network: a network of Haiku, Flax, Equinox or of this library, or a pair of functions; see
            `flowvi.networks.as_network` for what to pass. It returns the context of the family: an
            array, or a dict where the family has named arguments. Its parameters are part of the
            family's.
        context_shape: the shape of one input of the network, or its size; needed where the network
            does not know it. The input may have any leading axes.

    Raises:
        TypeError: if one of them is not of this kind.
        ValueError: if the family takes no context, the network does not take inputs of this
            shape, or its output is not the context of the family.

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
    inputs = jax.ShapeDtypeStruct((*_BATCH, *network.input_shape), jnp.zeros(()).dtype)
    try:
        params = jax.eval_shape(network.init, jax.random.key(0))
        output = jax.eval_shape(network.apply, params, inputs)
    except Exception as error:
        raise ValueError(
            f"`network` must map inputs of shape {network.input_shape} in evaluation; {network!r} "
            f"raised {type(error).__name__}: {error}. Perhaps it draws random numbers, and wants a "
            "flag such as `is_training` to know when not to?"
        ) from error
    _check_output(family, network, output)
    trained, new = jax.eval_shape(network.train_apply, params, jax.random.key(0), inputs)
    _check_training(network, (output, params), (trained, new))
    return Conditional(family, network)


#: Leading axes of the input with which a network is tried.
_BATCH = (2, 3)


def _check_training(network: Network, evaluation: Any, training: Any) -> None:
    """Checks that training gives outputs and parameters of the shapes that evaluation has."""
    kinds = [
        {
            jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(each)
        }
        for each in (evaluation, training)
    ]
    for name in sorted(kinds[0].keys() | kinds[1].keys()):
        there, here = (kind.get(name, "nothing") for kind in kinds)
        if there != here:
            raise ValueError(
                "`network` must return outputs and parameters of the same shapes in training as in "
                f"evaluation; got {here} for {there} from {network!r}."
            )


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
