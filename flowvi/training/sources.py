"""Where batches come from: arrays on the device, rows on the host, or an iterable.

The loop asks a source for what it needs from a step on, and gets a `Chunk`. Arrays on the device
are one chunk that never ends, out of which the compiled step picks its own rows. The others make
chunks of several batches on the host, in a thread, while the device works on the chunk before.
"""

import concurrent.futures
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flowvi import checks
from flowvi.training import order, rowwise
from flowvi.training.stopping import NEVER

Array = jax.Array

#: Bytes of a chunk, about, and how many batches it holds at most.
CHUNK_BYTES, CHUNK_BATCHES = 8 * 2**20, 256

#: Numbers that a check of host data looks at together, so that it needs no memory of their size.
CHECK_SIZE = 2**20


class Chunk(NamedTuple):
    """What a run of steps works on.

    Attributes:
        data: the data themselves, or batches along a new leading axis.
        first: the step of the first batch.
        end: the first step for which something else is needed.
    """

    data: Any
    first: int
    end: int


class Source:
    """All the data in every step, or nothing at all.

    Attributes:
        data: a pytree of arrays.
        num_rows: rows of the data; None where that is not known, or there are none.
        batch_size: rows of a batch; None where every step sees all of them.
        streamed: whether chunks hold batches along a leading axis.
    """

    streamed = False

    def __init__(self, data: Any, num_rows: int | None = None, batch_size: int | None = None):
        self.data = data
        self.num_rows = num_rows
        self.batch_size = batch_size

    @property
    def batch(self) -> Any:
        """Shapes and dtypes of a batch."""
        size = self.batch_size or self.num_rows

        def shape(leaf: Any) -> jax.ShapeDtypeStruct:
            dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
            return jax.ShapeDtypeStruct((size, *leaf.shape[1:]), dtype)

        return jax.tree.map(shape, self.data)

    def begin(self, key: Array, step: int) -> None:
        """Called once, before the first chunk, with the key of shuffles and the first step."""

    def at(self, step: int) -> Chunk | None:
        """The chunk that holds the batch of a step; None if there is none. Steps never go back."""
        del step
        return Chunk(self.data, 0, NEVER)

    def close(self) -> None:
        """Ends what works in the background."""


class Prefetched(Source):
    """A source that makes its chunks on the host, one ahead of the device."""

    streamed = True

    def begin(self, key: Array, step: int) -> None:
        """See `Source.begin`."""
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "flowvi-batches")
        self._chunk: Chunk | None = None
        self._next = self._thread.submit(self.make, step)

    def at(self, step: int) -> Chunk | None:
        """See `Source.at`."""
        if self._chunk is None or step >= self._chunk.end:
            self._chunk = None  # or three chunks would be alive while the next one is made
            self._chunk = self._next.result()
            if self._chunk is not None:
                self._next = self._thread.submit(self.make, self._chunk.end)
        return self._chunk

    def close(self) -> None:
        """See `Source.close`."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def make(self, step: int) -> Chunk | None:
        """The chunk that begins with a step; runs in the thread."""
        raise NotImplementedError


def _capacity(batch: Any) -> int:
    """How many batches of these shapes make a chunk."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))
    return int(np.clip(CHUNK_BYTES // max(size, 1), 1, CHUNK_BATCHES))


class HostRows(Prefetched):
    """Rows that stay on the host, such as those of an `np.memmap`: read as they are needed.

    The order of the rows is that of arrays on the device.
    """

    def begin(self, key: Array, step: int) -> None:
        """See `Source.begin`."""
        self._key = key
        self._capacity = _capacity(self.batch)
        super().begin(key, step)

    def make(self, step: int) -> Chunk:
        """See `Prefetched.make`."""
        count, size = self._capacity, self.batch_size or 1
        rows = order.rows_at(self._key, step * size, count * size, self.num_rows or 1)
        # In the order in which they lie in the file.
        sort = np.argsort(rows)
        rows = rows[sort]

        def gather(leaf: Any) -> Array:
            dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
            batches = np.empty((count * size, *leaf.shape[1:]), dtype)
            batches[sort] = leaf[rows]
            return jnp.asarray(batches.reshape(count, size, *leaf.shape[1:]))

        return Chunk(jax.tree.map(gather, self.data), step, step + count)


class Batches(Prefetched):
    """An iterable of batches, iterated anew whenever it ends.

    A batch of another shape, such as a ragged last one, starts a chunk of its own, and costs one
    more compilation.
    """

    def __init__(self, iterable: Iterable[Any], rows_of_params: int | None = None):
        self._iterable = iterable
        self._rows_of_params = rows_of_params
        self._iterator: Iterator[Any] = iter(iterable)
        self._ahead: Any = None
        self._number = 0
        self._ahead = self._draw()
        if self._ahead is None:
            raise ValueError("`data` must give at least one batch; got none.")
        super().__init__(None)

    @property
    def batch(self) -> Any:
        """See `Source.batch`."""
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self._ahead)

    def begin(self, key: Array, step: int) -> None:
        """See `Source.begin`. Batches of earlier steps are drawn again and left out."""
        for _ in range(step):
            self._ahead = self._draw()
        super().begin(key, step)

    def make(self, step: int) -> Chunk | None:
        """See `Prefetched.make`."""
        if self._ahead is None:
            return None
        shapes = self.batch
        batches: list[Any] = []
        capacity = _capacity(shapes)
        while self._ahead is not None and self.batch == shapes and len(batches) < capacity:
            batches.append(self._ahead)
            self._ahead = self._draw()

        def stack(*leaves: np.ndarray) -> Array:
            # Always of one length, or each would compile anew.
            chunk = np.zeros((capacity, *leaves[0].shape), leaves[0].dtype)
            np.stack(leaves, out=chunk[: len(leaves)])
            return jnp.asarray(chunk)

        return Chunk(jax.tree.map(stack, *batches), step, step + len(batches))

    def _draw(self) -> Any:
        """The next batch as numpy arrays; None at the end of a one-way iterator."""
        for _ in range(2):
            for batch in self._iterator:
                self._number += 1
                return self._checked(batch)
            if self._iterator is self._iterable:
                return None
            self._iterator = iter(self._iterable)
        return None

    def _checked(self, batch: Any) -> Any:
        name = f"batch {self._number} of data"
        arrays, _ = check_rows(name, batch)
        if self._rows_of_params is not None:
            rowwise.check_batch(name, arrays, self._rows_of_params)
        arrays = jax.tree.map(
            lambda leaf: np.asarray(leaf, jax.dtypes.canonicalize_dtype(leaf.dtype)), arrays
        )
        if self._ahead is not None:
            have: Any = jax.tree.structure(arrays)
            want: Any = jax.tree.structure(self._ahead)
            if have != want:
                raise ValueError(
                    f"`{name}` must have the structure of the one before, {want}; got {have}."
                )
        return arrays


def make(
    data: Any, batch_size: Any, *, check_finite: bool, rows_of_params: int | None = None
) -> Source:
    """The source of batches behind `data`, checked.

    Args:
        data: None, a pytree of arrays, or an iterable of batches that is no pytree.
        batch_size: rows of a batch, or None.
        check_finite: whether all numbers must be finite; an iterable's are not looked at.
        rows_of_params: how many rows have parameters for themselves, which data then name; or None.

    Raises:
        TypeError: if a leaf does not hold numbers, or `batch_size` is not an integer.
        ValueError: if rows and sizes do not go together, a number is not finite, or rows are not
            named as they should be.
    """
    if data is None:
        check_batch_size(batch_size, None)
        if rows_of_params is not None:
            rowwise.check_batch("data", data, rows_of_params)
        return Source(None)
    if _is_iterable(data):
        if batch_size is not None:
            raise ValueError(
                "`batch_size` must be None where `data` is an iterable, whose batches are taken as "
                f"they come; got {batch_size!r}."
            )
        return Batches(data, rows_of_params)
    data, num_rows = check_rows("data", data)
    batch_size = check_batch_size(batch_size, num_rows)
    if rows_of_params is not None:
        rowwise.check_batch("data", data, rows_of_params)
    if check_finite:
        _check_finite(data)
    if batch_size is not None and any(_stays_on_host(leaf) for leaf in jax.tree.leaves(data)):
        return HostRows(data, num_rows, batch_size)
    return Source(jax.tree.map(jnp.asarray, data), num_rows, batch_size)


def _is_iterable(data: Any) -> bool:
    # A pytree has leaves other than itself, and arrays are no iterables of batches.
    is_leaf = jax.tree_util.all_leaves([data])
    return is_leaf and isinstance(data, Iterable) and not hasattr(data, "shape")


def _stays_on_host(leaf: Any) -> bool:
    return isinstance(leaf, np.memmap | Subset)


class Subset:
    """Some of the rows of an array on the host, picked at random, and read as they are indexed.

    Nothing of the size of the data is made: row i is the array's row at place `first` + i of a
    shuffle that is computed place by place.

    Args:
        array: the array, such as an `np.memmap`.
        key: the key of the shuffle.
        first: the first place.
        count: the number of places.

    Attributes:
        whole: the array.
    """

    def __init__(self, array: np.ndarray, key: Array, first: int, count: int):
        self.whole = array
        self._key = key
        self._first = first
        self.dtype = array.dtype
        self.shape = (count, *array.shape[1:])
        self.ndim = array.ndim

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        places = self._first + np.asarray(rows)
        return self.whole[order.shuffled_rows(self._key, places, len(self.whole))]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy
        return np.asarray(self[np.arange(self.shape[0])], dtype)


def as_arrays(name: str, data: Any) -> Any:
    """`data` with an array in the place of each leaf.

    Raises:
        TypeError: if a leaf does not hold numbers.
    """

    def as_array(path: Any, leaf: Any) -> Any:
        array = leaf if isinstance(leaf, jax.Array | np.ndarray | Subset) else np.asarray(leaf)
        if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
            where = name + jax.tree_util.keystr(path)
            raise TypeError(f"`{where}` must hold numbers; got dtype {array.dtype}.")
        return array

    return jax.tree_util.tree_map_with_path(as_array, data)


def check_rows(name: str, data: Any) -> tuple[Any, int]:
    """`data` as arrays, and the number of their rows.

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


def parts(array: np.ndarray) -> Iterator[slice]:
    """Slices of rows, each of a size that can be looked at together."""
    step = max(CHECK_SIZE // max(int(np.prod(array.shape[1:])), 1), 1)
    for start in range(0, array.shape[0], step):
        yield slice(start, min(start + step, array.shape[0]))


def _check_finite(data: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(data):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        host = np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf
        for part in parts(host):
            values = np.asarray(host[part])
            bad = np.argwhere(~np.isfinite(values))
            if len(bad):
                row = part.start + int(bad[0][0])
                raise ValueError(
                    f"`data{jax.tree_util.keystr(path)}` must be finite; got "
                    f"{values[tuple(bad[0])]} in row {row}. Perhaps drop or fill in such rows, or "
                    "pass `check_finite=False` if the loss knows what to do with them?"
                )
