"""The order in which rows are used.

Rows come as one endless stream, epoch after epoch, each epoch a fresh shuffle of all rows. The
stream is cut into batches of one size, so a batch may hold the end of one epoch and the beginning
of the next. Every row is used exactly once an epoch, no row is dropped, and no batch is smaller
than the others: a ragged last batch would need a second compiled program, and its rows would weigh
more than the rest.

The shuffle of an epoch depends on the key and the number of the epoch alone, and each of its rows
is found by itself: nothing is stored, and nothing of the size of the data is made.
"""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

#: Rounds of the shuffle: two rows keep their relation through all of them with chance 2**-ROUNDS.
ROUNDS = 16


def rows_at(key: Array, place: int, count: int, num_rows: int) -> np.ndarray:
    """The rows at places `place`, ..., `place` + `count` - 1 of the stream, int32 of shape [count].

    Args:
        key: a random key.
        place: the first place of the stream.
        count: how many.
        num_rows: rows of an epoch.
    """
    epoch, offset = divmod(place, num_rows)
    num_epochs, width = (count - 1) // num_rows + 2, min(count, num_rows)
    places = np.tile(np.arange(width), (num_epochs, 1))
    places[0] = (places[0] + offset) % num_rows
    table = _shuffle(key, epoch + np.arange(num_epochs), places, num_rows)
    first = table[0, : min(width, num_rows - offset)]
    return np.concatenate([first, table[1:].ravel()])[:count]


def shuffled_rows(key: Array, places: np.ndarray, num_rows: int) -> np.ndarray:
    """The rows at places of the first epoch, int32 of shape [number of places]."""
    return _shuffle(key, np.zeros(1), places[None], num_rows)[0]


def _shuffle(key: Array, epochs: np.ndarray, places: np.ndarray, num_rows: int) -> np.ndarray:
    seed = np.asarray(jax.random.key_data(key)).ravel()[-2:]
    epochs, places = epochs.astype(np.uint32)[:, None], places.astype(np.uint32)
    return np.asarray(_shuffled(seed, epochs, places, np.uint32(num_rows)))


@jax.jit
def _shuffled(seed: Array, epochs: Array, places: Array, num_rows: Array) -> Array:
    """For each epoch, of shape [E, 1], the rows at its places, of shape [E, N].

    A swap-or-not shuffle: in each round, row x and its mirror image K - x (modulo the number of
    rows) change places or not, as a random bit of the pair decides.

    Source: Viet Tung Hoang, Ben Morris, Phillip Rogaway, "An Enciphering Scheme Based on a Card
    Shuffle", CRYPTO 2012.
    """
    seeds = _mix(seed[0] ^ _mix(seed[1] ^ _mix(epochs)))

    def swap(x: Array, index: Array) -> tuple[Array, None]:
        salt = _mix(seeds + index)
        image = salt % num_rows + num_rows - x
        image = jnp.where(image >= num_rows, image - num_rows, image)
        swaps = _mix(jnp.maximum(x, image) ^ salt) >> 31
        return jnp.where(swaps == 1, image, x), None

    x, _ = jax.lax.scan(swap, places, jnp.arange(ROUNDS, dtype=jnp.uint32))
    return x.astype(jnp.int32)


def _mix(x: Array) -> Array:
    # A 32-bit hash without simple patterns: Chris Wellons, "Prospecting for Hash Functions", 2018.
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
