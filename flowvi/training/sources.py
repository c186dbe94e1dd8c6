"""Where batches come from: arrays on the device, rows on the host, or an iterable.

The loop asks a source for what it needs from a step on, and gets a `Chunk`: all the data, the rows
of many batches, or many batches. The last two are made on the host, in a thread, while the device
works on the chunk before.
"""

import concurrent.futures
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flowvi import devices
from flowvi.checks import positive_int, require
from flowvi.families import as_array
from flowvi.optimizers import rowwise
from flowvi.params import PyTree, named_leaves
from flowvi.supports import chunks
from flowvi.training.order import Order
from flowvi.training.stopping import NEVER

Array = jax.Array

#: Bytes of the batches, or of the numbers of rows, in a chunk, about; and its batches at most.
CHUNK_BYTES, ROWS_BYTES, CHUNK_BATCHES = 8 * 2**20, 2**19, 4096

#: Shapes of batches that are taken without a word. Each one costs a compilation.
FEW_SHAPES = 3


class Chunk(NamedTuple):
    """What the steps from `first` to before `end` work on: all data, or batches along a new axis.

    `rows` are those of each batch, of shape [number of batches, batch_size]; None where `data` are
    batches, or each step sees all of them.
    """

    data: PyTree
    rows: Array | None
    first: int
    end: int


class LazyRows(NamedTuple):
    """Data that are made when they are needed: `take(rows)` are arrays with these rows."""

    take: Callable[[np.ndarray], PyTree]
    num_rows: int


class Source:
    """All the data in every step, or nothing at all.

    Every source has the shapes and dtypes of a batch, and the number of rows where that is known;
    chunks of a `batched` one hold batches along a leading axis.
    """

    batched = False
    num_rows: int | None = None
    batch_size: int | None = None

    def __init__(self, data: PyTree):
        self._data = data
        self.batch = _shapes(data)
        leaves = jax.tree.leaves(data)
        if leaves:
            self.num_rows = leaves[0].shape[0]

    def sample(self, count: int) -> PyTree:
        """About so many rows, always the same ones, to tell data from others."""
        step = max((self.num_rows or 1) // count, 1)
        return jax.tree.map(lambda leaf: np.asarray(leaf[::step]), self._data)

    def begin(self, key: Array, step: int) -> None:
        """Called once, before the first chunk, with the key of shuffles and the first step."""

    def at(self, step: int) -> Chunk | None:
        """The chunk that holds the batch of a step; None if there is none. Steps never go back."""
        del step
        return Chunk(self._data, None, 0, NEVER)

    def close(self) -> None:
        """Ends what works in the background."""


class Prefetched(Source):
    """A source that makes its chunks on the host, one ahead of the device."""

    def begin(self, key: Array, step: int) -> None:
        self._order = Order(key, self.num_rows or 1)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "flowvi-batches")
        self._chunk: Chunk | None = None
        self._mesh = devices.as_mesh(None)
        self._next = self._thread.submit(self._make, step)

    def at(self, step: int) -> Chunk | None:
        if self._chunk is None or step >= self._chunk.end:
            self._chunk = None  # or three chunks would be alive while the next one is made
            self._chunk = self._next.result()
            if self._chunk is not None:
                self._next = self._thread.submit(self._make, self._chunk.end)
        return self._chunk

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _make(self, step: int) -> Chunk | None:
        with devices.over(self._mesh):  # JAX's context is one thread's
            return self.make(step)

    def make(self, step: int) -> Chunk | None:
        """The chunk that begins with a step; runs in the thread."""
        raise NotImplementedError


class Rows(Prefetched):
    """Rows of arrays on the device, out of which the compiled step picks its own."""

    def __init__(self, data: PyTree, num_rows: int, batch_size: int):
        self._data, self.num_rows, self.batch_size = data, num_rows, batch_size
        self.batch = _shapes(data, batch_size)
        self._capacity = int(np.clip(ROWS_BYTES // (4 * batch_size), 1, CHUNK_BATCHES))

    def _rows(self, step: int) -> np.ndarray:
        size, count = self.batch_size or 1, self._capacity
        return self._order.rows(step * size, count * size).reshape(count, size)

    def make(self, step: int) -> Chunk:
        return Chunk(self._data, devices.put(self._rows(step)), step, step + self._capacity)


class HostRows(Rows):
    """Rows that stay on the host, such as those of an `np.memmap`: read as they are needed.

    The order of the rows is that of arrays on the device.
    """

    batched = True

    def __init__(self, lazy: LazyRows, batch_size: int):
        self._take = lazy.take
        super().__init__(lazy.take(np.zeros(1, np.int32)), lazy.num_rows, batch_size)
        self._capacity = _capacity(self.batch)

    def sample(self, count: int) -> PyTree:
        num_rows = self.num_rows or 1
        return self._take(np.arange(0, num_rows, max(num_rows // count, 1)))

    def make(self, step: int) -> Chunk:
        rows = self._rows(step)
        own = devices.own_places(rows.shape[1])
        mine = rows[:, own]
        # In the order in which they lie in the file.
        sort = np.argsort(mine, axis=None)

        def batches(leaf: np.ndarray) -> Array:
            found = np.empty(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))
            found[sort] = leaf
            found = found.reshape(*mine.shape, *leaf.shape[1:])
            if mine.shape == rows.shape:
                return devices.put(found, 1)
            whole = np.empty((*rows.shape, *leaf.shape[1:]), found.dtype)
            whole[:, own] = found  # the others are read by their processes
            return devices.put(whole, 1)

        taken = jax.tree.map(batches, self._take(mine.ravel()[sort]))
        return Chunk(taken, None, step, step + self._capacity)


class Batches(Prefetched):
    """An iterable of batches, iterated anew whenever it ends.

    A batch of another shape, such as a ragged last one, starts a chunk of its own, and costs one
    more compilation.
    """

    batched = True

    def __init__(self, iterable: Iterable[PyTree], rows_of_params: int | None = None):
        self._iterable, self._rows_of_params = iterable, rows_of_params
        self._iterator: Iterator[PyTree] = iter(iterable)
        self._number = 0
        self._seen: list[PyTree] = []
        self._ahead: PyTree = None
        self._ahead = self._first = self._draw()
        got_one = self._ahead is not None
        require(got_one, "`data` must give at least one batch", "none", say=str)
        self.batch = _shapes(self._ahead)

    def sample(self, count: int) -> PyTree:
        del count
        return self._first

    def begin(self, key: Array, step: int) -> None:
        # Batches of earlier steps are drawn again and left out.
        for _ in range(step):
            self._ahead = self._draw()
        super().begin(key, step)

    def make(self, step: int) -> Chunk | None:
        if self._ahead is None:
            return None
        shapes = _shapes(self._ahead)
        self._note(shapes)
        capacity, batches = _capacity(shapes), list[PyTree]()
        while (
            len(batches) < capacity and self._ahead is not None and _shapes(self._ahead) == shapes
        ):
            batches.append(self._ahead)
            self._ahead = self._draw()

        def stack(*leaves: np.ndarray) -> Array:
            # Always of one length, or each would compile anew.
            chunk = np.zeros((capacity, *leaves[0].shape), leaves[0].dtype)
            np.stack(leaves, out=chunk[: len(leaves)])
            return devices.put(chunk, 1)

        return Chunk(jax.tree.map(stack, *batches), None, step, step + len(batches))

    def _note(self, shapes: PyTree) -> None:
        if shapes in self._seen:
            return
        self._seen.append(shapes)
        if len(self._seen) == FEW_SHAPES + 1:
            what = f"Batches of {len(self._seen)} different shapes came so far, and each shape is"
            fix = "Perhaps let the loader drop or fill up its ragged batches?"
            warnings.warn(f"{what} compiled anew. {fix}", RuntimeWarning, stacklevel=2)

    def _draw(self) -> PyTree:
        """The next batch as numpy arrays; None at the end of a one-way iterator."""
        for _ in range(2):
            for batch in self._iterator:
                self._number += 1
                return self._checked(batch)
            if self._iterator is self._iterable:
                return None
            self._iterator = iter(self._iterable)
        return None

    def _checked(self, batch: PyTree) -> PyTree:
        name = f"batch {self._number} of data"
        arrays, _ = check_rows(name, batch)
        rowwise.check_batch(name, arrays, self._rows_of_params)
        own = lambda leaf: np.asarray(leaf, jax.dtypes.canonicalize_dtype(leaf.dtype))  # noqa: E731
        arrays = jax.tree.map(own, arrays)
        if self._ahead is not None:
            have, want = jax.tree.structure(arrays), jax.tree.structure(self._ahead)
            rule = f"`{name}` must have the structure of the one before, {want}"
            require(have == want, rule, have)  # type: ignore[operator]
        return arrays


def _shapes(data: PyTree, num_rows: int | None = None) -> PyTree:
    def shape(leaf: np.ndarray) -> jax.ShapeDtypeStruct:
        rows = leaf.shape[:1] if num_rows is None else (num_rows,)
        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        return jax.ShapeDtypeStruct((*rows, *leaf.shape[1:]), dtype)

    return jax.tree.map(shape, data)


def _capacity(batch: PyTree) -> int:
    """How many batches of these shapes make a chunk."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))
    return int(np.clip(CHUNK_BYTES // max(size, 1), 1, 256))


def make(
    data: PyTree, batch_size: int | None, *, must_be_finite: bool, rows_of_params: int | None
) -> Source:
    """The source of batches behind `data`, checked; the numbers of an iterable are not looked at.

    `rows_of_params` is how many rows have parameters for themselves, which data then name.
    """
    if data is None:
        check_batch_size(batch_size, None)
        rowwise.check_batch("data", data, rows_of_params)
        return Source(None)
    if _is_iterable(data):
        rule = "`batch_size` must be None where `data` is an iterable, whose batches are taken as"
        require(batch_size is None, f"{rule} they come", batch_size)
        return Batches(data, rows_of_params)
    if isinstance(data, LazyRows):
        return HostRows(data, check_batch_size(batch_size, data.num_rows) or data.num_rows)
    arrays, num_rows = check_rows("data", data)
    batch_size = check_batch_size(batch_size, num_rows)
    rowwise.check_batch("data", arrays, rows_of_params)
    if must_be_finite:
        fix = "Perhaps drop or fill in such rows, or pass `check_finite=False` if the loss knows"
        fix += " what to do with them?"
        for name, leaf in named_leaves("data", arrays).items():
            check_finite(name, leaf, fix)
    if batch_size is None:
        return Source(devices.put(arrays))
    if any(isinstance(leaf, np.memmap) for leaf in jax.tree.leaves(arrays)):
        lazy = LazyRows(lambda rows: jax.tree.map(lambda leaf: leaf[rows], arrays), num_rows)
        return HostRows(lazy, batch_size)
    return Rows(devices.put(arrays), num_rows, batch_size)


def _is_iterable(data: PyTree) -> bool:
    # A pytree has leaves other than itself, and what can become an array is no iterable of batches.
    is_leaf = jax.tree_util.all_leaves([data])
    return is_leaf and isinstance(data, Iterable) and not hasattr(data, "__array__")


def as_arrays(name: str, data: PyTree) -> PyTree:
    """`data` with an array of numbers in the place of each leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: as_array(name + jax.tree_util.keystr(path), leaf), data
    )


def check_rows(name: str, data: PyTree) -> tuple[PyTree, int]:
    """`data` as arrays, and the number of their rows, which all leaves share."""
    data = as_arrays(name, data)
    leaves = named_leaves(name, data)
    require(leaves, f"`{name}` must hold at least one array", data)
    for where, leaf in leaves.items():
        require(leaf.ndim, f"`{where}` must have a leading axis of rows", "a scalar", say=str)
    (first, num_rows), *others = [(where, leaf.shape[0]) for where, leaf in leaves.items()]
    for where, count in others:
        rule = f"`{where}` must have as many rows as `{first}`, which has {num_rows}"
        require(count == num_rows, rule, count)
    require(num_rows, f"`{name}` must have at least one row", "none", say=str)
    return data, num_rows


def check_batch_size(batch_size: int | None, num_rows: int | None) -> int | None:
    """`batch_size` as an int; None where every step sees all the data, or there is none."""
    if batch_size is None:
        return None
    batch_size = positive_int("batch_size", batch_size)
    if num_rows is None:
        raise ValueError(f"`batch_size` must be None where there is no `data`; got {batch_size}.")
    fix = "Perhaps leave it out, so that every step sees all rows?"
    rule = f"`batch_size` must be at most the number of rows, {num_rows}"
    require(batch_size <= num_rows, rule, batch_size, fix)
    return None if batch_size == num_rows else batch_size


def check_finite(name: str, array: Array | np.ndarray, fix: str) -> None:
    """Checks that all numbers are finite, a chunk of the rows at a time."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return
    host = np.asarray(array) if isinstance(array, jax.Array) else array
    for chunk in chunks(host):
        values = np.asarray(host[chunk])
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            row, *column = map(int, bad[0])
            where = f"row {chunk.start + row}"
            if column:
                where += f", column {column[0] if len(column) == 1 else tuple(column)}"
            if len(bad) > 1:
                where += f", and {len(bad) - 1} more"
            got = f"{values[tuple(bad[0])]} in {where}"
            raise ValueError(f"`{name}` must be finite; got {got}. {fix}")
