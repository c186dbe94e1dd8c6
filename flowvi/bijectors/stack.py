"""Layers of one structure, applied by one scan, so that they compile once."""

from collections.abc import Callable

import distrax
import jax
import jax.numpy as jnp

from flowvi.bijectors.score import forward_with_score
from flowvi.params import PyTree

Array = jax.Array
State = tuple[Array, ...]

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

    Example:
        >>> import distrax, jax.numpy as jnp
        >>> def build(shift, shared):
        ...     return distrax.Block(distrax.ScalarAffine(shift=shift), 1)
        >>> Stack(build, jnp.array([1.0, 2.0]), num_layers=2).forward(jnp.zeros(3))
        Array([3., 3., 3.], dtype=float32)
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
        self._build = build
        self._stacked = stacked
        self._num_layers = num_layers
        self._shared = shared
        super().__init__(event_ndims_in=event_ndims, is_constant_jacobian=is_constant_jacobian)

    def __repr__(self) -> str:
        return f"Stack({self._num_layers} x {jax.eval_shape(lambda: self.layer(0))!r})"

    @property
    def num_layers(self) -> int:
        """L."""
        return self._num_layers

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

        if self._num_layers > 1:
            apply = jax.checkpoint(apply, prevent_cse=False, policy=_KEPT)

        def step(carry: tuple[State, Array], params: PyTree) -> tuple[tuple[State, Array], None]:
            state, total = carry
            state, log_det = apply(params, state)
            return (state, total + log_det), None

        # A layer may broadcast x against its own batch or promote its dtype; a scan may not.
        first = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), self._stacked)
        after, log_det = jax.eval_shape(apply, first, state)
        start = (
            jax.tree.map(lambda a, b: jnp.broadcast_to(a, b.shape).astype(b.dtype), state, after),
            jnp.zeros(log_det.shape, log_det.dtype),
        )
        result, _ = jax.lax.scan(
            step, start, self._stacked, length=self._num_layers, reverse=reverse
        )
        return result

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        """y = f_1(... f_L(x)) and the sum of the layers' log-determinants."""
        self._check_forward_input_shape(x)
        (y,), log_det = self._scan(lambda f, x: f.forward_and_log_det(x), (x,), reverse=True)
        return y, log_det

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        """x with y = f_1(... f_L(x)), and minus the sum of the layers' log-determinants."""
        self._check_inverse_input_shape(y)
        (x,), log_det = self._scan(lambda f, y: f.inverse_and_log_det(y), (y,), reverse=False)
        return x, log_det

    def forward_with_score(self, x: Array, score: Array) -> tuple[Array, Array, Array]:
        """y, the log-determinant and the score at y; see `flowvi.bijectors.score`."""
        self._check_forward_input_shape(x)
        (y, score), log_det = self._scan(forward_with_score, (x, score), reverse=True)
        return y, log_det, score
