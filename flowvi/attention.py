"""A causal transformer as the conditioner of an autoregressive map, as pure functions.

`AttentionNetwork` is the static half, as `MaskedNetwork` is of a masked network; `bind` joins it to
parameters and a context. Token k carries coordinate k - 1 and gives the parameters of coordinate k.
Its keys and values are kept where tokens come one after the other, so that each costs what it costs
in a pass of all of them.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from flowvi import checks
from flowvi.masked import add, context_term, init_layers, product, silu
from flowvi.params import Array, PyTree, Shape

#: Keys and values of each block, each of shape [n, heads, D, width / heads].
Caches = list[tuple[Array, Array]]


@dataclasses.dataclass(frozen=True)
class AttentionNetwork:
    """The static description: x of shape [..., D] to theta of shape [..., D, P], theta_k of x_<k.

        h_k  = E(x_{k-1}) + p_k + c U,                    x_{-1} = 0
        h_k += sum_j softmax_j(q_k . k_j / sqrt(width / heads)) v_j W_o,   j <= k
        h_k += silu(N(h_k) W_1 + b_1) W_2 + b_2           and so on, block by block
        theta_k = N(h_k) W + b_k

    with N to mean 0 and variance 1, and q, k, v linear in N(h). The last layer starts at zero, so a
    new network returns zeros.

    Attributes:
        event_size: D.
        num_params: P, the number of parameters of one coordinate.
        width: the length of h, a multiple of `num_heads`.
        num_heads: attention heads.
        num_blocks: pairs of attention and a dense network, of one hidden layer of 4 widths.
        context_size: the length of the context vector c, or None.

    Source: Vaswani et al., "Attention Is All You Need", 2017; norms before the maps, as in Xiong et
    al., "On Layer Normalization in the Transformer Architecture", 2020.
    """

    event_size: int
    num_params: int
    width: int = 64
    num_heads: int = 4
    num_blocks: int = 2
    context_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("event_size", "num_params", "width", "num_heads", "num_blocks"):
            object.__setattr__(self, name, checks.positive_int(name, getattr(self, name)))
        rule = f"`num_heads` must divide `width`, {self.width}"
        checks.require(self.width % self.num_heads == 0, rule, self.num_heads)

    def init(self, key: Array) -> dict[str, PyTree]:
        """Fresh parameters, of unit variance: they are divided by square roots of sizes in use."""
        keys = jax.random.split(key, 3)
        size = self.width
        shapes = {"qkv": (3 * size,), "out": (size,), "mlp": (4 * size, size)}
        blocks = [
            {
                name: init_layers(k, (size, *sizes), None, zero_output=False)["layers"]
                for k, (name, sizes) in zip(jax.random.split(one, 3), shapes.items(), strict=True)
            }
            for one in jax.random.split(keys[0], self.num_blocks)
        ]
        return {
            "embedding": init_layers(
                keys[1], (1, size, size), self.context_size, zero_output=False
            ),
            "position": jax.random.normal(keys[2], (self.event_size, size)),
            "blocks": blocks,
            "head": {
                "w": jnp.zeros((size, self.num_params)),
                "b": jnp.zeros((self.event_size, self.num_params)),
            },
        }

    def bind(self, params: PyTree, context: Array | None = None) -> "Attention":
        """The conditioner x -> theta; the leading axes of context and x broadcast."""
        return Attention(self, params, context)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attention:
    """An attention network with its parameters and context: a callable and a pytree."""

    network: AttentionNetwork = dataclasses.field(metadata={"static": True})
    params: PyTree
    context: Array | None = None

    def __repr__(self) -> str:
        return repr(self.network)

    def __call__(self, x: Array) -> Array:
        """Parameters theta of shape [..., D, P] for x of shape [..., D]."""
        checks.trailing_shape("x", x, (self.network.event_size,), "this attention network")
        batch = self.batch_shape(x)
        rows = jnp.broadcast_to(x, (*batch, x.shape[-1])).reshape(math.prod(batch), x.shape[-1])
        whole = self.rows(batch)
        _, theta = whole.tokens(whole.start(len(rows), rows.dtype), 0, before(rows))
        return theta.reshape(*batch, *theta.shape[1:])

    def batch_shape(self, x: Array) -> Shape:
        """Leading axes of results for x."""
        own = () if self.context is None else self.context.shape[:-1]
        return jnp.broadcast_shapes(x.shape[:-1], own)

    def rows(self, batch: Shape) -> "Attention":
        """The same with a context for each of the rows of a batch, on one axis."""
        if self.context is None:
            return self
        context = jnp.broadcast_to(self.context, (*batch, self.context.shape[-1]))
        flat = context.reshape(math.prod(batch), context.shape[-1])
        return dataclasses.replace(self, context=flat)

    def start(self, num_rows: int, dtype: jnp.dtype) -> Caches:
        """The caches before the first token."""
        net = self.network
        dtype = jnp.result_type(dtype, self.params["position"])
        shape = num_rows, net.num_heads, net.event_size, net.width // net.num_heads
        return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(net.num_blocks)]

    def tokens(self, caches: Caches, place: Array | int, x: Array) -> tuple[Caches, Array]:
        """Caches with T more tokens from a place on, and their theta, of shape [n, T, P].

        x, of shape [n, T], are the coordinates before each of the tokens.
        """
        params, size, count = self.params, self.network.event_size, x.shape[1]
        here = lambda a: jax.lax.dynamic_slice_in_dim(a, place, count)  # noqa: E731
        seen = jnp.arange(size) <= place + jnp.arange(count)[:, None]
        first, second = params["embedding"]["layers"]
        h = x[..., None] * first["w"][0] + first["b"]
        if self.context is not None:
            h = h + context_term(params["embedding"], self.context)[:, None]
        h = _dense(second, silu(h)) + here(params["position"])
        new = []
        for block, (keys, values) in zip(params["blocks"], caches, strict=True):
            parts = _dense(block["qkv"][0], _normed(h))
            q, k, v = jnp.moveaxis(parts.reshape(*x.shape, 3, *keys.shape[1::2]), 2, 0)
            put = lambda old, own: jax.lax.dynamic_update_slice_in_dim(  # noqa: E731
                old, jnp.moveaxis(own, 1, 2), place, 2
            )
            keys, values = put(keys, k), put(values, v)
            scores = jnp.einsum("nthi,nhji->nhtj", q, keys) * q.shape[-1] ** -0.5
            shares = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf))
            read = jnp.einsum("nhtj,nhji->nthi", shares, values)
            h = h + _dense(block["out"][0], read.reshape(h.shape))
            wide, narrow = block["mlp"]
            h = h + _dense(narrow, silu(_dense(wide, _normed(h))))
            new.append((keys, values))
        head = params["head"]
        return new, product(_normed(h) * h.shape[-1] ** -0.5, head["w"]) + here(head["b"])


def before(x: Array) -> Array:
    """The coordinate before each one, of shape [n, D]; zero before the first."""
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)))


def _dense(layer: PyTree, h: Array) -> Array:
    """h W / sqrt(length of h) + b."""
    return add(product(h * layer["w"].shape[0] ** -0.5, layer["w"]), layer["b"])


def _normed(h: Array) -> Array:
    """h with mean 0 and variance 1."""
    centred = h - h.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
