"""Draws with all the gradients that they can carry, and the choices behind them that carry none.

A draw of a mixture is a choice of a component and a point of it: the point moves with the
component's parameters, the choice does not move with the weights. Whatever estimates a gradient has
to know the two apart. A distribution whose draws are made of both says so by four methods,

    draw(key, sample_shape, reparameterized)        draw_each(key, sample_shape, reparameterized)
    num_choices(reparameterized)                    support_size()

as those below; of any other one the draws are either reparameterised, or choices altogether. A
discrete distribution of one number names its values in an attribute `atoms`, of shape [K, *event].
"""

import math

import distrax
import jax
import jax.numpy as jnp
import numpy as np

from flowvi.params import Array, Shape


def draw(
    distribution: distrax.Distribution, key: Array, sample_shape: Shape, *, reparameterized: bool
) -> tuple[Array, Array]:
    """Draws, and the log probability of the choices behind them.

        d E f(z) / d phi = E [df/dz dz/dphi + f(z) d log_choice / dphi]

    Their shapes are sample_shape + batch_shape + event_shape and sample_shape + batch_shape.
    `reparameterized` says whether samples carry gradients to all parameters, where the distribution
    does not say so itself.
    """
    if hasattr(distribution, "draw"):
        return distribution.draw(key, sample_shape, reparameterized)
    z = distribution.sample(seed=key, sample_shape=sample_shape)
    if reparameterized:
        return z, jnp.zeros((*sample_shape, *distribution.batch_shape), z.dtype)
    z = jax.lax.stop_gradient(z)
    return z, distribution.log_prob(z)


def draw_each(
    distribution: distrax.Distribution, key: Array, sample_shape: Shape, *, reparameterized: bool
) -> tuple[Array, Array]:
    """A draw for each of the C choices that there are, and the log probability of each.

        E f(z) = sum_c exp(log_choice_c) E [f(z_c)]

    Their shapes are [C, *sample_shape, *batch, *event] and [C, *sample_shape, *batch]. A ValueError
    says so where there is no end of choices.
    """
    if hasattr(distribution, "draw_each"):
        return distribution.draw_each(key, sample_shape, reparameterized)
    if reparameterized:
        z, log_choice = draw(distribution, key, sample_shape, reparameterized=True)
        return z[None], log_choice[None]
    values, batch = support(distribution), (*sample_shape, *distribution.batch_shape)
    lone = jnp.expand_dims(values, tuple(range(1, 1 + len(batch))))
    z = jnp.broadcast_to(lone, (len(values), *batch, *distribution.event_shape))
    return z, distribution.log_prob(z)


def num_choices(distribution: distrax.Distribution, *, reparameterized: bool) -> int | None:
    """How many choices a draw may be made of: 1 if it is none, None if there is no end of them."""
    if hasattr(distribution, "num_choices"):
        return distribution.num_choices(reparameterized)
    return 1 if reparameterized else support_size(distribution)


def support_size(distribution: distrax.Distribution) -> int | None:
    """How many values a discrete distribution can take; None for one that is not discrete."""
    if hasattr(distribution, "support_size"):
        return distribution.support_size()
    atoms, places = _atoms(distribution)
    return None if atoms is None else len(atoms) ** math.prod(places)


def support(distribution: distrax.Distribution) -> Array:
    """All values of a discrete distribution, of shape [support_size, *event]."""
    if hasattr(distribution, "support"):
        return distribution.support()
    atoms, places = _atoms(distribution)
    if atoms is None:
        rule = "`distribution` must be discrete, so that its values can be enumerated"
        raise ValueError(f"{rule}; got {type(distribution).__name__}.")
    # The number of a value in base K says which of the K atoms stands at each place.
    count, base = math.prod(places), len(atoms)
    numbers = np.arange(base**count)
    digits = np.stack([numbers // base**place % base for place in range(count)], -1)
    return atoms[digits].reshape(len(numbers), *places, *atoms.shape[1:])


def _atoms(distribution: distrax.Distribution) -> tuple[Array | None, Shape]:
    """(the values of one number, the axes of independent numbers)."""
    inner = distribution
    while isinstance(inner, distrax.Independent):
        inner = inner.distribution
    atoms = getattr(inner, "atoms", None)
    places = len(distribution.event_shape) - len(inner.event_shape)
    return atoms, tuple(distribution.event_shape[:places])
