"""The masked autoregressive network as pure functions over explicit parameters.

`MaskedNetwork` is the static half: sizes, order and activation, hashable, no arrays. Its parameters
are a plain tree of arrays, and `bind` joins the two (and a context) to a conditioner: a callable
that is also a pytree, whose weights a bijector may look at.

Inside, coordinates stand in the order of their degrees: `order` is applied to the input on the way
in and undone on the way out, so all weights belong to sorted units.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from flowvi import checks, masks
from flowvi.params import Array, PyTree, Shape

Params = Mapping[str, PyTree]


def silu(x: Array) -> Array:
    """x sigmoid(x), as h + h tanh(h) of h = x / 2: without the division, a layer is 3 % faster."""
    h = 0.5 * x
    return h + h * jnp.tanh(h)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "elu": jax.nn.elu,
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": silu,
    "softplus": jax.nn.softplus,
    "tanh": jnp.tanh,
}


def activation_function(activation: str | Callable[[Array], Array]) -> Callable[[Array], Array]:
    """The function behind the name of an activation; a function stands for itself."""
    if callable(activation):
        return activation
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"`activation` must be a function or one of {known}; got {activation!r}.")
    return ACTIVATIONS[activation]


def init_layers(
    key: Array, sizes: Shape, context_size: int | None, *, zero_output: bool
) -> dict[str, PyTree]:
    """Standard normal weights and zero biases between layers: {"layers"}, maybe "context"."""
    pairs = list(itertools.pairwise(sizes))
    keys = jax.random.split(key, len(sizes) - zero_output)
    weights = [jax.random.normal(k, pair) for k, pair in zip(keys[1:], pairs, strict=False)]
    if zero_output:
        weights.append(jnp.zeros(pairs[-1]))
    layers = tuple({"w": w, "b": jnp.zeros(w.shape[1])} for w in weights)
    if context_size is None:
        return {"layers": layers}
    # Without hidden layers these weights belong to the last layer.
    is_zero, shape = zero_output and len(layers) == 1, (context_size, sizes[1])
    context = jnp.zeros(shape) if is_zero else jax.random.normal(keys[0], shape)
    return {"layers": layers, "context": context}


@dataclasses.dataclass(frozen=True)
class MaskedNetwork:
    """The static description of a masked autoregressive network.

    The network maps x of shape [..., D] to parameters theta of shape [..., D, P], where
    theta[..., order[k], :] depends on x[..., order[:k]] and on the context only:

        h_1 = a(x W_1 + c U + b_1),  h_l = a(h_{l-1} W_l + b_l),  theta = h_L W + b

    with every W masked. The last layer starts at zero, so a new network returns zeros.

    Attributes:
        event_size: D, at least 1.
        hidden_sizes: widths of the hidden layers; any number of them, also none.
        num_params: P, the number of parameters of one coordinate.
        context_size: the length of the context vector, or None.
        activation: a name out of `ACTIVATIONS`, or a function.
        order: the input order: order[0] is the coordinate that depends on none. None is the order
            0, ..., D - 1, or one that `adjacency` allows.
        adjacency: where it is known on which coordinates each may depend, a matrix [D, D] of zeros
            and ones: theta[..., i, :] depends on x[..., j] only where its entry [i, j] is 1. It is
            acyclic, and hidden layers have at least as many units as it has different rows.
    """

    event_size: int
    hidden_sizes: tuple[int, ...]
    num_params: int
    context_size: int | None = None
    activation: str | Callable[[Array], Array] = "silu"
    order: tuple[int, ...] | None = None
    adjacency: masks.Adjacency | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        set_ = functools.partial(object.__setattr__, self)
        set_("hidden_sizes", checks.sizes("hidden_sizes", self.hidden_sizes))
        for name in ("event_size", "num_params", "context_size"):
            if name != "context_size" or self.context_size is not None:
                set_(name, checks.positive_int(name, getattr(self, name)))
        if self.order is not None:
            set_("order", checks.permutation("order", self.order, self.event_size))
        activation_function(self.activation)
        if self.adjacency is not None:
            adjacency = masks.as_adjacency(self.adjacency, self.event_size)
            set_("adjacency", adjacency)
            found = masks.topological_order(adjacency)
            if self.order is None and found != tuple(range(self.event_size)):
                set_("order", found)
            order = np.asarray(self._order)
            is_before = not np.triu(np.asarray(adjacency)[np.ix_(order, order)]).any()
            rule = "`order` must have each coordinate after those it depends on by `adjacency`"
            checks.require(is_before, rule, self.order, say=checks.shown)
            _ = self._sparse

    @property
    def _order(self) -> tuple[int, ...]:
        return tuple(range(self.event_size)) if self.order is None else self.order

    @property
    def _sparse(self) -> tuple[tuple[masks.Degrees, ...], tuple[np.ndarray, ...]] | None:
        """Degrees and masks of a known dependence."""
        if self.adjacency is None:
            return None
        has_context = self.context_size is not None
        return masks.sparse_layers(
            self.adjacency, self._order, self.hidden_sizes, context=has_context
        )

    @property
    def degrees(self) -> tuple[masks.Degrees, ...]:
        """Degrees of the inputs, of every hidden layer and of the outputs."""
        if self._sparse is not None:
            return self._sparse[0]
        return masks.layer_degrees(
            self.event_size, self.hidden_sizes, context=self.context_size is not None
        )

    def init(self, key: Array) -> dict[str, PyTree]:
        """Fresh parameters: {"layers": ({"w", "b"}, ...)}, and "context" where there is one.

        `weights` divides them by the square root of the number of inputs that a unit sees, which
        gives the scale of LeCun, Bottou, Orr, Mueller, "Efficient BackProp", 1998, and makes a
        change of given size in them change the function equally at every width.
        """
        sizes = (self.event_size, *self.hidden_sizes, self.event_size * self.num_params)
        return init_layers(key, sizes, self.context_size, zero_output=True)

    def bind(self, params: Params, context: Array | None = None) -> "Conditioner":
        """The conditioner x -> theta; the leading axes of context and x broadcast."""
        size = self.context_size
        if size is None:
            rule = "`context` must be None for a network without `context_size`"
            got = f"shape {getattr(context, 'shape', ())}"
            checks.require(context is None, rule, got, say=str)
        elif context is None:
            raise ValueError(f"`context` must have a shape that ends in {(size,)}; got None.")
        else:
            checks.trailing_shape("context", context, (size,), "this network")
        return Conditioner(self, params, context)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Conditioner:
    """A masked network with its parameters and context: a callable and a pytree."""

    network: MaskedNetwork = dataclasses.field(metadata={"static": True})
    params: Params
    context: Array | None = None

    def __repr__(self) -> str:
        return repr(self.network)

    def __call__(self, x: Array) -> Array:
        """Parameters theta of shape [..., D, P] for x of shape [..., D]."""
        return apply(self.network, self.params, x, self.context)


def weights(network: MaskedNetwork, params: Params) -> list[tuple[Array, Array]]:
    """The masked and scaled (w, b) of every layer, for inputs and outputs in the sorted order.

    Column u of a layer is raw_w[:, u] * mask[:, u] / sqrt(number of inputs that u sees). The
    outputs of the last layer are laid out as [D, P].
    """
    result = []
    for index, (layer, fan_in) in enumerate(zip(params["layers"], fan_ins(network), strict=True)):
        seen: Array | np.ndarray = np.arange(len(layer["w"]))[:, None] < jnp.asarray(fan_in)[None]
        if network._sparse is not None:
            mask = network._sparse[1][index]
            repeats = layer["w"].shape[1] // mask.shape[1]  # P, of the outputs
            seen = np.repeat(mask, repeats, axis=1)
            fan_in = seen.sum(0)
        scale = jnp.asarray(1 / np.sqrt(np.maximum(fan_in, 1)), layer["w"].dtype)
        result.append((jnp.where(seen, layer["w"] * scale[None], 0), layer["b"]))
    return result


def fan_ins(network: MaskedNetwork) -> list[np.ndarray]:
    """How many inputs each unit sees, for every layer: its first ones, as degrees are sorted."""
    *pairs, (rows, columns) = itertools.pairwise(network.degrees)
    outputs = np.repeat(columns, network.num_params)
    hidden = [np.searchsorted(below, above, side="right") for below, above in pairs]
    return [*hidden, np.searchsorted(rows, outputs, side="left")]


def product(h: Array, w: Array) -> Array:
    """h w for h of shape [..., n], on one axis of rows: a gradient of more is transposed first."""
    rows = h.reshape(math.prod(h.shape[:-1]), h.shape[-1])
    return (rows @ w).reshape(*h.shape[:-1], w.shape[-1])


def add(first: Array, second: Array) -> Array:
    """The sum of two arrays whose leading axes broadcast, also where ranks may not be promoted."""
    rank = max(first.ndim, second.ndim)
    first, second = (jnp.expand_dims(a, tuple(range(rank - a.ndim))) for a in (first, second))
    return first + second


def context_term(params: Params, context: Array) -> Array:
    """What the context adds to the first layer, of shape [..., size of that layer]."""
    return product(context * params["context"].shape[0] ** -0.5, params["context"])


def _with_context(
    network: MaskedNetwork, params: Params, context: Array | None
) -> list[tuple[Array, Array]]:
    """`weights`, with what the context adds as a part of the first bias."""
    (w, b), *rest = weights(network, params)
    return [(w, b if context is None else add(b, context_term(params, context))), *rest]


def apply(network: MaskedNetwork, params: Params, x: Array, context: Array | None = None) -> Array:
    """The network itself: x of shape [..., D] to theta of shape [..., D, P].

    The leading axes of `x` and `context` broadcast; the context's contribution is computed once per
    context, not once per row of x.
    """
    checks.trailing_shape("x", x, (network.event_size,), "this masked network")
    x = x if network.order is None else x[..., np.asarray(network.order)]
    run = _by_columns if num_blocks(network) > 1 else _by_blocks
    theta = run(network, params, x, context)
    theta = theta.reshape(*theta.shape[:-1], network.event_size, network.num_params)
    return theta if network.order is None else theta[..., np.argsort(network.order), :]


def states(
    network: MaskedNetwork, params: Params, x: Array, context: Array | None = None
) -> list[Array]:
    """Pre-activations [..., units] of every hidden layer, then outputs [..., D P]; x is sorted."""
    activation = activation_function(network.activation)
    result: list[Array] = []
    for w, b in _with_context(network, params, context):
        result.append(add(product(activation(result[-1]) if result else x, w), b))
    return result


def num_blocks(network: MaskedNetwork) -> int:
    """Into how many blocks a gradient cuts the units, to skip the zero blocks above the diagonal.

    Two blocks save a quarter of the arithmetic, and a little less than that in time, once matrices
    have 512 rows; below, and with more blocks, the products become too small to be fast.
    """
    return 2 if max(network.hidden_sizes, default=0) >= 512 and network.event_size > 1 else 1


def num_column_blocks(num_rows: int, num_columns: int) -> int:
    """Into how many blocks of columns `apply` cuts one matrix, where no gradient is taken.

    Of a square one of 512 rows four, which save three eighths of the arithmetic.
    """
    return min(max(num_rows * num_columns // 2**14, 1), 4)


def _by_blocks(network: MaskedNetwork, params: Params, x: Array, context: Array | None) -> Array:
    """The network on sorted coordinates, units cut alike in all layers.

    No block is ever put together, which is cheapest where the products are transposed later.
    """
    activation = activation_function(network.activation)
    coordinates, *layers, _ = masks.blocks(network.degrees, num_blocks(network))
    layers.append([(a * network.num_params, b * network.num_params) for a, b in coordinates])
    below, hs = coordinates, [x[..., a:b] for a, b in coordinates]
    for index, (w, b) in enumerate(_with_context(network, params, context)):
        hs = [activation(h) for h in hs] if index else hs
        # A block sees no later block of the layer below.
        terms = [
            [product(h, w[e:f, c:d]) for h, (e, f) in zip(hs[: i + 1], below, strict=False)]
            for i, (c, d) in enumerate(layers[index])
        ]
        hs = [
            add(b[..., c:d], sum(t[1:], t[0]))
            for t, (c, d) in zip(terms, layers[index], strict=True)
        ]
        below = layers[index]
    return hs[0] if len(hs) == 1 else jnp.concatenate(hs, axis=-1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _by_columns(network: MaskedNetwork, params: Params, x: Array, context: Array | None) -> Array:
    """The same, each matrix cut into blocks of columns and above the rows that they see."""
    activation = activation_function(network.activation)
    seen = fan_ins(network)
    h = x
    for index, (w, b) in enumerate(_with_context(network, params, context)):
        h = activation(h) if index else h
        cuts = np.linspace(0, w.shape[1], num_column_blocks(*w.shape) + 1).round().astype(int)
        parts = []
        for c, d in itertools.pairwise(cuts.tolist()):
            rows = max(int(seen[index][d - 1]), 1)
            parts.append(product(h[..., :rows], w[:rows, c:d]))
        h = add(parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1), b)
    return h


@_by_columns.defjvp
def _by_columns_jvp(
    network: MaskedNetwork, primals: PyTree, tangents: PyTree
) -> tuple[Array, Array]:
    return jax.jvp(functools.partial(_by_blocks, network), primals, tangents)
