"""The order in which rows are used.

Rows come as one endless stream, epoch after epoch, each epoch a fresh shuffle of all rows. The
stream is cut into batches of one size, so a batch may hold the end of one epoch and the beginning
of the next. Every row is used exactly once an epoch, no row is dropped, and no batch is smaller
than the others: a ragged last batch would need a second compiled program, and its rows would weigh
more than the rest.

The shuffle of an epoch depends on the key and the number of the epoch alone.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

#: Rounds of the shuffle: two rows keep their relation through all of them with chance 2**-ROUNDS.
ROUNDS = 24


class Order(NamedTuple):
    """A place in the stream of rows.

    Attributes:
        rows: shape [2 * num_rows], the order of the current epoch and of the next, so that a batch
            that straddles them is one slice.
        epoch: the number of the current epoch.
        offset: how many of its rows are used up, or more, if the last batch went on to the next.
    """

    rows: Any
    epoch: Any
    offset: Any


def start(num_rows: int) -> Order:
    """The place before the first row. `turn` fills in the two epochs that are missing."""
    return Order(
        rows=np.zeros(2 * num_rows, np.int32),
        epoch=np.int32(-2),
        offset=np.int32(2 * num_rows),
    )


def epoch_order(key: Array, epoch: Array, num_rows: int) -> Array:
    """The rows of an epoch in order, shape [num_rows].

    A swap-or-not shuffle: in each round, row x and its mirror image K - x (modulo the number of
    rows) change places or not, as a random bit of the pair decides. It is a permutation in any
    round, and costs a few operations a row where sorting random numbers, 40 times slower on a
    processor, would take longer than a short step.

    Source: Viet Tung Hoang, Ben Morris, Phillip Rogaway, "An Enciphering Scheme Based on a Card
    Shuffle", CRYPTO 2012.
    """
    return _shuffled(_seed(key, epoch), jnp.arange(num_rows, dtype=jnp.uint32), num_rows)


def rows_at(key: Array, place: int, count: int, num_rows: int) -> np.ndarray:
    """The rows at places `place`, ..., `place` + `count` - 1 of the stream, shape [count].

    They are those of `epoch_order`, found one by one: nothing of the size of the data is made.
    """
    places = place + np.arange(count, dtype=np.int64)
    epochs = (places // num_rows).astype(np.int32)
    if not count or epochs[0] == epochs[-1]:
        epochs = epochs[:1].sum(dtype=np.int32)
    return np.asarray(_rows_at(key, epochs, (places % num_rows).astype(np.uint32), num_rows))


def shuffled_rows(key: Array, places: np.ndarray, num_rows: int) -> np.ndarray:
    """The rows at these places of the first epoch, of the shape of `places`."""
    return np.asarray(_rows_at(key, np.int32(0), places.astype(np.uint32), num_rows))


@functools.partial(jax.jit, static_argnums=3)
def _rows_at(key: Array, epochs: Array, places: Array, num_rows: int) -> Array:
    seed = functools.partial(_seed, key)
    seeds = seed(epochs) if epochs.ndim == 0 else jax.vmap(seed, out_axes=1)(epochs)
    return _shuffled(seeds, places, num_rows)


def _seed(key: Array, epoch: Array) -> Array:
    return jax.random.key_data(jax.random.fold_in(key, epoch))


def _shuffled(seed: Array, place: Array, num_rows: int) -> Array:
    def one_round(index: Array, x: Array) -> Array:
        salt = _mix(seed[0] ^ _mix(seed[1] ^ index))
        mirror = _mix(salt) % jnp.uint32(num_rows)
        image = jnp.where(mirror >= x, mirror - x, mirror - x + jnp.uint32(num_rows))
        heads = _mix(jnp.maximum(x, image) ^ salt) >> 31
        return jnp.where(heads == 1, image, x)

    rounds = jnp.uint32(0), jnp.uint32(ROUNDS)
    return jax.lax.fori_loop(*rounds, one_round, place).astype(jnp.int32)


def _mix(x: Array) -> Array:
    # A 32-bit hash without simple patterns: Chris Wellons, "Prospecting for Hash Functions", 2018.
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def turn(order: Order, key: Array) -> Order:
    """Goes on to the epoch in which the next batch begins."""
    num_rows = order.rows.shape[0] // 2

    def one_epoch(order: Order) -> Order:
        upcoming = epoch_order(key, order.epoch + 2, num_rows)
        return Order(
            rows=jnp.concatenate([order.rows[num_rows:], upcoming]),
            epoch=order.epoch + 1,
            offset=order.offset - num_rows,
        )

    return jax.lax.while_loop(lambda order: order.offset >= num_rows, one_epoch, order)


def batches_left(order: Order, batch_size: int) -> Array:
    """How many batches begin in the current epoch and are still to come."""
    num_rows = order.rows.shape[0] // 2
    return (num_rows - order.offset + batch_size - 1) // batch_size


def take(data: Any, order: Order, batch_size: int) -> tuple[Any, Order]:
    """The next batch, of shape [batch_size, ...] in every leaf, and the place after it."""
    rows = jax.lax.dynamic_slice_in_dim(order.rows, order.offset, batch_size)
    batch = jax.tree.map(lambda leaf: leaf.at[rows].get(mode="promise_in_bounds"), data)
    # Or the compiler picks the rows out anew in each kernel that reads them.
    batch = jax.lax.optimization_barrier(batch)
    return batch, order._replace(offset=order.offset + batch_size)
