"""The order in which rows are used.

Rows come as one endless stream, epoch after epoch, each epoch a fresh shuffle of all rows. The
stream is cut into batches of one size, so a batch may hold the end of one epoch and the beginning
of the next. Every row is used exactly once an epoch, no row is dropped, and no batch is smaller
than the others: a ragged last batch would need a second compiled program, and its rows would weigh
more than the rest.

The shuffle of an epoch depends on the key and the number of the epoch alone, and each of its rows
is found by itself.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

#: Rounds of the shuffle: two rows keep their relation through all of them with chance 2**-ROUNDS.
ROUNDS = 16

#: Rounds and rows of one kernel. Of more rounds, a processor could do but one row at a time, and
#: more rows would be spread over threads: steps would go on in another one, far from its caches.
GROUP, CHUNK = 2, 1024

#: Bytes at most of the order that is made ahead, if not that of two epochs. Of more, the compiler
#: would take a step's look at them for a long one, and spread it over threads for nothing.
AHEAD = 2**18


class Order(NamedTuple):
    """A place in the stream of rows.

    Attributes:
        rows: the orders of some epochs, a ring: epoch e is the (e modulo their number)-th of them,
            and behind the last one are the first rows again, so that any batch is one slice.
        filled: the number of the first epoch that was never in it.
        epoch: the number of the epoch of the next row.
        offset: the place of the next row in it.
    """

    rows: Any
    filled: Any
    epoch: Any
    offset: Any


class Shuffles(NamedTuple):
    """What the rounds of some shuffles need, each of shape [ROUNDS, ...] of uint32.

    Attributes:
        salt: makes the bits of a round its own.
        mirror: K, such that a round lets row x and K - x change places or not.
    """

    salt: Array
    mirror: Array


@dataclasses.dataclass(frozen=True)
class Stream:
    """The stream of rows, cut into batches.

    Attributes:
        num_rows: rows of the data.
        batch_size: rows of a batch, at most all.
        num_batches: how many batches should be made ahead, where `AHEAD` or two epochs are enough
            for them.
    """

    num_rows: int
    batch_size: int
    num_batches: int

    @property
    def _dtype(self) -> np.dtype:
        return np.dtype(np.uint16 if self.num_rows <= 2**16 else np.int32)

    @property
    def _ahead(self) -> int:
        """How many epochs are made ahead."""
        most = AHEAD // self._dtype.itemsize // self.num_rows
        return max(2, min(most, -(-self.num_batches * self.batch_size // self.num_rows) + 1))

    def start(self) -> Order:
        """The place before the first row. `turn` fills in the orders, which are missing."""
        size = self._ahead * self.num_rows + self.batch_size
        return Order(np.zeros(size, self._dtype), *np.zeros(3, np.int32))

    def turn(self, order: Order, key: Array) -> Order:
        """Fills in the orders of the epochs to come, in the place of those that are used up."""
        end = order.epoch + self._ahead

        def fill(order: Order) -> Order:
            first = jnp.maximum(order.filled, order.epoch)
            each = first + jnp.arange(self._ahead, dtype=jnp.int32)
            chosen = shuffles(key, each, self.num_rows)

            def one(number: Array, rows: Array) -> Array:
                own = jax.tree.map(lambda leaf: leaf[:, number], chosen)
                fresh = _shuffled_epoch(own, self.num_rows).astype(rows.dtype)
                place = (first + number) % self._ahead * self.num_rows
                rows = jax.lax.dynamic_update_slice_in_dim(rows, fresh, place, 0)
                # The first rows once more behind the last, whichever these were.
                return rows.at[-self.batch_size :].set(rows[: self.batch_size])

            return order._replace(
                rows=jax.lax.fori_loop(0, end - first, one, order.rows), filled=end
            )

        return jax.lax.while_loop(lambda order: order.filled < end, fill, order)

    def batches_left(self, order: Order) -> Array:
        """How many batches are to come before the next `turn` has to be."""
        return (self._ahead * self.num_rows - order.offset) // self.batch_size

    def go_on(self, order: Order, num_batches: Any) -> Order:
        """The place that many batches later."""
        place = order.offset + num_batches * self.batch_size
        epoch = order.epoch + place // self.num_rows
        return order._replace(epoch=epoch, offset=place % self.num_rows)

    def take(self, data: Any, order: Order, number: Any) -> Any:
        """A batch to come, of shape [batch_size, ...] in every leaf; number 0 is the next one."""
        end = self._ahead * self.num_rows
        place = order.epoch % self._ahead * self.num_rows + order.offset + number * self.batch_size
        place = jnp.where(place < end, place, place - end)
        rows = jax.lax.dynamic_slice_in_dim(order.rows, place, self.batch_size).astype(jnp.int32)
        batch = jax.tree.map(lambda leaf: leaf.at[rows].get(mode="promise_in_bounds"), data)
        # Or the compiler picks the rows out anew in each kernel that reads them.
        return jax.lax.optimization_barrier(batch)


def epoch_order(key: Array, epoch: Any, num_rows: int) -> Array:
    """The rows of an epoch in order, shape [num_rows]."""
    return _shuffled_epoch(shuffles(key, epoch, num_rows), num_rows)


def _shuffled_epoch(chosen: Shuffles, num_rows: int) -> Array:
    chunk = min(num_rows, CHUNK)
    places = jnp.arange(-(-num_rows // chunk) * chunk, dtype=jnp.uint32).reshape(-1, chunk)
    rows = jax.lax.map(lambda places: shuffled(chosen, places, num_rows), places)
    return rows.ravel()[:num_rows]


def shuffles(key: Array, epochs: Any, num_rows: int) -> Shuffles:
    """The shuffles of epochs: arrays of shape [ROUNDS, *epochs.shape]."""
    epochs = jnp.asarray(epochs)
    each = jax.vmap(lambda epoch: jax.random.key_data(jax.random.fold_in(key, epoch)))
    seeds = each(epochs.ravel()).reshape(*epochs.shape, -1)
    index = jnp.arange(ROUNDS, dtype=jnp.uint32).reshape(-1, *[1] * epochs.ndim)
    salt = _mix(seeds[..., 0] ^ _mix(seeds[..., 1] ^ index))
    return Shuffles(salt, _mix(salt) % jnp.uint32(num_rows))


def shuffled(chosen: Shuffles, place: Array, num_rows: int) -> Array:
    """The rows at places of shuffled epochs, int32 of the shape of `place`.

    A swap-or-not shuffle: in each round, row x and its mirror image K - x (modulo the number of
    rows) change places or not, as a random bit of the pair decides. It is a permutation in any
    round, and costs a few operations a row where sorting random numbers, 40 times slower on a
    processor, would take longer than a short step.

    Source: Viet Tung Hoang, Ben Morris, Phillip Rogaway, "An Enciphering Scheme Based on a Card
    Shuffle", CRYPTO 2012.

    Args:
        chosen: for each place its shuffle, of shapes [ROUNDS, ...] that broadcast.
        place: in 0, ..., num_rows - 1, of any shape.
        num_rows: rows of an epoch.
    """
    groups = jax.tree.map(lambda leaf: leaf.reshape(-1, GROUP, *leaf.shape[1:]), chosen)

    def rounds(x: Array, group: Shuffles) -> tuple[Array, None]:
        for salt, mirror in zip(*group, strict=True):
            image = mirror - x
            image = jnp.minimum(image, image + jnp.uint32(num_rows))  # one of them wraps around
            heads = _bit(jnp.maximum(x, image) ^ salt)
            x = jnp.where(heads == 1, image, x)
        return x, None

    x, _ = jax.lax.scan(rounds, place.astype(jnp.uint32), groups)
    return x.astype(jnp.int32)


def _bit(x: Array) -> Array:
    # The top bit of `_mix`, but for its first line, which is for inputs that are not salted.
    x = x * jnp.uint32(0x7FEB352D)
    return ((x ^ (x >> 15)) * jnp.uint32(0x846CA68B)) >> 31


def _mix(x: Array) -> Array:
    # A 32-bit hash without simple patterns: Chris Wellons, "Prospecting for Hash Functions", 2018.
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def rows_at(key: Array, place: int, count: int, num_rows: int) -> np.ndarray:
    """The rows at places `place`, ..., `place` + `count` - 1 of the stream, shape [count].

    Nothing of the size of the data is made.
    """
    places = place + np.arange(count, dtype=np.int64)
    epochs: Any = (places // num_rows).astype(np.int32)
    if not count or epochs[0] == epochs[-1]:
        epochs = np.int32(place // num_rows)
    return np.asarray(_rows_at(key, epochs, (places % num_rows).astype(np.uint32), num_rows))


def shuffled_rows(key: Array, places: np.ndarray, num_rows: int) -> np.ndarray:
    """The rows at these places of the first epoch, of the shape of `places`."""
    return np.asarray(_rows_at(key, np.int32(0), places.astype(np.uint32), num_rows))


@functools.partial(jax.jit, static_argnums=3)
def _rows_at(key: Array, epochs: Array, places: Array, num_rows: int) -> Array:
    return shuffled(shuffles(key, epochs, num_rows), places, num_rows)
