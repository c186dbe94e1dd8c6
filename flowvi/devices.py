"""More than one device: what is split over a mesh, where arrays lie, and what processes agree on.

The mesh is JAX's own, in JAX's own context. Inside of it the compiler makes of each program one for
all devices, and all that is said here is what is split along the axis "data":

- the rows of a batch, and of a chunk of rows that is evaluated;
- the draws, where there are no rows;
- `PerRow` parameters and their part of an optimizer's state, where the devices divide their rows.

All else lies on every device. Means, sums and norms are over all rows and draws, whichever device
they are on, so that losses and gradients are what they are on one device, up to rounding. Outside
of a mesh every function here hands back what it is given.
"""

import contextlib
import functools
import io
import json
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flowvi.checks import positive_int, require
from flowvi.params import PerRow, PyTree, is_key, is_per_row, numbers

Array = jax.Array
P = ParamSpec("P")
R = TypeVar("R")

#: The axis of a mesh along which rows and draws are split.
AXIS = "data"


def as_mesh(mesh: Mesh | int | None) -> Mesh | None:
    """The mesh that is meant: of so many devices; by default that of `jax.set_mesh`, if it can be.

    Raises:
        TypeError: if it is neither a mesh nor a number.
        ValueError: if there are not so many devices, or the mesh has no axis "data".
    """
    if mesh is None:
        mesh = jax.sharding.get_mesh()
        if AXIS not in mesh.axis_names:
            return None
    elif not isinstance(mesh, Mesh):
        count, found = positive_int("mesh", mesh), jax.devices()
        fix = "Perhaps set XLA_FLAGS=--xla_force_host_platform_device_count=4 before JAX begins?"
        rule = f"`mesh` must be at most the number of devices, {len(found)}"
        require(count <= len(found), rule, count, fix)
        all_of_them = jax.process_count() == 1 or count == len(found)
        rule = f"`mesh` must be all {len(found)} devices where there are several processes"
        require(all_of_them, rule, count)
        mesh = Mesh(np.array(found[:count]), (AXIS,))
    rule = f'`mesh` must have an axis "{AXIS}", along which rows and draws are split'
    fix = f'Perhaps `jax.make_mesh((4,), ("{AXIS}",))`?'
    require(AXIS in mesh.axis_names, rule, mesh.axis_names, fix)
    # What lies where is the compiler's work, not that of the types of arrays.
    return Mesh(mesh.devices, mesh.axis_names)


@contextlib.contextmanager
def over(mesh: Mesh | None) -> Iterator[None]:
    """JAX's context of a mesh; nothing where there is none."""
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        yield


def over_its_mesh(function: Callable[P, R]) -> Callable[P, R]:
    """A decorator: a function with an argument `mesh` runs in the context of that mesh."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given: Any = kwargs.get("mesh")
        with over(as_mesh(given)):
            return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """The context of no mesh: what is done in it is done by this process alone."""
    if jax.sharding.get_mesh().empty:
        yield
        return
    with jax.set_mesh(Mesh(np.empty((), object), ())):
        yield


def _size() -> int:
    """The number of devices along the axis of data; 1 outside of a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    is_own = AXIS in mesh.axis_names and AxisType.Auto in mesh.axis_types
    return mesh.shape[AXIS] if is_own else 1


# ------------------------------------------------------------------- inside of compiled functions


def split(tree: PyTree) -> PyTree:
    """The same arrays, whose leading axis is split over devices.

    Where these do not divide it the last device has fewer, and the compiler leaves what fills it up
    out of every sum.
    """
    if (size := _size()) == 1:
        return tree

    def of(leaf: Array) -> Array:
        count = leaf.shape[0]
        filled = _filled(leaf, size)
        return jax.lax.with_sharding_constraint(filled, PartitionSpec(AXIS))[:count]

    return jax.tree.map(lambda leaf: of(leaf) if jnp.ndim(leaf) else leaf, tree)


def _filled(leaf: Array, size: int) -> Array:
    """An array whose last row is there again until `size` divides the number of rows."""
    missing = -leaf.shape[0] % size
    if not missing:
        return leaf
    return jnp.concatenate([leaf, jnp.broadcast_to(leaf[-1:], (missing, *leaf.shape[1:]))])


def placed(tree: PyTree) -> PyTree:
    """Parameters, or an optimizer's state, on every device but for `PerRow`, which is split."""
    if (size := _size()) == 1:
        return tree

    def of(node: PyTree) -> PyTree:
        fits = is_per_row(node) and node.num_rows % size == 0
        spec = PartitionSpec(AXIS) if fits else PartitionSpec()
        constrain = lambda leaf: jax.lax.with_sharding_constraint(leaf, spec)  # noqa: E731
        if isinstance(node, PerRow):
            return type(node)(jax.tree.map(constrain, node.value), node.rows)
        return constrain(node)

    return jax.tree.map(of, tree, is_leaf=is_per_row)


def in_chunks(function: Callable[[PyTree], PyTree], rows: PyTree, size: int) -> PyTree:
    """`function` of rows, of so many at a time, which are split over devices.

    It takes arrays with a common leading axis to others with that axis.
    """
    count = jax.tree.leaves(rows)[0].shape[0]
    if count <= size:
        return function(split(rows))
    # As many rows in each chunk, or all would be compiled once more for the rest.
    chunks = jax.tree.map(lambda x: _filled(x, size).reshape(-1, size, *x.shape[1:]), rows)
    found = jax.lax.map(lambda chunk: function(split(chunk)), chunks)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], found)


# ------------------------------------------------------------------------------------- on the host


def put(tree: PyTree, axis: int | None = None) -> PyTree:
    """Arrays on the devices of the mesh: on each of them, or split along an axis that they divide.

    Processes are not asked whether they have the same numbers.
    """
    mesh = jax.sharding.get_mesh()
    if AXIS not in mesh.axis_names:
        return jax.tree.map(jnp.asarray, tree)

    def of(leaf: Array | np.ndarray) -> Array:
        if isinstance(leaf, Array) and is_key(leaf):
            with outside():
                data = np.asarray(numbers(leaf))
            return jax.random.wrap_key_data(of(data), impl=jax.random.key_impl(leaf))
        divides = axis is not None and leaf.shape[axis] % mesh.shape[AXIS] == 0
        spec = [None] * (axis or 0) + [AXIS] if divides else []
        own = np.asarray(leaf, jax.dtypes.canonicalize_dtype(leaf.dtype))
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.make_array_from_callback(own.shape, sharding, lambda index: own[index])

    return jax.tree.map(of, tree)


def own_places(count: int) -> np.ndarray:
    """Which of `count` places along a split axis are on devices of this process."""
    mesh, places = jax.sharding.get_mesh(), np.arange(count)
    if AXIS not in mesh.axis_names or count % mesh.shape[AXIS]:
        return places
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    parts = sharding.addressable_devices_indices_map((count,)).values()
    return np.unique(np.concatenate([places[index] for index in parts if index is not None]))


def arranged(tree: PyTree) -> PyTree:
    """Parameters and states where training has them; see `placed`."""
    return tree if jax.sharding.get_mesh().empty else jax.jit(placed)(put(tree))


def home(tree: PyTree) -> PyTree:
    """Arrays of the mesh on the default device of each process."""
    mesh = jax.sharding.get_mesh()
    if AXIS not in mesh.axis_names:
        return tree
    if any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(tree)):
        whole = NamedSharding(mesh, PartitionSpec())
        tree = jax.jit(lambda tree: tree, out_shardings=whole)(tree)
    data = jax.tree.map(lambda leaf: np.asarray(numbers(leaf)), tree)
    with outside():
        return jax.tree.map(_as, data, tree)


# -------------------------------------------------------------------------------- among processes


def are_many() -> bool:
    """Whether the mesh is one of several processes."""
    mesh = jax.sharding.get_mesh()
    return not mesh.empty and mesh.is_multi_process


def is_first() -> bool:
    """Whether this process shows, writes and decides: the first, or the only one of its fit."""
    return not are_many() or jax.process_index() == 0


def agreed(value: int) -> int:
    """What the first process says, in all of them."""
    if not are_many():
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def from_first(tree: PyTree, arrays: dict[str, np.ndarray]) -> tuple[PyTree, dict[str, np.ndarray]]:
    """What the first process has, in all of them: of a tree whose shapes they all know."""
    if not are_many():
        return tree, arrays
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    length = agreed(len(file.getvalue()))
    own = np.frombuffer(file.getvalue(), np.uint8)[:length]
    sent = multihost_utils.broadcast_one_to_all(np.pad(own, (0, length - len(own))))
    with np.load(io.BytesIO(np.asarray(sent).tobytes())) as found:
        arrays = dict(found)
    with outside():
        data = jax.tree.map(lambda leaf: np.asarray(numbers(leaf)), tree)
    data = multihost_utils.broadcast_one_to_all(data)
    with outside():
        return jax.tree.map(_as, data, tree), arrays


def _as(data: np.ndarray, like: Array) -> Array:
    """Numbers as a leaf of the kind of another one."""
    array = jax.device_put(np.asarray(data))
    if not is_key(like):
        return array
    return jax.random.wrap_key_data(array, impl=jax.random.key_impl(like))


def of_all(names: dict[str, str]) -> list[dict[str, str]]:
    """The dicts of all processes, in their order; of a process alone just its own."""
    if not are_many():
        return [names]
    text = np.frombuffer(json.dumps(names).encode(), np.uint8)
    lengths = np.ravel(multihost_utils.process_allgather(np.int32(len(text))))
    padded = np.pad(text, (0, int(lengths.max()) - len(text)))
    found = np.asarray(multihost_utils.process_allgather(padded))
    pairs = zip(found, lengths, strict=True)
    return [json.loads(row[:length].tobytes().decode()) for row, length in pairs]


#: What JAX raises where a process does not answer.
LOST = jax.errors.JaxRuntimeError


@contextlib.contextmanager
def lost_named() -> Iterator[None]:
    """Says what it means where a process does not answer."""
    try:
        yield
    except LOST as error:
        if not are_many():
            raise
        what = "Another process of this fit has ended, or cannot be reached, and so does this one"
        fix = "Start all of them again, with `resume=True` where there are checkpoints."
        raise RuntimeError(f"{what}. {fix}") from error
