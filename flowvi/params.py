"""Parameters: what the optimizer may move, and what it may not.

A parameter tree is any pytree. A subtree wrapped in `Fixed` belongs to the tree, travels with it
and is saved with it, but no optimizer moves it: standardisation, whitening, batch statistics,
running baselines. Only a loss or a family's training form hands back new ones.
"""

from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

#: Nested containers of arrays, such as parameters, data and states of optimizers.
PyTree = Any

#: Children of a node of a tree, with their keys.
Keyed = tuple[tuple[jax.tree_util.GetAttrKey, PyTree], ...]


@jax.tree_util.register_pytree_with_keys_class
class Fixed:
    """A subtree of parameters that the optimizer never moves.

    Args:
        value: any pytree of arrays.

    Example:
        >>> import jax.numpy as jnp
        >>> import flowvi as fv
        >>> params = {"w": jnp.ones(2), "scale": fv.Fixed(jnp.array([3.0, 3.0]))}
        >>> params["scale"].value
        Array([3., 3.], dtype=float32)
    """

    def __init__(self, value: PyTree):
        self.value = value

    def tree_flatten_with_keys(self) -> tuple[Keyed, None]:
        return ((jax.tree_util.GetAttrKey("value"), self.value),), None

    def tree_flatten(self) -> tuple[tuple[PyTree, ...], None]:
        return (self.value,), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: tuple[PyTree, ...]) -> "Fixed":
        return cls(children[0])

    def __repr__(self) -> str:
        return f"Fixed({self.value!r})"


@jax.tree_util.register_pytree_node_class
class Origin:
    """Which family some parameters belong to: a part of the tree that holds no arrays.

    It travels with the parameters, so that a file of them can tell whose they are.

    Args:
        family: the family; hashable and equal by configuration.
    """

    def __init__(self, family: Any):
        self.family = family

    def tree_flatten(self) -> tuple[tuple[()], Any]:
        return (), self.family

    @classmethod
    def tree_unflatten(cls, aux: Any, children: tuple[()]) -> "Origin":
        del children
        return cls(aux)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origin) and self.family == other.family

    def __hash__(self) -> int:
        return hash(self.family)

    def __repr__(self) -> str:
        return f"Origin({self.family!r})"


@jax.tree_util.register_pytree_with_keys_class
class PerRow:
    """A subtree of parameters of which each row of the data has its own.

    Every leaf has a leading axis of rows. A training step moves just the rows of its batch, and
    just theirs of what the optimizer keeps: all others stay as they are, bit for bit, and a step
    costs the same however many there are. The batch says which rows it holds under "row".

    Args:
        value: any pytree of arrays with a leading axis of rows.
        rows: None where these are all rows; else, inside of a step, their sorted numbers, `Fixed`.

    Example:
        >>> import jax.numpy as jnp
        >>> table = PerRow(jnp.arange(6.0).reshape(3, 2))
        >>> table.take(jnp.array([2, 0, 3]))
        Array([[ 4.,  5.], [ 0.,  1.], [nan, nan]], dtype=float32)
    """

    def __init__(self, value: PyTree, rows: Fixed | None = None):
        self.value = value
        self.rows = rows

    @property
    def num_rows(self) -> int:
        """The length of the leading axis."""
        return int(jnp.shape(jax.tree.leaves(self.value)[0])[0])

    def take(self, rows: jax.Array) -> PyTree:
        """`value` at rows of shape [*batch]: leaves of shape [*batch, ...].

        A row that is not there is NaN: one that is out of range, or inside of a step one that the
        batch does not name.
        """
        rows, count = jnp.asarray(rows), self.num_rows
        if self.rows is None:
            place, found = rows, (rows >= 0) & (rows < count)
        else:
            known = self.rows.value
            place = jnp.searchsorted(known, rows)
            found = known[jnp.minimum(place, count - 1)] == rows
        place = jnp.where(found, place, count)
        get = lambda leaf: leaf.at[place].get(mode="fill", fill_value=jnp.nan)  # noqa: E731
        return jax.tree.map(get, jax.tree.map(jnp.asarray, self.value))

    def tree_flatten_with_keys(self) -> tuple[Keyed, None]:
        key = jax.tree_util.GetAttrKey
        return ((key("value"), self.value), (key("rows"), self.rows)), None

    def tree_flatten(self) -> tuple[tuple[PyTree, ...], None]:
        return (self.value, self.rows), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: tuple[PyTree, ...]) -> "PerRow":
        return cls(*children)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.value!r})"


def is_per_row(node: object) -> TypeGuard[PerRow]:
    """Whether this is a `PerRow`."""
    return isinstance(node, PerRow)


def _is_fixed(node: object) -> bool:
    return isinstance(node, Fixed)


def partition(params: PyTree) -> tuple[PyTree, PyTree]:
    """Splits a parameter tree into what the optimizer moves and what it does not.

    Both results have the shape of `params`, with None where a leaf went to the other one, so
    `jax.tree.leaves` of the first gives just the trainable arrays.

    Args:
        params: any pytree, with `Fixed` subtrees in any place.

    Returns:
        (trainable, fixed), which `combine` puts together again.

    Example:
        >>> import jax
        >>> trainable, fixed = partition({"w": 1.0, "scale": Fixed(3.0)})
        >>> jax.tree.leaves(trainable), jax.tree.leaves(fixed)
        ([1.0], [3.0])
    """
    trainable = jax.tree.map(lambda n: None if _is_fixed(n) else n, params, is_leaf=_is_fixed)
    fixed = jax.tree.map(lambda n: n if _is_fixed(n) else None, params, is_leaf=_is_fixed)
    return trainable, fixed


def combine(trainable: PyTree, fixed: PyTree) -> PyTree:
    """The inverse of `partition`."""
    return jax.tree.map(
        lambda t, f: t if f is None else f,
        trainable,
        fixed,
        is_leaf=lambda n: n is None or _is_fixed(n),
    )


def cast(params: PyTree, dtype: DTypeLike) -> PyTree:
    """`params` with their trainable leaves in another floating dtype."""
    trainable, fixed = partition(params)
    return combine(jax.tree.map(lambda leaf: leaf.astype(dtype), trainable), fixed)
