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
from flowvi.params import PyTree

Array = jax.Array
Slice = tuple[int, int]

# No index counts from the end, and looking whether one does takes time in each step.
_slice = functools.partial(jax.lax.dynamic_slice_in_dim, allow_negative_indices=False)
_update = functools.partial(jax.lax.dynamic_update_slice_in_dim, allow_negative_indices=False)
_index = functools.partial(jax.lax.dynamic_index_in_dim, allow_negative_indices=False)


@dataclasses.dataclass(frozen=True)
class Group:
    """One group of neighbouring coordinates, and the units that become computable with them.

    Attributes:
        coordinates: first and last + 1 of the group's coordinates.
        units: for each hidden layer, first and last + 1 of the group's units.
        windows: for each hidden layer, the number of units computed in one step.
        starts: for each hidden layer and each step, where in the group's units the step begins.
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
        starts = tuple(
            tuple((first[low:high] - a).tolist())
            for first, (a, _) in zip(firsts, units, strict=True)
        )
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

    Args:
        plan: the groups.
        weights_t: W_l^T of each layer, [out, in].
        rhs: of each layer, [out, n] or [out, 1].
        aux: what `hidden` needs of each hidden layer, [units, n].
        hidden: (z, aux) of a window of units -> h.
        coordinate: (o of shape [P, n], aux of the coordinate) -> x_k of shape [n].
        coordinate_aux: a pytree of arrays with a leading axis of D.

    Returns:
        z of every layer, the last being o of shape [D P, n], and x of shape [D, n].
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

    Attributes:
        starts: [layers, steps], where a step's window of units begins.
        windows: for each layer, the number of units of a step.
        known: for each layer, the right-hand side and what earlier groups add to it.
        blocks: for each layer, the weights from the group's own units.
        aux: for each hidden layer, what `hidden` needs.
        coordinate_aux: what `coordinate` needs, with a leading axis of steps.
        hidden: see `ascend`.
        coordinate: see `ascend`.
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
    """The walk down: solves A^T lambda = g.

    Args:
        plan: the groups.
        weights: W_l of each layer, [in, out].
        rhs: g of each layer, [out, n].
        slopes: phi'(a_l) of each hidden layer, [units, n].
        coordinate_rhs: g_x, [D, n].
        t_x: [D, n].
        t_o: [D P, n].

    Returns:
        lambda of every layer, and v of shape [D, n].
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

    Attributes:
        starts: [1 + hidden layers, steps], where a step's window begins: of coordinates, of units.
        windows: the size of each window.
        later: for coordinates and each hidden layer, what later groups add.
        blocks: for coordinates and each hidden layer, the weights to the group's own units.
        rhs: g of each layer.
        slopes: phi'(a_l) of each hidden layer.
        coordinate_rhs: g_x.
        t_x: the slope of the scalar map in x.
        t_o: its slopes in o.
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
        own_v = (_slice(self.coordinate_rhs, j, 1) + self._pull(0, j, lambdas)) / _slice(
            self.t_x, j, 1
        )
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
