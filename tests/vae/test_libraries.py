"""One VAE, with networks from Haiku, Flax, Equinox and plain functions."""

import functools
import itertools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flowvi as fv
from tests.vae.helpers import KEY

#: Sizes of the decoder and of the encoder.
DECODER, ENCODER = (2, 8, 12), (12, 8, 4)


class Linen(nn.Module):
    """A dense network in Flax."""

    sizes: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for index, size in enumerate(self.sizes):
            x = nn.Dense(size)(nn.silu(x) if index else x)
        return x


def haiku(sizes):
    return hk.transform(lambda x: hk.nets.MLP(sizes[1:], activation=jax.nn.silu)(x))


def linen(sizes):
    return Linen(sizes[1:])


def flax_nnx(sizes):
    def make(rngs):
        first, last = (nnx.Linear(*pair, rngs=rngs) for pair in itertools.pairwise(sizes))
        return nnx.Sequential(first, nnx.silu, last)

    return make


def equinox(sizes):
    return lambda key: eqx.nn.MLP(*sizes[::2], sizes[1], 1, activation=jax.nn.silu, key=key)


def plain(sizes):
    def init(key, x):
        del key, x
        return [(jnp.ones(pair), jnp.ones(pair[1])) for pair in itertools.pairwise(sizes)]

    def apply(params, x):
        (first, a), (last, b) = params
        return jax.nn.silu(x @ first + a) @ last + b

    return init, apply


def filled(params, weights):
    """Network parameters with these weights [in, out] and biases, wherever they are in the tree."""
    leaves = [leaf for weight, bias in weights for leaf in (weight, weight.T, bias)]

    def fill(leaf):
        found = [new for new in leaves if new.shape == np.shape(leaf)]
        assert len({new.shape for new in found}) == 1
        return found[0]

    return jax.tree.map(fill, params)


def dense(sizes, seed):
    rng = np.random.default_rng(seed)
    return [
        (rng.normal(size=pair).astype(np.float32), rng.normal(size=pair[1]).astype(np.float32))
        for pair in itertools.pairwise(sizes)
    ]


X = np.random.default_rng(0).integers(0, 2, (9, 12)).astype(np.float32)


@functools.cache
def evaluated(make):
    vae = fv.VAE(
        prior=fv.standard_normal(2),
        likelihood=fv.conditional(fv.bernoulli(12), make(DECODER), context_shape=2),
        posterior=fv.conditional(fv.gaussian(2), make(ENCODER), context_shape=12),
    )
    params = vae.init(KEY)
    for part, sizes, seed in (("likelihood", DECODER, 0), ("posterior", ENCODER, 1)):
        params[part]["network"] = filled(params[part]["network"], dense(sizes, seed))
    return vae.evaluate(params, KEY, X, 5), jax.jit(vae.loss())(params, KEY, {"x": X})[0]


SLOW = [pytest.param(make, marks=pytest.mark.slow) for make in (haiku, linen, flax_nnx)]


@pytest.mark.parametrize("make", [equinox, *SLOW])
def test_libraries_agree(make):
    expected, loss = evaluated(plain)
    found, other_loss = evaluated(make)
    np.testing.assert_allclose(found.elbo, expected.elbo, atol=1e-5, rtol=1e-6)
    np.testing.assert_allclose(found.log_likelihood, expected.log_likelihood, atol=1e-5, rtol=1e-6)
    np.testing.assert_allclose(other_loss, loss, atol=1e-5)
