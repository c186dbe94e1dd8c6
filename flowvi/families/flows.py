"""The flow families, IAF, MAF and coupling, and their layers as static descriptions.

A layer is a hashable callable ((parameters, number of the layer), context) -> bijector, so that a
`Stack` of L of them keeps its parameters in arrays with a leading axis of L and compiles once.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol, TypedDict, Unpack

import distrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flowvi import checks, masks
from flowvi.bijectors import IAF, MAF, Coupling, Permutation, Stack
from flowvi.bijectors.orthogonal import LINEAR, init_linear, linear
from flowvi.families.contexts import conditional
from flowvi.families.family import Array, Family, Params, as_family
from flowvi.families.flow import Flow, Transform, standard_normal
from flowvi.masked import MaskedNetwork
from flowvi.networks import MLP
from flowvi.params import PyTree
from flowvi.transformers import Transformer, as_transformer

Activation = str | Callable[[Array], Array]
Order = tuple[int, ...]
Numbered = tuple[Params, Array]


class Layer(Protocol):
    """One layer of a flow: hashable, the identity at fresh parameters, undone by `permutation`.

    One whose training form is random has the attribute `is_random`, and finds a key there among
    its parameters.
    """

    @property
    def event_size(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def permutation(self) -> Order | None: ...
    def init(self, key: Array) -> Params: ...
    def __call__(self, numbered: Numbered, context: Array | None) -> distrax.Bijector: ...


@dataclasses.dataclass(frozen=True)
class AutoregressiveLayer:
    """An autoregressive map, MAF's if density comes first; maybe linear map and permutation."""

    network: MaskedNetwork
    transformer: Transformer
    density_first: bool
    permutation: Order | None
    linear: str | None

    @property
    def event_size(self) -> int:
        return self.network.event_size

    @property
    def name(self) -> str:
        return "maf" if self.density_first else "iaf"

    def init(self, key: Array) -> Params:
        params = {"network": self.network.init(key)}
        if self.linear is not None:
            params["linear"] = init_linear(self.linear, self.event_size)
        return params

    def __call__(self, numbered: Numbered, context: Array | None) -> distrax.Bijector:
        params, _ = numbered
        autoregressive = MAF if self.density_first else IAF
        bound = self.network.bind(params["network"], context)
        bijectors: list[distrax.Bijector] = [autoregressive(bound, self.transformer)]
        if self.linear is not None:
            bijectors.insert(0, linear(self.linear, params["linear"]))
        if self.permutation is not None:
            bijectors.insert(0, Permutation(self.permutation))
        return bijectors[0] if len(bijectors) == 1 else distrax.Chain(bijectors)


@dataclasses.dataclass(frozen=True)
class CouplingLayer:
    """Every other coordinate moves, even ones in even layers, by a map that depends on the rest."""

    event_size: int
    network: MLP
    transformer: Transformer
    name = "coupling"
    permutation = None

    def features(self, stays: Array) -> Array:
        """What the network sees of the coordinates that stay."""
        return stays

    def init(self, key: Array) -> Params:
        return self.network.init(key)

    def __call__(self, numbered: Numbered, context: Array | None) -> distrax.Bijector:
        params, number = numbered
        conditioner = lambda stays: self.network.apply(params, self.features(stays), context)  # noqa: E731
        odd = number % 2 == 1
        return Coupling(conditioner, self.transformer, event_size=self.event_size, odd=odd)


@dataclasses.dataclass(frozen=True)
class Layers:
    """L layers of one description, stacked; at fresh parameters the whole is the identity."""

    layer: Layer
    num_layers: int

    @property
    def event_size(self) -> int:
        return self.layer.event_size

    @property
    def name(self) -> str:
        return self.layer.name

    def init(self, key: Array) -> Params:
        return jax.vmap(self.layer.init)(jax.random.split(key, self.num_layers))

    def randomized(self, params: Params, key: Array) -> Params:
        """Parameters of the training form, where that is random."""
        if not getattr(self.layer, "is_random", False):
            return params
        return {**params, "key": jax.random.split(key, self.num_layers)}

    def bijector(self, params: Params, context: Array | None) -> distrax.Bijector:
        numbered = (params, jnp.arange(self.num_layers))
        stack = Stack(self.layer, numbered, num_layers=self.num_layers, shared=context)
        identity = total = np.arange(self.event_size)
        if self.layer.permutation is not None:
            for _ in range(self.num_layers):
                total = total[np.asarray(self.layer.permutation)]
        # The permutations of all layers are undone after the last one.
        undone = [] if (total == identity).all() else [Permutation(np.argsort(total))]
        return distrax.Chain([*undone, stack]) if undone else stack


def mixing_of(mixing: str | ArrayLike, event_size: int) -> tuple[Order | None, str | None]:
    """The permutation, and the name of a linear map, of "reverse", such a name or a permutation."""
    identity = tuple(range(event_size))
    if not isinstance(mixing, str):
        permutation = checks.permutation("mixing", mixing, event_size)
        return None if permutation == identity else permutation, None
    known = ", ".join(f'"{name}"' for name in ("reverse", *LINEAR))
    rule = f"`mixing` must be {known} or a permutation"
    checks.require(mixing in ("reverse", *LINEAR), rule, mixing)
    if event_size == 1:
        return None, None
    return identity[::-1], None if mixing == "reverse" else mixing


def _known(
    adjacency: ArrayLike, size: int, num_layers: int | None, mixing: str | ArrayLike | None
) -> tuple[masks.Adjacency, int, ArrayLike]:
    """The matrix, the number of layers and the mixing of a flow of known dependence."""
    fix = "Perhaps leave `mixing` out: it would let all coordinates depend on all."
    checks.require(mixing is None, "`mixing` must be None with `adjacency`", mixing, fix)
    matrix = masks.as_adjacency(adjacency, size)
    count = 1 if num_layers is None else num_layers
    rule = "`num_layers` must be 1 for an `adjacency` that is not transitive"
    fix = "Of more layers, coordinates depend on those that others depend on."
    checks.require(count == 1 or masks.is_transitive(matrix), rule, count, fix)
    return matrix, count, np.arange(size)


def _flow(
    event_size: int,
    density_first: bool | None,
    *,
    num_layers: int | None = None,
    hidden_sizes: Sequence[int] | None = None,
    transformer: str | Transformer = "spline",
    context_size: int | None = None,
    base: Family | None = None,
    activation: Activation = "silu",
    mixing: str | ArrayLike | None = None,
    adjacency: ArrayLike | None = None,
) -> Flow:
    """A flow of autoregressive layers, or of coupling layers where `density_first` is None."""
    size, scalar = checks.positive_int("event_size", event_size), as_transformer(transformer)
    if hidden_sizes is None:
        # Wider where there are more coordinates than two layers of 64 could tell apart.
        hidden_sizes = (max(64, min(2 * size, 512)),) * 2
    widths = checks.sizes("hidden_sizes", hidden_sizes)
    context_size = checks.optional_int("context_size", context_size)
    options: PyTree = {"context_size": context_size, "activation": activation}
    known = None
    if adjacency is not None:
        known, num_layers, mixing = _known(adjacency, size, num_layers, mixing)
    num_layers = 5 if num_layers is None else num_layers
    layer: Layer
    if density_first is None:
        half = (size + 1) // 2
        dense = MLP(half, widths, (half, scalar.num_params), **options, zero_output=True)
        layer = CouplingLayer(size, dense, scalar)
    else:
        masked = MaskedNetwork(size, widths, scalar.num_params, **options, adjacency=known)
        mixed = mixing_of("reverse" if mixing is None else mixing, size)
        layer = AutoregressiveLayer(masked, scalar, density_first, *mixed)
    return flow_of(layer, num_layers, context_size, base)


def flow_of(layer: Layer, num_layers: int, context_size: int | None, base: Family | None) -> Flow:
    """The flow of some layers, from a base that may need another context than theirs."""
    layers = Layers(layer, checks.positive_int("num_layers", num_layers))
    return flow_from(base, layers, context_size)


def flow_from(base: Family | None, transform: Transform, context_size: int | None) -> Flow:
    """The flow of a map, from a base that may need another context than the map's."""
    base = standard_normal(transform.event_size) if base is None else as_family(base, "base")
    if context_size is not None and base.context_shape not in (None, (context_size,)):
        base = conditional(base, MLP(context_size, (), base.context_shape))
    return Flow(base, transform, context_size)


class CouplingOptions(TypedDict, total=False):
    """Options of `coupling`, `iaf` and `maf`.

    Attributes:
        num_layers: the number of layers: 5 by default, 10 of a coupling flow, 1 with `adjacency`.
        hidden_sizes: widths of the hidden layers of each conditioner; two of max(64, 2 D), at most
            512, by default.
        transformer: "spline", "affine", another name out of `flowvi.transformers.TRANSFORMERS`
            such as "umnn", or a transformer.
        context_size: the length of the context vector, or None.
        base: the family of the noise, a standard normal by default. It may take the context too,
            or another one that a linear layer makes of it: `fv.gaussian(D)` is a normal whose
            parameters depend on the context.
        activation: a name such as "silu", or a function.
    """

    num_layers: int
    hidden_sizes: Sequence[int] | None
    transformer: str | Transformer
    context_size: int | None
    base: Family | None
    activation: Activation


class FlowOptions(CouplingOptions, total=False):
    """Those of `CouplingOptions`, `mixing` and `adjacency`, for `iaf` and `maf`.

    Mixing stands between layers: "reverse", the default, turns the order of the coordinates round;
    "lu", "actnorm", "householder", "qr" and "svd" do so after a learned linear map, see
    `flowvi.bijectors.orthogonal.linear`; or it is a permutation.

    An adjacency is a matrix [D, D] of zeros and ones, acyclic: x_i depends on x_j directly only
    where its entry [i, j] is 1. So p(x) is the product of p(x_i | x_j of those) for `maf`; of `iaf`
    the map from noise to x has this pattern. There is one layer then, or more where the matrix is
    transitive, and no mixing (Wehenkel, Louppe, "Graphical Normalizing Flows", 2021).
    """

    mixing: str | ArrayLike | None
    adjacency: ArrayLike | None


def iaf(event_size: int, **options: Unpack[FlowOptions]) -> Flow:
    """Inverse autoregressive flow: samples, and their densities, in one pass of each layer.

    The choice for variational posteriors. A new flow is the identity: it equals its base.

    Args:
        event_size: D, at least 1.
        **options: those of `FlowOptions`.

    Raises:
        ValueError: if a size is not positive, a name is unknown, or the base is over other
            events.

    Source: Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling, "Improving Variational Inference
    with Inverse Autoregressive Flow", 2016.

    Example:
        >>> import jax
        >>> import flowvi as fv
        >>> family = fv.iaf(2, num_layers=2, hidden_sizes=[8])
        >>> family.sample(family.init(jax.random.key(0)), jax.random.key(1), 100).shape
        (100, 2)
    """
    return _flow(event_size, False, **options)


def maf(event_size: int, **options: Unpack[FlowOptions]) -> Flow:
    """Masked autoregressive flow: densities in one pass of each layer.

    The choice for density estimation. A new flow is the identity: it equals its base. With a
    context it is a conditional density p(x | context).

    Args:
        event_size: D, at least 1.
        **options: those of `FlowOptions`.

    Raises:
        ValueError: as in `iaf`.

    Source: Papamakarios, Pavlakou, Murray, "Masked Autoregressive Flow for Density Estimation",
    2017; with the spline, Durkan, Bekasov, Murray, Papamakarios, "Neural Spline Flows", 2019.

    Example:
        >>> import jax
        >>> import flowvi as fv
        >>> family = fv.maf(2, num_layers=2, hidden_sizes=[8], context_size=3)
        >>> params, context = family.init(jax.random.key(0)), jax.numpy.zeros((100, 3))
        >>> family.log_prob(params, jax.numpy.zeros((100, 2)), context).shape
        (100,)
    """
    return _flow(event_size, True, **options)


def coupling(event_size: int, **options: Unpack[CouplingOptions]) -> Flow:
    """Coupling flow: samples and densities both in one pass of each layer, which moves half of x.

    Even coordinates move in every other layer, odd ones in the rest.

    Args:
        event_size: D, at least 1.
        **options: those of `CouplingOptions`.

    Raises:
        ValueError: if a size is not positive, or a name is unknown.

    Source: Dinh, Sohl-Dickstein, Bengio, "Density Estimation using Real NVP", 2017; with the
    spline, Durkan, Bekasov, Murray, Papamakarios, "Neural Spline Flows", 2019.

    Example:
        >>> import jax, jax.numpy as jnp, flowvi as fv
        >>> family = fv.coupling(3, num_layers=2)
        >>> params = family.init(jax.random.key(0))
        >>> family.log_prob(params, jnp.zeros((5, 3))).shape
        (5,)
    """
    options.setdefault("num_layers", 10)
    return _flow(event_size, None, **options)
