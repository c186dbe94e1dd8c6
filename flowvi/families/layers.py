"""Layers of a flow as static descriptions, and their stack.

A layer is a hashable callable ((parameters, number of the layer), context) -> bijector, so that a
`Stack` of L of them keeps its parameters in arrays with a leading axis of L and compiles once.
"""

import dataclasses
from typing import Protocol

import distrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flowvi import checks
from flowvi.bijectors import IAF, MAF, Coupling, LULinear, Permutation, Stack
from flowvi.families.family import Array, Params
from flowvi.masked import MaskedNetwork
from flowvi.networks import MLP
from flowvi.transformers import Transformer

Order = tuple[int, ...]
Numbered = tuple[Params, Array]


class Layer(Protocol):
    """One layer of a flow: hashable, without arrays."""

    @property
    def event_size(self) -> int:
        """D."""

    @property
    def name(self) -> str:
        """What a flow of such layers is called."""

    def init(self, key: Array) -> Params:
        """Fresh parameters, at which the layer is the identity up to its permutation."""

    def __call__(self, numbered: Numbered, context: Array | None) -> distrax.Bijector:
        """The bijector of layer number `numbered[1]` with parameters `numbered[0]`."""


@dataclasses.dataclass(frozen=True)
class Mixing:
    """What stands between autoregressive layers, so that each coordinate gets to see all others.

    Attributes:
        permutation: a reordering of the coordinates, equal in all layers; None for none.
        linear: whether a learned LU-linear map follows.
    """

    permutation: Order | None
    linear: bool


def as_mixing(mixing: str | ArrayLike, event_size: int) -> Mixing:
    """The mixing behind "reverse", "lu", or a permutation.

    Raises:
        ValueError, TypeError: if it is none of these.
    """
    reverse = tuple(range(event_size))[::-1]
    if isinstance(mixing, str):
        if mixing not in ("reverse", "lu"):
            raise ValueError(
                '`mixing` must be "reverse", "lu" or a permutation of the coordinates; '
                f"got {mixing!r}."
            )
        permutation = reverse
    else:
        permutation = checks.permutation("mixing", mixing, event_size)
    trivial = permutation == reverse[::-1]
    return Mixing(None if trivial else permutation, mixing == "lu" and event_size > 1)


@dataclasses.dataclass(frozen=True)
class AutoregressiveLayer:
    """An autoregressive map, maybe a linear map, and a permutation: from base to data.

    Attributes:
        network: the masked network of the conditioner.
        transformer: the scalar map.
        density_first: True for MAF (density in one pass), False for IAF (samples in one pass).
        mixing: what follows the autoregressive map.
    """

    network: MaskedNetwork
    transformer: Transformer
    density_first: bool
    mixing: Mixing

    @property
    def event_size(self) -> int:
        """D."""
        return self.network.event_size

    @property
    def name(self) -> str:
        """MAF or IAF, in small letters."""
        return "maf" if self.density_first else "iaf"

    def init(self, key: Array) -> Params:
        """{"network": ...}, and "linear" where there is a linear map."""
        params = {"network": self.network.init(key)}
        if self.mixing.linear:
            size = self.event_size
            params["linear"] = {"matrix": jnp.zeros((size, size)), "bias": jnp.zeros(size)}
        return params

    def __call__(self, numbered: Numbered, context: Array | None) -> distrax.Bijector:
        params, _ = numbered
        autoregressive = MAF if self.density_first else IAF
        bijectors: list[distrax.Bijector] = [
            autoregressive(self.network.bind(params["network"], context), self.transformer)
        ]
        if self.mixing.linear:
            bijectors.insert(0, LULinear(**params["linear"]))
        if self.mixing.permutation is not None:
            bijectors.insert(0, Permutation(self.mixing.permutation))
        return bijectors[0] if len(bijectors) == 1 else distrax.Chain(bijectors)


@dataclasses.dataclass(frozen=True)
class CouplingLayer:
    """A coupling layer: every other coordinate moves, by a map that depends on the rest.

    Even coordinates move in even layers, odd ones in odd layers.

    Attributes:
        event_size: D.
        network: the dense network of the conditioner, from H = ceil(D / 2) inputs to [H, P].
        transformer: the scalar map.
    """

    event_size: int
    network: MLP
    transformer: Transformer
    name = "coupling"

    def init(self, key: Array) -> Params:
        return self.network.init(key)

    def __call__(self, numbered: Numbered, context: Array | None) -> distrax.Bijector:
        params, number = numbered
        return Coupling(
            lambda stays: self.network.apply(params, stays, context),
            self.transformer,
            event_size=self.event_size,
            odd=number % 2 == 1,
        )


@dataclasses.dataclass(frozen=True)
class Layers:
    """L layers of one description, stacked; at fresh parameters the whole is the identity.

    Attributes:
        layer: the description of one layer.
        num_layers: L.
        permutation: the permutation in every layer, undone after the last one.
    """

    layer: Layer
    num_layers: int
    permutation: Order | None = None

    def __post_init__(self) -> None:
        checks.positive_int("num_layers", self.num_layers)

    @property
    def event_size(self) -> int:
        """D."""
        return self.layer.event_size

    @property
    def name(self) -> str:
        """That of the layers."""
        return self.layer.name

    def init(self, key: Array) -> Params:
        """The layers' parameters, each array with a leading axis of L."""
        return jax.vmap(self.layer.init)(jax.random.split(key, self.num_layers))

    def bijector(self, params: Params, context: Array | None) -> distrax.Bijector:
        numbered = (params, jnp.arange(self.num_layers))
        stack = Stack(self.layer, numbered, num_layers=self.num_layers, shared=context)
        if self.permutation is None:
            return stack
        total = np.arange(self.event_size)
        for _ in range(self.num_layers):
            total = total[np.asarray(self.permutation)]
        if (total == np.arange(self.event_size)).all():
            return stack
        return distrax.Chain([Permutation(np.argsort(total)), stack])
