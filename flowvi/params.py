"""Parameters: what the optimizer may move, and what it may not.

A parameter tree is any pytree. A subtree wrapped in `Fixed` belongs to the tree, travels with it
and is saved with it, but no optimizer moves it: standardisation, whitening, batch statistics,
running baselines. Only a loss or a family's training form hands back new ones.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

#: Nested containers of arrays, such as parameters, data and states of optimizers.
PyTree = Any
Array = jax.Array
Shape = tuple[int, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(eq=False)
class Fixed:
    """A subtree of parameters that the optimizer never moves.

    Args:
        value: any pytree of arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> import flowvi as fv
        >>> fv.Fixed(jnp.array([3.0, 3.0])).value
        Array([3., 3.], dtype=float32)
    """

    value: PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Origin:
    """Which family some parameters belong to: a part of the tree that holds no arrays.

    It travels with the parameters, so that a file of them can tell whose they are.
    """

    family: Any = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(eq=False)
class PerRow:
    """A subtree of parameters of which each row of the data has its own.

    Every leaf has a leading axis of rows. A training step moves just the rows of its batch, and
    just theirs of what the optimizer keeps: all others stay as they are, bit for bit, and a step
    costs the same however many there are. The batch says which rows it holds under "row".

    Attributes:
        value: any pytree of arrays with a leading axis of rows.
        rows: None where these are all rows; else, inside of a step, their sorted numbers, `Fixed`.
    """

    value: PyTree
    rows: Fixed | None = None

    @property
    def num_rows(self) -> int:
        """The length of the leading axis."""
        return int(jnp.shape(jax.tree.leaves(self.value)[0])[0])

    def take(self, rows: jax.Array) -> PyTree:
        """`value` at rows of shape [*batch]: leaves of shape [*batch, ...].

        A row that is not there is NaN: one that is out of range, or inside of a step one that the
        batch does not name.
        """
        place, count = jnp.asarray(rows), self.num_rows
        if self.rows is None:
            found = (place >= 0) & (place < count)
        else:
            place = jnp.searchsorted(self.rows.value, rows)
            found = self.rows.value[jnp.minimum(place, count - 1)] == rows
        place = jnp.where(found, place, count)
        get = lambda leaf: leaf.at[place].get(mode="fill", fill_value=jnp.nan)  # noqa: E731
        return jax.tree.map(get, jax.tree.map(jnp.asarray, self.value))


def is_key(leaf: object) -> bool:
    """Whether this is an array of random keys of the new kind, which holds no numbers."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))


def numbers(leaf: jax.Array) -> jax.Array:
    """A leaf as numbers, also where it holds random keys."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def host_generator(key: jax.Array) -> np.random.Generator:
    """numpy's generator, seeded by a key."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())


def named_leaves(
    name: str, tree: PyTree, is_leaf: Callable[[PyTree], bool] | None = None
) -> dict[str, Any]:
    """The leaves of a tree, each under its place in it, such as "params['w'][0]"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {name + jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def is_per_row(node: object) -> TypeGuard[PerRow]:
    """Whether this is a `PerRow`."""
    return isinstance(node, PerRow)


def partition(params: PyTree) -> tuple[PyTree, PyTree]:
    """(trainable, fixed): what the optimizer moves, and `Fixed` subtrees, with None for the rest.

    `jax.tree.leaves` of the first gives just the trainable arrays; `combine` is the inverse.
    """
    is_fixed = lambda n: isinstance(n, Fixed)  # noqa: E731
    trainable = jax.tree.map(lambda n: None if is_fixed(n) else n, params, is_leaf=is_fixed)
    return trainable, jax.tree.map(lambda n: n if is_fixed(n) else None, params, is_leaf=is_fixed)


def combine(trainable: PyTree, fixed: PyTree) -> PyTree:
    """The inverse of `partition`."""
    is_leaf = lambda n: n is None or isinstance(n, Fixed)  # noqa: E731
    return jax.tree.map(lambda t, f: t if f is None else f, trainable, fixed, is_leaf=is_leaf)


def cast(params: PyTree, dtype: DTypeLike) -> PyTree:
    """`params` with their trainable leaves in another floating dtype."""
    trainable, fixed = partition(params)
    return combine(jax.tree.map(lambda leaf: leaf.astype(dtype), trainable), fixed)
