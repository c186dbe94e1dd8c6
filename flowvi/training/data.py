"""The order in which rows are used.

Rows come as one endless stream, epoch after epoch, each epoch a fresh shuffle of all rows. The
stream is cut into batches of one size, so a batch may hold the end of one epoch and the beginning
of the next. Every row is used exactly once an epoch, no row is dropped, and no batch is smaller
than the others: a ragged last batch would need a second compiled program, and its rows would weigh
more than the rest.

The shuffle of an epoch depends on the key and the number of the epoch alone.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flowvi import checks

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
    seed = jax.random.key_data(jax.random.fold_in(key, epoch))

    def one_round(index: Array, x: Array) -> Array:
        salt = _mix(seed[0] ^ _mix(seed[1] ^ index))
        mirror = _mix(salt) % jnp.uint32(num_rows)
        image = jnp.where(mirror >= x, mirror - x, mirror - x + jnp.uint32(num_rows))
        heads = _mix(jnp.maximum(x, image) ^ salt) >> 31
        return jnp.where(heads == 1, image, x)

    rounds = jnp.uint32(0), jnp.uint32(ROUNDS)
    x = jax.lax.fori_loop(*rounds, one_round, jnp.arange(num_rows, dtype=jnp.uint32))
    return x.astype(jnp.int32)


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


def as_arrays(name: str, data: Any) -> Any:
    """`data` with a JAX array in the place of each leaf.

    Raises:
        TypeError: if a leaf does not hold numbers.
    """

    def as_array(path: Any, leaf: Any) -> Array:
        array = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
        if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
            where = name + jax.tree_util.keystr(path)
            raise TypeError(f"`{where}` must hold numbers; got dtype {array.dtype}.")
        return jnp.asarray(array)

    return jax.tree_util.tree_map_with_path(as_array, data)


def check(name: str, data: Any) -> tuple[Any, int]:
    """`data` as JAX arrays, and the number of their rows.

    Raises:
        TypeError: if a leaf does not hold numbers.
        ValueError: if there is no leaf, a leaf has no axis or no rows, or leaves differ in their
            number of rows.
    """
    data = as_arrays(name, data)
    leaves = {
        name + jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(data)
    }
    if not leaves:
        raise ValueError(f"`{name}` must hold at least one array; got {data!r}.")
    for where, leaf in leaves.items():
        if leaf.ndim == 0:
            raise ValueError(f"`{where}` must have a leading axis of rows; got a scalar.")
    (first, num_rows), *others = [(where, leaf.shape[0]) for where, leaf in leaves.items()]
    for where, count in others:
        if count != num_rows:
            raise ValueError(
                f"`{where}` must have as many rows as `{first}`, which has {num_rows}; got {count}."
            )
    if num_rows == 0:
        raise ValueError(f"`{name}` must have at least one row; got none.")
    return data, num_rows


def check_batch_size(batch_size: Any, num_rows: int | None) -> int | None:
    """`batch_size` as an int; None where every step sees all the data, or there is none.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is below 1, more than the rows, or there is no data.
    """
    if batch_size is None:
        return None
    batch_size = checks.positive_int("batch_size", batch_size)
    if num_rows is None:
        raise ValueError(f"`batch_size` must be None where there is no `data`; got {batch_size}.")
    if batch_size > num_rows:
        raise ValueError(
            f"`batch_size` must be at most the number of rows, {num_rows}; got {batch_size}. "
            "Perhaps leave it out, so that every step sees all rows?"
        )
    return None if batch_size == num_rows else batch_size
