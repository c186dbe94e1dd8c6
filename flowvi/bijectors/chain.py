"""Composition of bijectors: layers of one structure are stacked and applied by one scan."""

import dataclasses
from collections.abc import Callable, Sequence

import distrax
import jax
import jax.numpy as jnp

from flowvi.bijectors.score import forward_with_score
from flowvi.params import Array, PyTree

State = tuple[Array, ...]
#: A tree's structure, and the shape and dtype of each leaf.
Signature = tuple[jax.tree_util.PyTreeDef, list[tuple[tuple[int, ...], jnp.dtype]]]

#: What a gradient keeps of the inside of a layer: walks, which are slow, see `flowvi.triangular`.
_KEPT = jax.checkpoint_policies.save_only_these_names("walk")


class Stack(distrax.Bijector):
    """The composition of L layers of one structure: f_1 o ... o f_L, the last one applied first.

        f_l = build(slice l of stacked, shared)

    The layers are applied by one `jax.lax.scan`: compile time and program size do not depend on L,
    and what they share is not copied per layer.

    Args:
        build: a callable (parameters of one layer, shared) -> bijector. It is static: use one that
            is equal to itself by value, such as a frozen dataclass, or programs are compiled anew.
        stacked: a pytree of arrays whose leading axis is the layer.
        num_layers: L.
        shared: a pytree of arrays that every layer receives whole, such as a context.
        event_ndims: the event rank of every layer.
        is_constant_jacobian: whether every layer is affine.
    """

    def __init__(
        self,
        build: Callable[[PyTree, PyTree], distrax.Bijector],
        stacked: PyTree,
        *,
        num_layers: int,
        shared: PyTree = (),
        event_ndims: int = 1,
        is_constant_jacobian: bool = False,
    ):
        self._build, self._stacked, self._shared = build, stacked, shared
        self.num_layers = num_layers
        super().__init__(event_ndims_in=event_ndims, is_constant_jacobian=is_constant_jacobian)

    def __repr__(self) -> str:
        return f"Stack({self.num_layers} x {jax.eval_shape(lambda: self.layer(0))!r})"

    def layer(self, index: int) -> distrax.Bijector:
        """Layer f_{index + 1} on its own."""
        return self._build(jax.tree.map(lambda a: a[index], self._stacked), self._shared)

    def _scan(
        self, method: Callable[..., tuple[Array, ...]], state: State, *, reverse: bool
    ) -> tuple[State, Array]:
        """All layers after one another: (state, log_det) from method(layer, *state)."""

        # A gradient keeps what goes into each layer, and computes the layer anew: to read the
        # inside of all layers from memory takes longer, and there may be no room for it.
        def apply(params: PyTree, state: State) -> tuple[State, Array]:
            x, log_det, *more = method(self._build(params, self._shared), *state)
            return (x, *more), log_det

        if self.num_layers > 1:
            apply = jax.checkpoint(apply, prevent_cse=False, policy=_KEPT)

        def step(carry: tuple[State, Array], params: PyTree) -> tuple[tuple[State, Array], None]:
            state, total = carry
            state, log_det = apply(params, state)
            return (state, total + log_det), None

        # A layer may broadcast x against its own batch or promote its dtype; a scan may not.
        first = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), self._stacked)
        after, log_det = jax.eval_shape(apply, first, state)
        grown = lambda a, b: jnp.broadcast_to(a, b.shape).astype(b.dtype)  # noqa: E731
        start = jax.tree.map(grown, state, after), jnp.zeros(log_det.shape, log_det.dtype)
        count = self.num_layers
        result, _ = jax.lax.scan(step, start, self._stacked, length=count, reverse=reverse)
        return result

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        self._check_forward_input_shape(x)
        (y,), log_det = self._scan(lambda f, x: f.forward_and_log_det(x), (x,), reverse=True)
        return y, log_det

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        self._check_inverse_input_shape(y)
        (x,), log_det = self._scan(lambda f, y: f.inverse_and_log_det(y), (y,), reverse=False)
        return x, log_det

    def forward_with_score(self, x: Array, score: Array) -> tuple[Array, Array, Array]:
        self._check_forward_input_shape(x)
        (y, score), log_det = self._scan(forward_with_score, (x, score), reverse=True)
        return y, log_det, score


class Chain(distrax.Chain):
    """The composition f_1 o ... o f_N of bijectors, the last one applied first, as in Distrax.

    Neighbours of one structure (equal up to the values of their arrays) are stacked and scanned,
    also where the structure repeats every few layers, as in [iaf, permutation, iaf, permutation].
    Then compile time does not grow with the number of layers. Arrays that are the same object in
    all of them, such as a context, are not copied. A fresh lambda in each layer makes each layer
    different.

    Args:
        bijectors: a sequence of at least one bijector.

    Source: Rezende, Mohamed, "Variational Inference with Normalizing Flows", 2015.

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

    structure: jax.tree_util.PyTreeDef
    is_shared: tuple[bool, ...]

    def __call__(self, stacked: list[Array], shared: list[Array]) -> distrax.Bijector:
        stacked_leaves, shared_leaves = iter(stacked), iter(shared)
        leaves = [next(shared_leaves if s else stacked_leaves) for s in self.is_shared]
        bijectors = jax.tree.unflatten(self.structure, leaves)
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
        best, size = 1, 1  # The period, and the length of its repeats.
        for period in range(1, (len(bijectors) - start) // 2 + 1):
            end = start + period
            while end < len(bijectors) and _equal(signatures[end], signatures[end - period]):
                end += 1
            whole = (end - start) // period * period
            if whole > max(size, period):
                best, size = period, whole
        group = bijectors[start : start + size]
        result.append(group[0] if size == 1 else _stack(group, best))
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
        _Rebuild(jax.tree.structure(layers[0]), is_shared),
        [jnp.stack(c) for c, shared in zip(columns, is_shared, strict=True) if not shared],
        num_layers=len(layers),
        shared=[c[0] for c, shared in zip(columns, is_shared, strict=True) if shared],
        event_ndims=bijectors[0].event_ndims_in,
        is_constant_jacobian=all(b.is_constant_jacobian for b in bijectors),
    )
