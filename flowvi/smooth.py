"""Smooth maps of raw parameters, any finite number, to where the parameters of a map may be."""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

#: No positive number is below this, and no bin of a spline smaller.
LEAST = 1e-4

#: softplus(UNIT) + LEAST = 1: the raw number that is added so that zero stands for one.
UNIT = float(np.log(np.expm1(1 - LEAST)))


def bounded(raw: Array, bound: float) -> Array:
    """A smooth, odd, increasing map of the reals into (-bound, bound) with slope 1 at 0."""
    return bound * jnp.tanh(raw / bound)


def positive(raw: Array) -> Array:
    """A smooth map of the reals to numbers above 1e-4, 1 at 0."""
    return jax.nn.softplus(raw + UNIT) + LEAST
