"""The solve of a triangular network with derivatives of every order; see `flowvi.triangular`."""

import dataclasses
import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from flowvi import masked
from flowvi.params import Array, PyTree
from flowvi.transformers import Transformer
from flowvi.triangular.walks import Group, ascend, descend, groups

Weights = tuple[tuple[Array, Array], ...]
#: A number for each unit and output, by layer, and for each coordinate.
Solution = tuple[list[Array], Array]

#: Bytes of a square weight matrix from which groups pay: 120 units in double precision.
GROUPED = 115_200


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
        num_params = self.network.num_params
        theta = o.reshape(o.shape[0] // num_params, num_params, o.shape[-1])
        return jnp.moveaxis(theta, 1, -1)

    def forward(self, o: Array, x: Array) -> Array:
        """t(x; o), of shape [D, n]."""
        return self.transformer(self.parameters(o)).forward(x)

    def slopes(self, zs: list[Array]) -> list[Array]:
        """phi'(a_l) of each hidden layer."""
        return [jax.jvp(self.activation, (z,), (jnp.ones_like(z),))[1] for z in zs[:-1]]

    def walk(self, weights: Weights, y: Array) -> tuple[list[Array], Array]:
        """The state (a_1, .., a_L, o) and x."""
        matrices, biases = [w.T for w, _ in weights], [b for _, b in weights]
        hidden = lambda z, _: self.activation(z)  # noqa: E731
        coordinate = lambda o, y: self.transformer(o.T).inverse(y)  # noqa: E731
        aux: list[Array | None] = [None] * (len(weights) - 1)
        return ascend(self.plan, matrices, biases, aux, hidden, coordinate, y)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _solve(system: _System, weights: Weights, y: Array) -> tuple[list[Array], Array]:
    """The state (a_1, .., a_L, o) and x with F = 0; biases are [units, n] or [units, 1]."""
    return system.walk(weights, y)


@_solve.defjvp
def _solve_jvp(system: _System, primals: PyTree, tangents: PyTree) -> tuple[PyTree, PyTree]:
    weights, y = primals
    # By this name a caller that trades memory for time can keep what is slow to compute anew.
    (zs, x), (d_weights, dy) = checkpoint_name(_solve(system, weights, y), "walk"), tangents
    hs, slopes = [x, *map(system.activation, zs[:-1])], system.slopes(zs)
    _, pull = jax.vjp(system.forward, zs[-1], x)
    t_o, t_x = pull(jnp.ones_like(x))
    num_params = system.network.num_params
    matrices = [w for w, _ in weights]

    def matvec(unknown: Solution) -> Solution:
        dz, dx = unknown
        dh = [dx, *(s * z for s, z in zip(slopes, dz, strict=False))]
        rows = [z - w.T @ h for z, w, h in zip(dz, matrices, dh, strict=True)]
        through = (t_o * dz[-1]).reshape(dx.shape[0], num_params, dx.shape[-1]).sum(1)
        return rows, t_x * dx + through

    def solve_up(_: object, rhs: Solution) -> Solution:
        r, r_y = rhs

        def coordinate(do: Array, here: tuple[Array, Array, Array]) -> Array:
            r_k, t_x_k, t_o_k = here
            return (r_k - (t_o_k * do).sum(0)) / t_x_k

        aux = (r_y, t_x, t_o.reshape(r_y.shape[0], num_params, r_y.shape[-1]))
        transposed = [w.T for w in matrices]
        return ascend(system.plan, transposed, r, list(slopes), operator.mul, coordinate, aux)

    def solve_down(_: object, rhs: Solution) -> Solution:
        return descend(system.plan, matrices, rhs[0], slopes, rhs[1], t_x, t_o)

    n = x.shape[-1]
    r = [
        jnp.broadcast_to(dw.T @ h + db, (dw.shape[1], n))
        for (dw, db), h in zip(d_weights, hs, strict=True)
    ]
    solution = jax.lax.custom_linear_solve(matvec, _tied((r, dy)), solve_up, solve_down)
    return (zs, x), solution


def _tied(parts: Solution) -> Solution:
    """`parts`, each of them depending on all of them as far as JAX can tell.

    JAX transposes a linear solve only where all of its right-hand side is unknown together, but
    where just y or some of the weights are differentiated, part of it is known. The compiler
    removes what this adds.
    """
    total = sum(jnp.sum(part) for part in jax.tree.leaves(parts))
    return jax.tree.map(lambda part: part + jnp.where(False, total, 0), parts)


def forward_with_score(
    conditioner: masked.Conditioner, transformer: Transformer, x: Array, score: Array
) -> tuple[Array, Array, Array]:
    """y_k = t(x_k; theta_k(x_<k)), the log-determinant, and the score of the density of y.

    By the formula of `flowvi.bijectors.score` that is the walk down alone: its state is known from
    the pass forward. Leading axes of x and of the context broadcast; no gradient flows through the
    score.
    """
    network, context = conditioner.network, conditioner.context
    order = network.order
    inner = x if order is None else x[..., np.asarray(order)]
    zs = masked.states(network, conditioner.params, inner, context)
    batch, size = zs[-1].shape[:-1], network.event_size
    theta = zs[-1].reshape(*batch, size, network.num_params)
    y, log_det = transformer(theta).forward_and_log_det(inner)

    def columns(rows: Array) -> Array:
        rows = jnp.broadcast_to(rows, (*batch, rows.shape[-1])).reshape(-1, rows.shape[-1])
        return jax.lax.stop_gradient(rows).T

    score = score if order is None else score[..., np.asarray(order)]
    matrices = jax.lax.stop_gradient([w for w, _ in masked.weights(network, conditioner.params)])
    plan = groups(network, num_groups(network, matrices[0].dtype))
    system = _System(network, transformer, plan)
    out = _pull_back(system, matrices, [columns(z) for z in zs], columns(inner), columns(score))
    new = out.T.reshape(*batch, size)
    if order is not None:
        back = np.argsort(order)
        y, new = y[..., back], new[..., back]
    return y, log_det.sum(-1), jax.lax.stop_gradient(new)


def _pull_back(
    system: _System, matrices: list[Array], zs: list[Array], x: Array, score: Array
) -> Array:
    """J^-T (score - gradient of the log-determinant), of shape [D, n]."""

    def log_det(o: Array, x: Array) -> Array:
        return system.transformer(system.parameters(o)).forward_log_det_jacobian(x)

    ones = jnp.ones_like(x)
    t_o, t_x = jax.vjp(system.forward, zs[-1], x)[1](ones)
    g_o, g_x = jax.vjp(log_det, zs[-1], x)[1](ones)
    rhs = [jnp.zeros_like(z) for z in zs[:-1]] + [-g_o]
    slopes = system.slopes(zs)
    return descend(system.plan, matrices, rhs, slopes, score - g_x, t_x, t_o)[1]


def num_groups(network: masked.MaskedNetwork, dtype: DTypeLike) -> int:
    """How many groups to cut the coordinates into.

    Each is a loop of its own in the program, and takes a fifth of a second to compile, twice that
    in a gradient. It pays where weight matrices outgrow the caches: at 122 units and in double
    precision, four groups save a quarter of a walk; in single precision, nothing.
    """
    if max(network.hidden_sizes, default=0) ** 2 * np.dtype(dtype).itemsize < GROUPED:
        return 1
    return max(1, min(4 if network.event_size < 128 else 8, network.event_size // 8))


def inverse_and_log_det(
    conditioner: masked.Conditioner, transformer: Transformer, y: Array
) -> tuple[Array, Array]:
    """The inverse of y_k = t(x_k; theta_k(x_<k)) and the log-determinant of its Jacobian.

    The transformer t is static and hashable. Leading axes of y and of the context broadcast.
    """
    network, context = conditioner.network, conditioner.context
    weights = masked.weights(network, conditioner.params)
    columns = [(w, b[:, None]) for w, b in weights]
    batch = jnp.broadcast_shapes(y.shape[:-1], () if context is None else context.shape[:-1])
    n = math.prod(batch)
    if context is not None:
        term = masked.context_term(conditioner.params, context)
        term = jnp.broadcast_to(term, (*batch, term.shape[-1])).reshape(n, term.shape[-1])
        columns[0] = (columns[0][0], columns[0][1] + term.T)
    dtype = jnp.result_type(y, *(w for w, _ in weights))
    columns = jax.tree.map(lambda leaf: leaf.astype(dtype), columns)
    rows = jnp.broadcast_to(y, (*batch, network.event_size)).reshape(n, network.event_size)
    if network.order is not None:
        rows = rows[:, np.asarray(network.order)]
    system = _System(network, transformer, groups(network, num_groups(network, dtype)))
    zs, x = _solve(system, tuple(columns), rows.T.astype(dtype))
    theta = system.parameters(zs[-1])
    slopes = transformer(theta).forward_log_det_jacobian(x)
    # Rows first, and kept so: along the leading axis XLA's processor backend sums so slowly that it
    # would be a fifth of the whole.
    log_det = -jax.lax.optimization_barrier(slopes.T).sum(-1)
    x = x.T if network.order is None else x.T[:, np.argsort(network.order)]
    return x.reshape(*batch, network.event_size), log_det.reshape(batch)
