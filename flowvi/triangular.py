r"""The inverse of an autoregressive map at the price of one pass, and its derivatives.

The problem
    A masked network turns x of D coordinates into theta(x), and a scalar map t gives
    y_k = t(x_k; theta_k), where theta_k sees x_1..x_{k-1} only. Given y, find x. The usual way runs the
    whole network D times, because theta_k is known only when x_{k-1} is.

The solve
    Hidden units are sorted by degree, the number of coordinates that they may see. As soon as
    x_1..x_k are known, exactly the units of degree k become computable, in every layer, and they never
    change again. So walk k = 0..D-1, and in each step compute

        a_l[units of degree k] = rows of W_l^T h_{l-1} + b_l,   h_l = phi(a_l)      l = 1..L
        o_k                    = rows of W_o^T h_L + b_o
        x_k                    = t^{-1}(y_k; o_k)

    from what is already there: forward substitution for a triangular system that is not linear. Every
    row of every weight matrix is used once, so the arithmetic of all D steps is that of one pass.

    Rows of a product need only the columns before them. The coordinates are cut into a few groups; at
    the start of a group one product per layer collects what all earlier groups contribute to its
    units, which skips the zero half of the weights, and the steps inside of the group then work on the
    group's own block, which is small and stays in cache. The buffers are feature-major, [units, n], so
    that the rows of a step are contiguous.

The derivatives
    The state s = (a_1..a_L, o, x) of the walk solves F(s; weights, y) = 0, with

        F = (a_1 - W_1^T x - b_1,  a_l - W_l^T phi(a_{l-1}) - b_l,  o - W_o^T phi(a_L) - b_o,  t(x; o) - y).

    By the implicit function theorem its tangent ds solves a linear system A ds = r, where
    A = dF/ds at the solution and r = -(tangent of F at fixed s):

        da_1 - W_1^T dx                      = dW_1^T x + db_1
        da_l - W_l^T (phi'(a_{l-1}) da_{l-1}) = dW_l^T h_{l-1} + db_l
        do   - W_o^T (phi'(a_L) da_L)         = dW_o^T h_L + db_o
        t_x dx + t_o . do                     = dy

    A is triangular in the order of the walk, so A ds = r is solved by the same walk with phi'(a_l) in the
    place of phi, and A^T lambda = g by the walk from x_D down to x_1:

        v_k                = (g_x + rows of W_1 lambda_1) / t_x
        lambda_o,k         = g_o - t_o v_k
        lambda_l[degree k] = g_l + phi'(a_l) (rows of W_{l+1} lambda_{l+1})

    `jax.custom_jvp` states the tangent and `jax.lax.custom_linear_solve` holds both walks. JAX
    differentiates r itself, so a weight gradient is one product h_{l-1} lambda_l^T, and derivatives of
    every order, in either mode and any nesting, come out of the same two walks.

What is stored
    The state, once: L hidden layers, D P parameters and D coordinates for each of n rows, as much as a
    forward pass keeps for its gradient. The log-determinant is a function of o and x, and is left to
    ordinary differentiation.

Source: forward substitution in blocks, as in Golub, Van Loan, "Matrix Computations", 2013, section 3.1;
the derivative is the implicit function theorem, as in Krantz, Parks, "The Implicit Function Theorem",
2013. We know of no earlier use for autoregressive flows.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowvi import masked
from flowvi.transformers import Transformer

Array = jax.Array
Weights = tuple[tuple[Array, Array], ...]
Slice = tuple[int, int]

_slice = jax.lax.dynamic_slice_in_dim
_update = jax.lax.dynamic_update_slice_in_dim
_index = jax.lax.dynamic_index_in_dim


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

    All units of one degree are computed in one step. Steps of a layer have different numbers of units
    where its width is no multiple of D - 1; the window is the largest of them, and a step with fewer
    also touches units of the next degree, which are computed anew in their own step. So nothing is
    padded, also not where a layer has fewer units than there are degrees.
    """
    size = network.event_size
    hidden = [np.asarray(degrees) for degrees in network.degrees[1:-1]]
    # firsts[l][k]: the first unit of layer l whose degree is at least k.
    firsts = [np.searchsorted(degrees, np.arange(size + 1)) for degrees in hidden]
    cuts = np.linspace(0, size, num_groups + 1).round().astype(int)
    result = []
    for low, high in itertools.pairwise(cuts.tolist()):
        units = tuple((int(first[low]), int(first[high])) for first in firsts)
        windows = tuple(int(np.diff(first[low : high + 1]).max()) for first in firsts)
        starts = tuple(
            tuple((first[low:high] - a).tolist())
            for first, (a, _) in zip(firsts, units, strict=True)
        )
        result.append(Group((low, high), units, windows, starts))
    return tuple(result)


def _ascend(
    plan: tuple[Group, ...],
    weights_t: list[Array],
    rhs: list[Array],
    aux: list[Array | None],
    hidden: Callable[[Array, Any], Array],
    coordinate: Callable[[Array, Any], Array],
    coordinate_aux: Any,
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
        hidden: see `_ascend`.
        coordinate: see `_ascend`.
    """

    starts: Array
    windows: tuple[int, ...]
    known: list[Array]
    blocks: list[Array]
    aux: list[Array | None]
    coordinate_aux: Any
    hidden: Callable[[Array, Any], Array]
    coordinate: Callable[[Array, Any], Array]

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


def _descend(
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


@dataclasses.dataclass(frozen=True)
class _System:
    """The static half of the solve: what F and its linearisation look like."""

    network: masked.MaskedNetwork
    transformer: Transformer
    plan: tuple[Group, ...]

    def activation(self, z: Array) -> Array:
        """phi."""
        return masked.activation_function(self.network.activation)(z)

    def parameters(self, o: Array) -> Array:
        """o of shape [D P, n] as theta of shape [D, n, P]."""
        theta = o.reshape(-1, self.network.num_params, o.shape[-1])
        return jnp.moveaxis(theta, 1, -1)

    def forward(self, o: Array, x: Array) -> Array:
        """t(x; o), of shape [D, n]."""
        return self.transformer(self.parameters(o)).forward(x)

    def walk(self, weights: Weights, y: Array) -> tuple[list[Array], Array]:
        """The state (a_1, .., a_L, o) and x."""

        def coordinate(o: Array, y: Array) -> Array:
            return self.transformer(o.T).inverse(y)

        return _ascend(
            self.plan,
            [w.T for w, _ in weights],
            [b for _, b in weights],
            [None] * (len(weights) - 1),
            lambda z, _: self.activation(z),
            coordinate,
            y,
        )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _solve(system: _System, weights: Weights, y: Array) -> tuple[list[Array], Array]:
    """The state (a_1, .., a_L, o) and x with F = 0; biases are [units, n] or [units, 1]."""
    return system.walk(weights, y)


@_solve.defjvp
def _solve_jvp(system: _System, primals: Any, tangents: Any) -> Any:
    weights, y = primals
    (zs, x), (d_weights, dy) = _solve(system, weights, y), tangents
    hs, slopes = [x], []
    for z in zs[:-1]:
        h, slope = jax.jvp(system.activation, (z,), (jnp.ones_like(z),))
        hs.append(h)
        slopes.append(slope)
    _, pull = jax.vjp(system.forward, zs[-1], x)
    t_o, t_x = pull(jnp.ones_like(x))
    num_params = system.network.num_params
    matrices = [w for w, _ in weights]

    def matvec(unknown: Any) -> Any:
        dz, dx = unknown
        dh = [dx, *(s * z for s, z in zip(slopes, dz, strict=False))]
        rows = [z - w.T @ h for z, w, h in zip(dz, matrices, dh, strict=True)]
        through = (t_o * dz[-1]).reshape(-1, num_params, dx.shape[-1]).sum(1)
        return rows, t_x * dx + through

    def solve_up(_: Any, rhs: Any) -> Any:
        r, r_y = rhs

        def coordinate(do: Array, here: Any) -> Array:
            r_k, t_x_k, t_o_k = here
            return (r_k - (t_o_k * do).sum(0)) / t_x_k

        aux = (r_y, t_x, t_o.reshape(-1, num_params, r_y.shape[-1]))
        return _ascend(
            system.plan,
            [w.T for w in matrices],
            r,
            list(slopes),
            lambda z, slope: slope * z,
            coordinate,
            aux,
        )

    def solve_down(_: Any, rhs: Any) -> Any:
        g, g_x = rhs
        return _descend(system.plan, matrices, g, slopes, g_x, t_x, t_o)

    n = x.shape[-1]
    r = [
        jnp.broadcast_to(dw.T @ h + db, (dw.shape[1], n))
        for (dw, db), h in zip(d_weights, hs, strict=True)
    ]
    # JAX transposes a linear solve only where all of its right-hand side is unknown together, but
    # where just y or just some weights are differentiated, part of it is known. The barrier ties them.
    rhs = jax.lax.optimization_barrier((r, dy))
    solution = jax.lax.custom_linear_solve(matvec, rhs, solve_up, solve_down)
    return (zs, x), solution


def num_groups(network: masked.MaskedNetwork) -> int:
    """How many groups to cut the coordinates into."""
    return max(1, min(8, network.event_size // 8))


def inverse_and_log_det(
    conditioner: masked.Conditioner, transformer: Transformer, y: Array
) -> tuple[Array, Array]:
    """The inverse of y_k = t(x_k; theta_k(x_<k)) and the log-determinant of its Jacobian.

    Args:
        conditioner: a masked network with its parameters and context.
        transformer: the scalar map t; static and hashable, as those of `flowvi.transformers`.
        y: of shape [..., D]; its leading axes broadcast against those of the context.

    Returns:
        (x, log_det) of shapes [..., D] and [...].
    """
    network, context = conditioner.network, conditioner.context
    weights = masked.weights(network, conditioner.params)
    columns = [(w, b[:, None]) for w, b in weights]
    batch = y.shape[:-1]
    if context is not None:
        batch = jnp.broadcast_shapes(batch, context.shape[:-1])
        term = masked.context_term(conditioner.params, context)
        term = jnp.broadcast_to(term, (*batch, term.shape[-1])).reshape(-1, term.shape[-1])
        columns[0] = (columns[0][0], columns[0][1] + term.T)
    dtype = jnp.result_type(y, *(w for w, _ in weights))
    rows = jnp.broadcast_to(y, (*batch, network.event_size)).reshape(-1, network.event_size)
    if network.order is not None:
        rows = rows[:, np.asarray(network.order)]
    system = _System(network, transformer, groups(network, num_groups(network)))
    zs, x = _solve(system, tuple(columns), rows.T.astype(dtype))
    theta = system.parameters(zs[-1])
    log_det = -transformer(theta).forward_log_det_jacobian(x).sum(0)
    x = x.T if network.order is None else x.T[:, np.argsort(network.order)]
    return x.reshape(*batch, network.event_size), log_det.reshape(batch)
