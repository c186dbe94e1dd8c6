"""The order in which rows are used.

Rows come as one endless stream, epoch after epoch, each epoch a fresh shuffle of all rows. The
stream is cut into batches of one size, so a batch may hold the end of one epoch and the beginning
of the next. Every row is used exactly once an epoch, no row is dropped, and no batch is smaller
than the others: a ragged last batch would need a second compiled program, and its rows would weigh
more than the rest.
"""

import jax
import numpy as np

from flowvi.params import numbers


class Order:
    """The stream of rows; the shuffle of an epoch depends on the key and its number alone."""

    def __init__(self, key: jax.Array, num_rows: int):
        self._seed = np.asarray(numbers(key)).ravel().tolist()
        self._num_rows = num_rows
        self._epoch, self._rows = -1, np.zeros(0, np.int32)

    def _shuffled(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            seed = np.random.SeedSequence([*self._seed, epoch])
            generator = np.random.Generator(np.random.Philox(seed))
            self._epoch, self._rows = epoch, np.arange(self._num_rows, dtype=np.int32)
            generator.shuffle(self._rows)
        return self._rows

    def rows(self, place: int, count: int) -> np.ndarray:
        """The rows at places `place`, ..., `place` + `count` - 1 of the stream, int32 [count]."""
        parts = []
        while count:
            epoch, offset = divmod(place, self._num_rows)
            parts.append(self._shuffled(epoch)[offset : offset + count])
            place, count = place + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)
