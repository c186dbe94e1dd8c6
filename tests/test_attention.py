"""Attention as a conditioner: what is kept token by token is what a pass of all of them has."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi.attention import AttentionNetwork
from flowvi.transformers import Affine
from tests.families.test_families import perturbed

NETWORK = AttentionNetwork(4, 2, width=4, num_heads=2, num_blocks=1, context_size=3)


@functools.cache
def params():
    # More than it learns at first, so that heads look at some tokens more than at others.
    return perturbed(jax.tree.map(np.asarray, jax.jit(NETWORK.init)(jax.random.key(0))), 1.0)


def values(by_tokens):
    """Result and derivatives of an inverse, by tokens or by D passes of the same network."""
    rng = np.random.default_rng(0)
    y, context = rng.normal(size=(2, 5, 4)), rng.normal(size=(5, 3))

    def total(params, context, y):
        conditioner = NETWORK.bind(params, context)
        bijector = fv.IAF(conditioner if by_tokens else lambda x: conditioner(x), Affine())
        x, log_det = bijector.inverse_and_log_det(y)
        return jnp.sin(x).sum() + (log_det**2).sum(), (x, log_det)

    @jax.jit
    def run(params, context, y):
        gradient = jax.grad(total, (0, 1, 2), has_aux=True)
        slope = lambda y: gradient(params, context, y)[0][2]  # noqa: E731
        return gradient(params, context, y), jax.jvp(slope, (y,), (jnp.cos(y),))

    own = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params())
    return run(own, context, y)


@pytest.mark.usefixtures("x64")
def test_the_walk_of_tokens_is_the_inverse_with_its_derivatives():
    for one, other in zip(*map(jax.tree.leaves, (values(True), values(False))), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


def test_theta_sees_what_comes_before_alone():
    x = np.random.default_rng(0).normal(size=(1, 4)).astype(np.float32)
    conditioner = jax.jit(lambda x: NETWORK.bind(params(), jnp.ones(3))(x))
    first = np.asarray(conditioner(x))
    for place in range(4):
        moved = np.abs(np.asarray(conditioner(x + np.eye(4, dtype=np.float32)[place])) - first)
        assert (moved[:, : place + 1] == 0).all() and (moved[:, place + 1 :] > 1e-6).all()


def test_sizes_must_fit():
    with pytest.raises(ValueError, match="`num_heads` must divide `width`, 6; got 4"):
        AttentionNetwork(3, 2, width=6, num_heads=4)
