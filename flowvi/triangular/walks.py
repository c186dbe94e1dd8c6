"""The two walks over a triangular network, and the groups of coordinates they go by.

`ascend` serves the non-linear solve and its tangent, `descend` the transpose of the tangent; see
`flowvi.triangular` for what they solve.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from flowvi import masked, masks
from flowvi.params import Array, PyTree

Slice = tuple[int, int]

# No index counts from the end, and looking whether one does takes time in each step.
_slice = functools.partial(jax.lax.dynamic_slice_in_dim, allow_negative_indices=False)
_update = functools.partial(jax.lax.dynamic_update_slice_in_dim, allow_negative_indices=False)
_index = functools.partial(jax.lax.dynamic_index_in_dim, allow_negative_indices=False)


@dataclasses.dataclass(frozen=True)
class Group:
    """One group of neighbouring coordinates, and the units that become computable with them.

    For coordinates, and the units of each hidden layer: first and last + 1 of the group. For each
    hidden layer also the number of units computed in one step, and for each step where in the
    group's units it begins.
    """

    coordinates: Slice
    units: tuple[Slice, ...]
    windows: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]


@functools.lru_cache(maxsize=256)
def groups(network: masked.MaskedNetwork, num_groups: int) -> tuple[Group, ...]:
    """The groups of a network, of about equal numbers of coordinates.

    All units of one degree are computed in one step. Steps of a layer have different numbers of
    units where its width is no multiple of D - 1; the window is the largest of them, and a step
    with fewer also touches units of the next degree, which are computed anew in their own step.
    So nothing is padded, also not where a layer has fewer units than there are degrees.
    """
    size = network.event_size
    hidden = [np.asarray(degrees) for degrees in network.degrees[1:-1]]
    # firsts[l][k]: the first unit of layer l whose degree is at least k.
    firsts = [np.searchsorted(degrees, np.arange(size + 1)) for degrees in hidden]
    result = []
    blocks = masks.blocks(network.degrees, num_groups)
    for (low, high), *units, _ in zip(*blocks, strict=True):
        windows = tuple(int(np.diff(first[low : high + 1]).max()) for first in firsts)
        pairs = zip(firsts, units, strict=True)
        starts = tuple(tuple((first[low:high] - a).tolist()) for first, (a, _) in pairs)
        result.append(Group((low, high), tuple(units), windows, starts))
    return tuple(result)


def ascend(
    plan: tuple[Group, ...],
    weights_t: list[Array],
    rhs: list[Array],
    aux: list[Array | None],
    hidden: Callable[[Array, PyTree], Array],
    coordinate: Callable[[Array, PyTree], Array],
    coordinate_aux: PyTree,
) -> tuple[list[Array], Array]:
    """The walk up: solves z = rhs + (strictly earlier parts of W^T h), x_k = coordinate(o_k).

    Of each layer come W_l^T [out, in] and the right-hand side [out, n] or [out, 1]. With what `aux`
    says of a hidden layer, [units, n], a window of it is `hidden(z, aux)`. With what
    `coordinate_aux`, arrays with a leading axis of D, say of it, a coordinate of shape [n] is
    `coordinate(o, aux)`, for o of shape [P, n].

    It returns z of every layer, the last being o of shape [D P, n], and x of shape [D, n].
    """
    size, num_layers = plan[-1].coordinates[1], len(rhs)
    num_params = weights_t[-1].shape[0] // size
    n = jax.tree.leaves(coordinate_aux)[0].shape[-1]
    dtype = jnp.result_type(*rhs, *weights_t)
    # Inputs of each layer (x, h_1, .., h_L) and results (z_1, .., z_L, o), filled group by group.
    inputs: list[list[Array]] = [[] for _ in range(num_layers)]
    results: list[list[Array]] = [[] for _ in range(num_layers)]
    for group in plan:
        low, high = group.coordinates
        rows = [*group.units, (low * num_params, high * num_params)]
        columns = [group.coordinates, *group.units]
        known, blocks = [], []
        for layer, ((a, b), (c, d)) in enumerate(zip(rows, columns, strict=True)):
            start = jnp.broadcast_to(rhs[layer][a:b], (b - a, n)).astype(dtype)
            if c and b > a:
                start = start + weights_t[layer][a:b, :c] @ jnp.concatenate(inputs[layer])
            known.append(start)
            blocks.append(weights_t[layer][a:b, c:d])
        step = _StepUp(
            starts=jnp.asarray((*group.starts, range(0, (high - low) * num_params, num_params))),
            windows=(*group.windows, num_params),
            known=known,
            blocks=blocks,
            aux=[None if v is None else v[a:b] for v, (a, b) in zip(aux, group.units, strict=True)],
            coordinate_aux=jax.tree.map(lambda v, a=low, b=high: v[a:b], coordinate_aux),
            hidden=hidden,
            coordinate=coordinate,
        )
        empty = [[jnp.zeros((b - a, n), dtype) for a, b in slices] for slices in (columns, rows)]
        own_inputs, own_results = jax.lax.fori_loop(0, high - low, step, empty)
        for layer in range(num_layers):
            inputs[layer].append(own_inputs[layer])
            results[layer].append(own_results[layer])
    return [jnp.concatenate(z) for z in results], jnp.concatenate(inputs[0])


@dataclasses.dataclass(frozen=True, eq=False)  # Loops are cached by the identity of their body.
class _StepUp:
    """One step of the walk up within a group; arrays are the group's own blocks.

    At `starts` of shape [layers, steps] the windows of a step begin; `known` is the right-hand side
    and what earlier groups add to it, `blocks` the weights from the group's own units.
    """

    starts: Array
    windows: tuple[int, ...]
    known: list[Array]
    blocks: list[Array]
    aux: list[Array | None]
    coordinate_aux: PyTree
    hidden: Callable[[Array, PyTree], Array]
    coordinate: Callable[[Array, PyTree], Array]

    def __call__(self, j: Array, state: list[list[Array]]) -> list[list[Array]]:
        """Step j: a window of each layer, from the layer before it, then the coordinate."""
        inputs, results = list(state[0]), list(state[1])
        for layer, window in enumerate(self.windows):
            if not window:
                continue  # A narrow layer may have no unit in this group.
            first = self.starts[layer, j]
            z = _slice(self.known[layer], first, window)
            if inputs[layer].shape[0]:
                z = z + _slice(self.blocks[layer], first, window) @ inputs[layer]
            results[layer] = _update(results[layer], z, first, 0)
            if layer < len(self.aux):
                aux = self.aux[layer]
                aux = None if aux is None else _slice(aux, first, window)
                inputs[layer + 1] = _update(inputs[layer + 1], self.hidden(z, aux), first, 0)
        here = jax.tree.map(lambda v: _index(v, j, keepdims=False), self.coordinate_aux)
        inputs[0] = _update(inputs[0], self.coordinate(z, here)[None], j, 0)
        return [inputs, results]


def descend(
    plan: tuple[Group, ...],
    weights: list[Array],
    rhs: list[Array],
    slopes: list[Array],
    coordinate_rhs: Array,
    t_x: Array,
    t_o: Array,
) -> tuple[list[Array], Array]:
    """The walk down: solves A^T lambda = g for lambda of every layer, and v of shape [D, n].

    Of each layer come W_l [in, out] and g [out, n], of hidden ones the slopes phi'(a_l) [units, n];
    `coordinate_rhs` is g_x [D, n]. The slopes of the scalar map are t_x [D, n] and t_o [D P, n].
    """
    size, num_layers = plan[-1].coordinates[1], len(rhs)
    num_params = weights[-1].shape[1] // size
    n = t_x.shape[-1]
    dtype = jnp.result_type(*rhs, *weights)
    results: list[list[Array]] = [[] for _ in range(num_layers)]
    solution: list[Array] = []
    for group in reversed(plan):
        low, high = group.coordinates
        rows = [group.coordinates, *group.units]
        columns = [*group.units, (low * num_params, high * num_params)]
        later, blocks = [], []
        for layer, ((a, b), (c, d)) in enumerate(zip(rows, columns, strict=True)):
            start = jnp.zeros((b - a, n), dtype)
            if d < weights[layer].shape[1] and b > a:
                start = weights[layer][a:b, d:] @ jnp.concatenate(results[layer][::-1])
            later.append(start)
            blocks.append(weights[layer][a:b, c:d])
        step = _StepDown(
            starts=jnp.asarray((range(high - low), *group.starts)),
            windows=(1, *group.windows),
            later=later,
            blocks=blocks,
            rhs=[v[c:d] for v, (c, d) in zip(rhs, columns, strict=True)],
            slopes=[v[c:d] for v, (c, d) in zip(slopes, group.units, strict=True)],
            coordinate_rhs=coordinate_rhs[low:high],
            t_x=t_x[low:high],
            t_o=t_o[low * num_params : high * num_params],
        )
        empty = [jnp.zeros((d - c, n), dtype) for c, d in columns], jnp.zeros_like(t_x[low:high])
        lambdas, v = jax.lax.fori_loop(0, high - low, step, empty)
        for layer in range(num_layers):
            results[layer].append(lambdas[layer])
        solution.append(v)
    return [jnp.concatenate(z[::-1]) for z in results], jnp.concatenate(solution[::-1])


@dataclasses.dataclass(frozen=True, eq=False)  # Loops are cached by the identity of their body.
class _StepDown:
    """One step of the walk down within a group; arrays are the group's own blocks.

    First in `starts`, `windows`, `later` and `blocks` stand the coordinates, then hidden layers;
    `later` is what later groups add, `blocks` are the weights to the group's own units.
    """

    starts: Array
    windows: tuple[int, ...]
    later: list[Array]
    blocks: list[Array]
    rhs: list[Array]
    slopes: list[Array]
    coordinate_rhs: Array
    t_x: Array
    t_o: Array

    def __call__(self, i: Array, state: tuple[list[Array], Array]) -> tuple[list[Array], Array]:
        """Step i from the end: the coordinate, its parameters, then a window of each layer."""
        lambdas, v = list(state[0]), state[1]
        size = self.t_x.shape[0]
        num_params = self.t_o.shape[0] // size
        j = size - 1 - i
        own_v = _slice(self.coordinate_rhs, j, 1) + self._pull(0, j, lambdas)
        own_v = own_v / _slice(self.t_x, j, 1)
        v = _update(v, own_v, j, 0)
        at = j * num_params
        own_o = _slice(self.rhs[-1], at, num_params) - _slice(self.t_o, at, num_params) * own_v
        lambdas[-1] = _update(lambdas[-1], own_o, at, 0)
        for layer in reversed(range(len(self.slopes))):
            window, first = self.windows[layer + 1], self.starts[layer + 1, j]
            if not window:
                continue  # A narrow layer may have no unit in this group.
            own = _slice(self.slopes[layer], first, window) * self._pull(layer + 1, j, lambdas)
            own = own + _slice(self.rhs[layer], first, window)
            lambdas[layer] = _update(lambdas[layer], own, first, 0)
        return lambdas, v

    def _pull(self, layer: int, j: Array, lambdas: list[Array]) -> Array:
        """Rows of W lambda that belong to step j."""
        window, first = self.windows[layer], self.starts[layer, j]
        z = _slice(self.later[layer], first, window)
        if lambdas[layer].shape[0]:
            z = z + _slice(self.blocks[layer], first, window) @ lambdas[layer]
        return z
