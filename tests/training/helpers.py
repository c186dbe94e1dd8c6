"""What tests of training share: one loss and one optimizer, so that programs are shared too."""

import contextlib
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flowvi.training import fit

KEY = jax.random.key(0)
ADAM = optax.adam(0.05)


def quadratic(params, key, batch):
    """Mean squared distance; the plainest loss."""
    del key
    return jnp.mean((batch - params["mean"]) ** 2)


def noisy(params, key, batch):
    """The same with noise and a metric, so that keys and rows leave their traces."""
    noise = jax.random.normal(key, (3,))
    return jnp.mean((batch - params["mean"] + noise) ** 2), {"first": batch[0, 0]}


def start():
    return {"mean": np.zeros(3, np.float32)}


def rows(num_rows=60):
    return (1 + np.random.default_rng(7).normal(size=(num_rows, 3))).astype(np.float32)


def run(loss_fn=quadratic, params=None, optimizer=ADAM, **options):
    """`fit` of the plainest loss, a few steps, without a bar."""
    options = {"key": KEY, "num_steps": 20, "progress": False, **options}
    return fit(loss_fn, start() if params is None else params, optimizer, **options)


class Loader:
    """Batches of rows in order, the last one ragged; it can be iterated again and again."""

    def __init__(self, x, batch_size):
        self.x, self.batch_size, self.epochs = x, batch_size, 0

    def __iter__(self):
        self.epochs += 1
        for i in range(0, len(self.x), self.batch_size):
            yield self.x[i : i + self.batch_size]


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


def plain(leaf):
    """A leaf as a numpy array; a random key as its numbers."""
    is_key = jnp.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def assert_trees_equal(left, right):
    """Bit for bit."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        a, b = plain(a), plain(b)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def assert_same(first, second):
    """Two results, to the bit and in all that does not tell the time."""
    for name in ("params", "last_params", "opt_state", "history"):
        assert_trees_equal(getattr(first, name), getattr(second, name))
    for name in ("best_step", "num_steps", "num_bad_steps", "stop_reason"):
        assert getattr(first, name) == getattr(second, name)
