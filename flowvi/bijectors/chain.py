"""Composition of bijectors, with layers of one structure stacked and scanned."""

import dataclasses
from collections.abc import Callable, Sequence

import distrax
import jax
import jax.numpy as jnp

from flowvi.bijectors.stack import Stack

Array = jax.Array
#: A tree's structure, and the shape and dtype of each leaf.
Signature = tuple[jax.tree_util.PyTreeDef, list[tuple[tuple[int, ...], jnp.dtype]]]


class Chain(distrax.Chain):
    """The composition f_1 o ... o f_N of bijectors, the last one applied first, as in Distrax.

    Neighbours of one structure (equal up to the values of their arrays) are stacked and scanned,
    also where the structure repeats every few layers, as in [iaf, permutation, iaf, permutation].
    Then compile time does not grow with the number of layers. Arrays that are the same object in
    all of them, such as a context, are not copied. A fresh lambda in each layer makes each layer
    different.

    Args:
        bijectors: a sequence of at least one bijector.

    Raises:
        ValueError: if it is empty or event ranks do not fit together.

    Example:
        >>> import jax.numpy as jnp
        >>> import flowvi as fv
        >>> turn = fv.Permutation([1, 2, 0])
        >>> fv.Chain([turn, turn]).forward(jnp.array([1.0, 2.0, 3.0]))
        Array([3., 1., 2.], dtype=float32)
    """

    def __init__(self, bijectors: Sequence[distrax.Bijector | Callable[[Array], Array]]):
        # Distrax converts and checks what it is given; only then are structures comparable.
        super().__init__(list(bijectors))
        super().__init__(_stack_repeats(self.bijectors))

    def __repr__(self) -> str:
        return f"Chain({self.bijectors!r})"


@dataclasses.dataclass(frozen=True)
class _Rebuild:
    """Puts bijectors together again from their stacked and their shared leaves."""

    structures: tuple[jax.tree_util.PyTreeDef, ...]
    is_shared: tuple[bool, ...]

    def __call__(self, stacked: list[Array], shared: list[Array]) -> distrax.Bijector:
        stacked_leaves, shared_leaves = iter(stacked), iter(shared)
        leaves = [next(shared_leaves if s else stacked_leaves) for s in self.is_shared]
        bijectors = []
        for structure in self.structures:
            count = structure.num_leaves
            bijectors.append(jax.tree.unflatten(structure, leaves[:count]))
            leaves = leaves[count:]
        return bijectors[0] if len(bijectors) == 1 else distrax.Chain(bijectors)


def _signature(bijector: distrax.Bijector) -> Signature:
    leaves, structure = jax.tree.flatten(bijector)
    return structure, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]


def _equal(first: Signature, second: Signature) -> bool:
    try:
        return bool(first == second)
    except ValueError:  # Static numpy arrays have no truth value; then nothing can be said.
        return False


def _stack_repeats(bijectors: list[distrax.Bijector]) -> list[distrax.Bijector]:
    """Replaces each repeat of a pattern by one `Stack`, taking the longest repeat at each place."""
    signatures = [_signature(bijector) for bijector in bijectors]
    result: list[distrax.Bijector] = []
    start = 0
    while start < len(bijectors):
        best_period, best_repeats = 1, 1
        for period in range(1, (len(bijectors) - start) // 2 + 1):
            end = start + period
            while end < len(bijectors) and _equal(signatures[end], signatures[end - period]):
                end += 1
            repeats = (end - start) // period
            if repeats > 1 and repeats * period > best_repeats * best_period:
                best_period, best_repeats = period, repeats
        size = best_period * best_repeats
        group = bijectors[start : start + size]
        result.append(group[0] if size == 1 else _stack(group, best_period))
        start += size
    return result


def _stack(bijectors: list[distrax.Bijector], period: int) -> distrax.Bijector:
    """One `Stack` of a list of bijectors whose structure repeats with `period`."""
    if bijectors[0].event_ndims_in != bijectors[period - 1].event_ndims_out:
        return distrax.Chain(bijectors)
    layers = [bijectors[i : i + period] for i in range(0, len(bijectors), period)]
    columns = list(zip(*(jax.tree.leaves(layer) for layer in layers), strict=True))
    is_shared = tuple(all(leaf is column[0] for leaf in column) for column in columns)
    return Stack(
        _Rebuild(tuple(jax.tree.structure(b) for b in layers[0]), is_shared),
        [jnp.stack(c) for c, shared in zip(columns, is_shared, strict=True) if not shared],
        num_layers=len(layers),
        shared=[c[0] for c, shared in zip(columns, is_shared, strict=True) if shared],
        event_ndims=bijectors[0].event_ndims_in,
        is_constant_jacobian=all(b.is_constant_jacobian for b in bijectors),
    )
