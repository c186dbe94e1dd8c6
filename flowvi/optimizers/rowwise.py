"""Steps that move only the rows of their batch: `PerRow` parameters, and any Optax optimizer.

A step picks the rows of its batch out of the parameters and out of the optimizer's state, works on
these as if there were no others, and writes them back. The optimizer sees each row as a problem of
its own, so what it does to a row depends neither on which others are in the batch, nor on how long
the row has been away.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flowvi.checks import require
from flowvi.params import Fixed, PerRow, PyTree, is_per_row, partition

Array = jax.Array
Optimizer: TypeAlias = optax.GradientTransformationExtraArgs

#: The leaf of a batch that says which rows it holds.
ROW = "row"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(eq=False)
class Beside(PerRow):
    """What an optimizer keeps beside the moments of a row, such as Adam's count of steps."""


class RowwiseState(NamedTuple):
    """An optimizer's state: one of shared parameters, and one of each `PerRow`.

    In these, what belongs to a row is `PerRow` itself; what stands alone, such as the count of a
    schedule, is one for all rows.
    """

    shared: PyTree
    tables: tuple[PyTree, ...]


def tables(tree: PyTree) -> list[PerRow]:
    """The `PerRow` nodes of a tree."""
    return [node for node in jax.tree.leaves(tree, is_leaf=is_per_row) if is_per_row(node)]


def check_tables(params: PyTree) -> int | None:
    """The number of rows that data may name: that of the shortest table; None without tables."""
    counts = []
    for table in tables(params):
        shapes = sorted({jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(table.value)})
        rule = "`params` must hold tables whose leaves have the same leading axis of rows"
        require(len(shapes) == 1 and shapes != [()], f"{rule} in `PerRow`", shapes)
        counts.append(table.num_rows)
    return min(counts, default=None)


def check_batch(name: str, batch: PyTree, num_rows: int | None) -> None:
    """Checks that data, or a batch, say which rows of the tables they hold, if there are any."""
    if num_rows is None:
        return
    is_dict = isinstance(batch, dict)
    names = ", ".join(map(str, batch)) if is_dict else ""
    got = f"a dict of {names or 'nothing'}" if is_dict else type(batch).__name__
    rule = (
        f'`{name}` must be a dict with "{ROW}", the row of each datum in the parameters that rows'
    )
    fix = f'Perhaps pass `{{"x": x, "{ROW}": jnp.arange(len(x))}}`?'
    require(is_dict and ROW in batch, f"{rule} have for themselves", got, fix, say=str)
    where, rows = f'{name}["{ROW}"]', batch[ROW]
    is_integer, rule = jnp.issubdtype(rows.dtype, jnp.integer), "numbers of rows, integers"
    require(is_integer, f"`{where}` must hold {rule}", f"dtype {rows.dtype}", "", TypeError, str)
    rule = f"`{where}` must have shape [num_rows]"
    require(rows.ndim == 1, rule, f"shape {rows.shape}", say=str)
    rows = np.asarray(rows)
    bad = np.flatnonzero((rows < 0) | (rows >= num_rows))
    if bad.size:
        rule = f"`{where}` must lie between 0 and {num_rows - 1}, the rows that `params` has"
        raise ValueError(f"{rule} parameters for; got {rows[bad[0]]} in row {bad[0]}.")


def check_optimizer(optimizer: optax.GradientTransformation, params: PyTree) -> None:
    """Checks that an optimizer can see each row for itself, from shapes alone."""
    if not tables(params):
        return
    own = rowwise(optimizer)

    def step(params: PyTree) -> PyTree:
        params, state = picked((params, own.init(params)), {ROW: jnp.zeros(1, jnp.int32)})
        rows, _ = partition(params)
        zero = jnp.zeros(())
        return own.update(rows, state, rows, value=zero, grad=rows, value_fn=lambda _: zero)

    try:
        jax.eval_shape(step, partition(params)[0])
    except _LineSearch:
        rule = "`optimizer` must not search along a line where there are parameters per row"
        raise ValueError(f"{rule}, whose steps are their own. Perhaps use `optax.adam`?") from None
    except Exception as error:  # Whatever an optimizer says that is not made for it.
        rule = (
            "`optimizer` must keep what it measures row by row where there are parameters per row"
        )
        got = f"got one that raised {type(error).__name__}: {error}"
        raise ValueError(f"{rule}, as `optax.adam` does; {got}") from error


def picked(tree: PyTree, batch: PyTree) -> PyTree:
    """A tree with the rows of the batch in place of all rows; itself where it has none.

    The rows are sorted. One that is twice in the batch is twice in the result, and is read and
    moved at its first place alone.
    """
    if not tables(tree):
        return tree
    rows = jnp.sort(jnp.ravel(batch[ROW]))

    def pick(node: PerRow) -> PerRow:
        value = jax.tree.map(lambda leaf: leaf.at[rows].get(mode="clip"), node.value)
        # Or the compiler picks the rows out anew in each kernel that reads them.
        return type(node)(jax.lax.optimization_barrier(value), Fixed(rows))

    return _map(pick, tree)


def put_back(whole: PyTree, view: PyTree, good: Array) -> PyTree:
    """`view`, with its rows written into those of `whole` if the step was good.

    What has no rows is that of `view` or of `whole`, as the step was good or not.
    """

    def put(old: PerRow, new: PyTree) -> PerRow:
        rows = new.rows.value
        first = jnp.concatenate([jnp.ones(1, bool), rows[1:] != rows[:-1]])
        # Nothing is written behind the last row.
        place = jnp.where(first & good, rows, old.num_rows)
        write = lambda leaf, own: leaf.at[place].set(own.astype(leaf.dtype), mode="drop")  # noqa: E731
        return type(old)(jax.tree.map(write, old.value, new.value))

    return _map(put, whole, view, other=lambda old, new: jnp.where(good, new, old))


def together(shared: PyTree, whole: PyTree) -> PyTree:
    """`shared`, from which tables are left out, with those of `whole`."""
    is_leaf = lambda node: node is None or is_per_row(node)  # noqa: E731
    return jax.tree.map(lambda n, m: n if is_per_row(n) else m, whole, shared, is_leaf=is_leaf)


def _map(
    of_rows: Callable[..., PyTree],
    tree: PyTree,
    *rest: PyTree,
    other: Callable[..., PyTree] = lambda node, *rest: node,
) -> PyTree:
    """A function of each `PerRow` node, and another one of each other leaf."""
    either = lambda n, *m: of_rows(n, *m) if is_per_row(n) else other(n, *m)  # noqa: E731
    return jax.tree.map(either, tree, *rest, is_leaf=is_per_row)


def _without_tables(tree: PyTree) -> PyTree:
    return _map(lambda node: None, tree)


def _alone(tree: PyTree, index: int) -> Callable[[PyTree], PyTree]:
    """What puts a value into the tree as its table number `index`; all else is left out."""
    nodes, structure = jax.tree.flatten(tree, is_leaf=is_per_row)
    place = [i for i, node in enumerate(nodes) if is_per_row(node)][index]

    def put(value: PyTree) -> PyTree:
        alone = [PerRow(value) if i == place else None for i in range(len(nodes))]
        return jax.tree.unflatten(structure, alone)

    return put


# The same object for the same optimizer, so that a second fit compiles nothing.
@functools.lru_cache(maxsize=64)
def rowwise(optimizer: optax.GradientTransformation) -> Optimizer:
    """The same optimizer, which sees each row of a `PerRow` as a problem of its own.

    Updates are of what `picked` gives. Without tables state and updates are the optimizer's own.
    """
    inner = optax.with_extra_args_support(optimizer)

    def init(params: PyTree) -> PyTree:
        found = tables(params)
        if not found:
            return inner.init(params)
        states = [_begin(inner, _alone(params, i), each.value) for i, each in enumerate(found)]
        return RowwiseState(inner.init(_without_tables(params)), tuple(states))

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: PyTree) -> PyTree:
        if not isinstance(state, RowwiseState):
            return inner.update(updates, state, params, **extra)
        value_fn = lambda shared: extra["value_fn"](together(shared, params))  # noqa: E731
        own = _extra(extra, _without_tables, value_fn)
        others, parameters = _without_tables(updates), _without_tables(params)
        shared, new_shared = inner.update(others, state.shared, parameters, **own)
        moves, states = [], []
        found = zip(tables(updates), state.tables, tables(params), strict=True)
        for index, (gradient, old, table) in enumerate(found):
            put = _alone(params, index)
            moved, new = _update(inner, put, gradient.value, old, table.value, extra)
            moves.append(type(gradient)(moved, gradient.rows))
            states.append(new)
        each = iter(moves)
        whole = _map(lambda node: next(each), updates)
        return together(shared, whole), RowwiseState(new_shared, tuple(states))

    return optax.GradientTransformationExtraArgs(init, update)


def _begin(inner: Optimizer, put: Callable[[PyTree], PyTree], value: PyTree) -> PyTree:
    """The state of all rows of a table."""
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), value)
    path = jax.tree_util.tree_leaves_with_path(put(one), is_leaf=is_per_row)[0][0]
    layout = _marked(jax.eval_shape(lambda value: inner.init(put(value)), one), path)
    begin = lambda value: _as_rows(layout, inner.init(put(value)))  # noqa: E731
    return jax.vmap(begin, out_axes=_axes(layout))(value)


def _update(
    inner: Optimizer,
    put: Callable[[PyTree], PyTree],
    gradient: PyTree,
    state: PyTree,
    value: PyTree,
    extra: PyTree,
) -> tuple[PyTree, PyTree]:
    """(the updates of some rows of a table, their state after it)."""

    def of_row(gradient: PyTree, state: PyTree, value: PyTree) -> PyTree:
        own = _extra(extra, lambda grad: put(gradient), _no_line)
        # As the optimizer itself has it: the inverse of `_as_rows`.
        mine = _map(lambda n: n.value if isinstance(n, Beside) else PerRow(n.value), state)
        moves, new = inner.update(put(gradient), mine, put(value), **own)
        return tables(moves)[0].value, _as_rows(state, new)

    axes = _axes(state)
    return jax.vmap(of_row, (0, axes, 0), (0, axes))(gradient, state, value)


def _extra(
    extra: dict[str, PyTree], grad: Callable[[PyTree], PyTree], value_fn: Callable[..., PyTree]
) -> dict[str, PyTree]:
    """The further arguments of an update of some parameters alone."""
    own = {"grad": grad, "value_fn": lambda _: value_fn}
    return {name: own[name](v) if name in own else v for name, v in extra.items()}


def _axes(state: PyTree) -> PyTree:
    """The axis of rows: 0 of what belongs to them, None of what stands alone."""
    return _map(lambda node: 0, state, other=lambda node: None)


def _as_rows(layout: PyTree, state: PyTree) -> PyTree:
    """An optimizer's own state of one row, marked as one that says what belongs to a row."""

    def mark(node: PerRow, part: PyTree) -> PerRow:
        return type(node)(part if isinstance(node, Beside) else part.value, node.rows)

    return _map(mark, layout, state, other=lambda node, part: part)


def _marked(node: PyTree, path: PyTree) -> PyTree:
    """The state of one row, in which `Beside` marks what stands beside moments of the row.

    Such as the count of Adam, by which it corrects them for their start. Moments have the structure
    of the parameters: the row is at the same path.
    """
    if is_per_row(node) or node is None:
        return node
    structure: PyTree
    children, structure = jax.tree.flatten(node, is_leaf=lambda n: n is not node)
    if len(children) == 1 and children[0] is node:
        return node
    found = [jax.tree_util.tree_leaves_with_path(child, is_leaf=is_per_row) for child in children]
    beside = any(is_per_row(leaf) and own == path for pairs in found for own, leaf in pairs)
    is_number = lambda child: beside and jax.tree_util.all_leaves([child])  # noqa: E731
    return structure.unflatten(
        [Beside(child) if is_number(child) else _marked(child, path) for child in children]
    )


class _LineSearch(Exception):  # noqa: N818 (a finding, which the caller turns into an error)
    """An optimizer asks for the loss at other parameters."""


def _no_line(params: PyTree) -> PyTree:
    raise _LineSearch
