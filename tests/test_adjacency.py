"""Flows of a known dependence: what does not depend has no derivative; the solve stays right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi import masked
from flowvi.bijectors.autoregressive import invert_by_passes
from flowvi.testing import perturbed
from flowvi.transformers import Affine
from flowvi.triangular import solve
from tests.tolerances import FLOAT64

#: Nothing stands before x_2 and x_3.
GRAPH = np.array(
    [[0, 0, 0, 1, 0], [1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 0, 0]]
)
CLOSED = GRAPH | (GRAPH @ GRAPH > 0) | (GRAPH @ GRAPH @ GRAPH > 0)
X = np.random.default_rng(0).normal(size=(4, 5))


@pytest.mark.parametrize(("hidden_sizes", "context_size"), [((), None), ((7, 12), 2)])
def test_derivatives_are_zero_where_the_matrix_is_and_the_walk_is_right(
    hidden_sizes, context_size, x64
):
    del x64
    network = masked.MaskedNetwork(5, hidden_sizes, 2, context_size=context_size, adjacency=GRAPH)
    assert network.order == (2, 3, 0, 1, 4)
    params = perturbed(jax.jit(network.init)(jax.random.key(0)), 1.0, 0)
    context = None if context_size is None else X[:, :2]

    @jax.jit
    def run():
        bound = network.bind(params, context)
        one = network.bind(params, None if context is None else context[0])
        loss = lambda inverse: lambda y: jnp.sin(inverse(y)[0]).sum() + inverse(y)[1].sum()  # noqa: E731
        walk = lambda y: solve.inverse_and_log_det(bound, Affine(), y)  # noqa: E731
        passes = lambda y: invert_by_passes(lambda x: Affine()(bound(x)), y)  # noqa: E731
        jacobian = jax.jacfwd(one)(X[0])
        return jacobian, *((f(X), jax.grad(loss(f))(X)) for f in (walk, passes))

    jacobian, got, want = run()
    np.testing.assert_array_equal((abs(jacobian) > 1e-12).any(1), GRAPH == 1)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=FLOAT64, atol=FLOAT64)


@pytest.mark.parametrize(("make", "graph", "num_layers"), [(fv.maf, GRAPH, 1), (fv.iaf, CLOSED, 2)])
def test_a_flow_has_the_pattern_of_its_matrix(make, graph, num_layers):
    family = make(5, adjacency=graph, num_layers=num_layers, hidden_sizes=[8], transformer="affine")
    params = perturbed(jax.jit(family.init)(jax.random.key(0)), 1.0, 0)

    @jax.jit
    def jacobian(x):
        bijector = family.distribution(params).bijector
        return jax.jacfwd(bijector.inverse if make is fv.maf else bijector.forward)(x)

    found = abs(np.asarray(jacobian(X[0].astype(np.float32)))) > 1e-7
    np.testing.assert_array_equal(found, (graph == 1) | np.eye(5, dtype=bool))


def test_what_is_no_graph_is_refused():
    with pytest.raises(ValueError, match=r"acyclic, with zeros .*; got a cycle among .* \[0, 1\]"):
        fv.maf(2, adjacency=[[0, 1], [1, 0]])
    with pytest.raises(ValueError, match="of zeros and ones; got shape"):
        fv.maf(3, adjacency=[[0, 1], [1, 0]])
    with pytest.raises(ValueError, match="of zeros and ones; got"):
        fv.maf(2, adjacency=[[0, 0], [0.5, 0]])
    with pytest.raises(ValueError, match="`mixing` must be None with `adjacency`; got 'lu'"):
        fv.maf(2, adjacency=[[0, 0], [1, 0]], mixing="lu")
    with pytest.raises(ValueError, match=r"`num_layers` must be 1 for an .* not transitive; got 2"):
        fv.maf(5, adjacency=GRAPH, num_layers=2)
    with pytest.raises(ValueError, match=r"`hidden_sizes` must be at least .*, 3; got 2"):
        fv.maf(5, adjacency=GRAPH, hidden_sizes=[2])
    with pytest.raises(ValueError, match="`order` must have each coordinate after those"):
        masked.MaskedNetwork(2, (4,), 2, order=(1, 0), adjacency=[[0, 0], [1, 0]])
