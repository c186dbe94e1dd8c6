"""What the tests of the training room share."""

import contextlib
import dataclasses
import logging
from typing import ClassVar

import distrax
import jax
import jax.numpy as jnp
import numpy as np

from flowvi.families import Family
from flowvi.params import Fixed


def quadratic(params, key, batch):
    """Mean squared distance; the plainest loss."""
    del key
    return jnp.mean((batch - params["mean"]) ** 2)


def start():
    return {"mean": jnp.zeros(3)}


def rows(num_rows=60):
    return 1.0 + jax.random.normal(jax.random.key(7), (num_rows, 3))


@contextlib.contextmanager
def compilations():
    """The list of the programs that JAX compiles inside."""
    names = []

    class Handler(logging.Handler):
        def emit(self, record):
            message = record.getMessage()
            if message.startswith("Compiling "):
                names.append(message.split(" with ")[0])

    handler, logger = Handler(), logging.getLogger("jax")
    propagate = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with jax.log_compiles():
            yield names
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def assert_trees_equal(left, right):
    """Bit for bit."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@dataclasses.dataclass(frozen=True)
class Gauss(Family):
    """A diagonal Gaussian with units, for the loop's tests to train quickly."""

    event_shape: tuple[int, ...] = (2,)
    context_shape: tuple[int, ...] | None = None
    reparameterized: bool = True
    has_units: ClassVar[bool] = True

    def init(self, key):
        del key
        return {"loc": jnp.zeros(self.event_shape), "log_scale": jnp.zeros(self.event_shape)}

    def with_units(self, params, units, context_units=None):
        return {**params, "units": Fixed(units), "context_units": Fixed(context_units)}

    def distribution(self, params, context=None):
        self.check_context(context)
        loc, scale = params["loc"], jnp.exp(params["log_scale"])
        if context is not None:
            loc = loc + context.sum(tuple(range(-len(self.context_shape), 0)))[..., None]
        if "units" in params:
            units = params["units"].value
            loc, scale = units["shift"] + units["scale"] * loc, units["scale"] * scale
        return distrax.Independent(distrax.Normal(loc, scale), len(self.event_shape))


@dataclasses.dataclass(frozen=True)
class Counting(Gauss):
    """One that counts its training batches in a Fixed leaf."""

    has_units: ClassVar[bool] = False

    def init(self, key):
        return {**super().init(key), "seen": Fixed(jnp.zeros((), jnp.int32))}

    def train_distribution(self, params, key, context=None):
        del key
        params = {**params, "seen": Fixed(params["seen"].value + 1)}
        return self.distribution(params, context), params
