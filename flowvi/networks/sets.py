"""Networks of sets, whose output does not depend on the order of their elements."""

import dataclasses
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from flowvi import checks
from flowvi.networks.network import MLP, Activation, Array, Network, Shape, leading_shape
from flowvi.params import PyTree

Pooling = Literal["mean", "attention"]


@dataclasses.dataclass(frozen=True, repr=False)
class SetEncoder(Network):
    """A set of n vectors, of shape [..., n, d], to a vector of shape [..., output_size].

        output = g(pool_i h(x_i))

    The order of the elements makes no difference. The pool of "mean" is the mean over elements and
    suits independent ones, of which sums are sufficient; of "attention" there is one block in which
    elements see each other first, and a learned query for each head pools them.

    Attributes:
        input_shape: (n, d).
        output_size: the length of the output.
        pooling: "mean" or "attention".
        hidden_sizes: widths of the hidden layers of h and of g.
        num_heads: heads of the attention; they divide the last of `hidden_sizes`.
        activation: a name such as "silu", or a function.

    Raises:
        ValueError: if a size is not positive, heads do not divide the last width, or the
            pooling is
            unknown.

    Source: Zaheer et al., "Deep Sets", 2017; Lee et al., "Set Transformer", 2019.

    Example:
        >>> import jax
        >>> network = SetEncoder((10, 2), 8)
        >>> params = network.init(jax.random.key(0))
        >>> network.apply(params, jax.numpy.ones((3, 10, 2))).shape
        (3, 8)
    """

    input_shape: Shape
    output_size: int
    pooling: Pooling = "mean"
    hidden_sizes: Shape = (64, 64)
    num_heads: int = 4
    activation: Activation = "silu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_shape", checks.sizes("input_shape", self.input_shape))
        object.__setattr__(self, "hidden_sizes", checks.sizes("hidden_sizes", self.hidden_sizes))
        is_set = len(self.input_shape) == 2
        checks.require(is_set, "`input_shape` must be (elements, columns)", self.input_shape)
        checks.positive_int("output_size", self.output_size)
        checks.positive_int("num_heads", self.num_heads)
        known = get_args(Pooling)
        checks.require(self.pooling in known, f"`pooling` must be one of {known}", self.pooling)
        rule = "`hidden_sizes` must end in a multiple of `num_heads`"
        fits = bool(self.hidden_sizes) and self.hidden_sizes[-1] % self.num_heads == 0
        checks.require(fits, rule, f"{self.hidden_sizes} and {self.num_heads}", say=str)

    def __repr__(self) -> str:
        return f"SetEncoder({self.input_shape} -> {self.output_size}, {self.pooling!r})"

    @property
    def _width(self) -> int:
        return self.hidden_sizes[-1]

    @property
    def _element(self) -> MLP:
        return MLP(self.input_shape[1], self.hidden_sizes[:-1], self._width, None, self.activation)

    @property
    def _whole(self) -> MLP:
        return MLP(self._width, self.hidden_sizes, self.output_size, None, self.activation)

    def init(self, key: Array) -> PyTree:
        keys = jax.random.split(key, 5)
        params = {"element": self._element.init(keys[0]), "whole": self._whole.init(keys[1])}
        if self.pooling == "attention":
            dense = MLP(self._width, (), 3 * self._width)
            params["attention"] = {
                "project": dense.init(keys[2]),
                "mix": MLP(self._width, (), self._width).init(keys[3]),
                "query": jax.random.normal(
                    keys[4], (self.num_heads, self._width // self.num_heads)
                ),
            }
        return params

    def apply(self, params: PyTree, x: Array) -> Array:
        batch = leading_shape(x, self)
        h = self._element.apply(params["element"], x.reshape(math.prod(batch), *self.input_shape))
        h = h.mean(1) if self.pooling == "mean" else self._attend(params["attention"], h)
        return self._whole.apply(params["whole"], h).reshape(*batch, self.output_size)

    def _attend(self, params: PyTree, h: Array) -> Array:
        """One block of self-attention, and a pool by learned queries: [n, m, W] to [n, W]."""
        shape = (*h.shape[:2], self.num_heads, self._width // self.num_heads)
        project = MLP(self._width, (), 3 * self._width).apply(params["project"], h)
        query, k, value = (each.reshape(shape) for each in jnp.split(project, 3, -1))
        scale = shape[-1] ** -0.5
        logits = jnp.einsum("nihd,njhd->nhij", query, k) * scale
        seen = jnp.einsum("nhij,njhd->nihd", jax.nn.softmax(logits, -1), value)
        h = h + MLP(self._width, (), self._width).apply(params["mix"], seen.reshape(h.shape))
        heads = h.reshape(shape)
        shares = jax.nn.softmax(jnp.einsum("hd,njhd->nhj", params["query"], heads) * scale, -1)
        return jnp.einsum("nhj,njhd->nhd", shares, heads).reshape(len(h), self._width)
