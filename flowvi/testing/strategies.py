"""Hypothesis strategies for what the properties of bijectors range over, and for our bijectors.

Needs Hypothesis, which the extra `test` installs. An `event_size` is D, `num_params` is P.
"""

import distrax
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from flowvi.bijectors import IAF, MAF, Chain, LULinear, Permutation
from flowvi.masked import Conditioner, MaskedNetwork
from flowvi.testing.check import perturbed
from flowvi.transformers import Affine, Spline, Transformer

Strategy = st.SearchStrategy


def seeds() -> Strategy[int]:
    """Seeds of random keys."""
    return st.integers(0, 2**31 - 1)


def event_sizes(max_size: int = 6) -> Strategy[int]:
    """Event sizes from 1."""
    return st.integers(1, max_size)


def batch_shapes(max_size: int = 4) -> Strategy[tuple[int, ...]]:
    """Batch shapes of up to two axes, with none and an empty one among them."""
    return st.lists(st.integers(0, max_size), max_size=2).map(tuple)


def hidden_sizes(max_size: int = 12, max_depth: int = 3) -> Strategy[tuple[int, ...]]:
    """Widths of up to `max_depth` hidden layers, also none, also narrower than an event."""
    return st.lists(st.integers(1, max_size), max_size=max_depth).map(tuple)


def orders(event_size: int) -> Strategy[tuple[int, ...]]:
    """Input orders, which are permutations of the coordinates."""
    return st.permutations(range(event_size)).map(tuple)


def transformers() -> Strategy[Transformer]:
    """Affine maps and splines of different bounds."""
    affine = st.sampled_from([1.0, 5.0]).map(Affine)
    spline = st.builds(Spline, num_bins=st.integers(2, 5), interval=st.sampled_from([2.0, 4.0]))
    return st.one_of(affine, spline)


def scales() -> Strategy[float]:
    """Sizes of a perturbation: none, rugged, and so large that transformers reach their bounds."""
    return st.sampled_from([0.0, 0.3, 1.0, 10.0])


@st.composite
def events(
    draw: st.DrawFn, event_shape: tuple[int, ...], batch_shape: tuple[int, ...] = (4,)
) -> jax.Array:
    """Events of shape [*batch_shape, *event_shape]: normal, with tails, zeros and repeated rows."""
    # In numpy, for JAX would compile a program for every shape.
    x = np.random.default_rng(draw(seeds())).normal(size=(*batch_shape, *event_shape))
    x = x * draw(st.sampled_from([1.0, 0.01, 10.0]))
    kind = draw(st.sampled_from(["plain", "zero", "repeated"]))
    if kind == "zero":
        x[np.arange(x.size).reshape(x.shape) % 3 == 0] = 0
    elif kind == "repeated" and batch_shape:
        x[1:] = x[:1]
    return jnp.asarray(x)


@st.composite
def conditioners(draw: st.DrawFn, event_size: int, num_params: int) -> Conditioner:
    """Bound masked networks of any width, depth and order, with badly conditioned parameters."""
    context_size = draw(st.sampled_from([None, 2]))
    widths, order = draw(hidden_sizes()), draw(st.none() | orders(event_size))
    network = MaskedNetwork(event_size, widths, num_params, context_size=context_size, order=order)
    seed = draw(seeds())
    params = jax.jit(network.init)(jax.random.key(seed))
    params = perturbed(params, draw(scales()), seed)
    context = None if context_size is None else jnp.asarray(np.cos(np.arange(context_size)))
    return network.bind(params, context)


@st.composite
def autoregressive(draw: st.DrawFn, event_size: int) -> IAF | MAF:
    """IAF and MAF layers."""
    transformer = draw(transformers())
    conditioner = draw(conditioners(event_size, transformer.num_params))
    layers: list[type[IAF | MAF]] = [IAF, MAF]
    return draw(st.sampled_from(layers))(conditioner, transformer)


def lu_linear(event_size: int) -> Strategy[LULinear]:
    """LU-linear layers with badly conditioned matrices."""

    def build(seed: int, scale: float) -> LULinear:
        zeros = np.zeros((event_size, event_size)), np.zeros(event_size)
        return jax.jit(LULinear)(*perturbed(zeros, scale, seed))

    return st.builds(build, seeds(), scales())


@st.composite
def bijectors(draw: st.DrawFn, event_size: int, max_layers: int = 3) -> distrax.Bijector:
    """Any of our bijectors on vectors of one size, and chains of them."""
    permutations = orders(event_size).map(Permutation)
    links = st.one_of(autoregressive(event_size), permutations, lu_linear(event_size))
    layers = draw(st.lists(links, min_size=1, max_size=max_layers))
    return layers[0] if len(layers) == 1 else Chain(layers)
