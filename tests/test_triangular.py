"""The walk against D passes: values and derivatives of every order, in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi import masked
from flowvi.bijectors.autoregressive import invert_by_passes
from flowvi.testing import perturbed
from flowvi.transformers import Affine, Spline
from flowvi.triangular import solve, walks

TOLERANCE = 1e-9
AFFINE, SPLINE = Affine(), Spline(num_bins=3)

# event size, hidden sizes, transformer, context size, order, number of groups
CASES = {
    "one coordinate, only a context": (1, (), AFFINE, 2, None, 1),
    "no hidden layer": (5, (), AFFINE, None, (4, 2, 0, 1, 3), 2),
    "narrow layers": (6, (3, 2), AFFINE, 2, None, 3),
    "no unit in a group": (9, (2,), AFFINE, None, None, 9),
    "wide, narrow, wide": (4, (20, 2, 20), SPLINE, 3, (3, 2, 1, 0), 2),
    "uneven groups": (7, (9, 16), AFFINE, None, (3, 1, 4, 0, 5, 2, 6), 3),
}


# Where compiling takes long, two cases that have everything between them.
SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in ("narrow layers", "wide, narrow, wide")]
heavy = pytest.mark.parametrize("case", ["narrow layers", SLOW[1]], indirect=True)


@pytest.fixture(params=CASES)
def case(request, monkeypatch, x64):
    """(fast, slow, params, context, y) of one case; both map (params, context, y)."""
    del x64
    size, hidden_sizes, transformer, context_size, order, num_groups = CASES[request.param]
    monkeypatch.setattr(solve, "num_groups", lambda network, dtype: num_groups)
    network = masked.MaskedNetwork(
        size, hidden_sizes, transformer.num_params, context_size=context_size, order=order
    )
    rng = np.random.default_rng(1)
    params = perturbed(jax.jit(network.init)(jax.random.key(1)), 0.5, 1)
    context = None if context_size is None else rng.normal(size=(4, context_size))
    y = rng.normal(size=(4, size))

    def fast(params, context, y):
        return solve.inverse_and_log_det(network.bind(params, context), transformer, y)

    def slow(params, context, y):
        bound = network.bind(params, context)
        return invert_by_passes(lambda x: transformer(bound(x)), y)

    def with_score(params, context, x, score):
        return solve.forward_with_score(network.bind(params, context), transformer, x, score)

    fast.forward_with_score = with_score
    return fast, slow, params, context, y


def scalar(inverse):
    """A scalar function of both results."""

    def loss(params, context, y):
        x, log_det = inverse(params, context, y)
        return jnp.sin(x).sum() + (log_det**2).sum()

    return loss


def agree(first, second):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        scale = np.abs(b).max() if b.size else 0.0
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE * max(scale, 1e-6))


def both(case, transform, reference=None):
    """Compares both inverses under a transformation, in one program.

    The passes may be transformed by a cheaper way to the same numbers.
    """
    fast, slow, *arguments = case
    reference = transform if reference is None else reference
    agree(*jax.jit(lambda *a: [transform(fast)(*a), reference(slow)(*a)])(*arguments))


def test_values_tangents_and_gradients_of_everything(case):
    def transform(inverse):
        def all_of_it(*arguments):
            directions = jax.tree.map(jnp.cos, arguments)
            values_and_tangents = jax.jvp(inverse, arguments, directions)
            argnums = (0, 2) if arguments[1] is None else (0, 1, 2)
            return values_and_tangents, jax.grad(scalar(inverse), argnums)(*arguments)

        return all_of_it

    both(case, transform)


@heavy
def test_gradients_of_each_argument_alone(case):
    # Of none of them is the gradient of another one wanted, so that much of it is known.
    def transform(inverse):
        return lambda *a: tuple(jax.grad(scalar(inverse), argnum)(*a) for argnum in range(3))

    both(case, transform, lambda inverse: jax.grad(scalar(inverse), (0, 1, 2)))


@heavy
def test_hessian_vector_products_of_parameters_and_inputs(case):
    def transform(inverse):
        def product(params, context, y):
            gradient = jax.grad(lambda p, y: scalar(inverse)(p, context, y), (0, 1))
            directions = jax.tree.map(jnp.cos, (params, y))
            along = lambda y: jnp.vdot(gradient(params, y)[1], directions[1])  # noqa: E731
            return jax.jvp(gradient, (params, y), directions)[1], jax.grad(along)(y)

        return product

    both(case, transform)


@pytest.mark.parametrize("case", ["no hidden layer", *SLOW], indirect=True)
def test_hessian_in_both_nestings(case):
    def hessians(inverse, params, context, y, nestings):
        context = None if context is None else context[0]
        loss = lambda y: scalar(inverse)(params, context, y)  # noqa: E731
        return [outer(jax.jacrev(loss))(y[0]) for outer in nestings]

    def transform(inverse):
        return lambda *a: hessians(inverse, *a, (jax.jacfwd, jax.jacrev))

    def reference(inverse):
        return lambda *a: 2 * hessians(inverse, *a, (jax.jacfwd,))

    both(case, transform, reference)


@heavy
def test_vmap_over_parameters_and_checkpoint(case):
    def transform(inverse):
        def several(params, context, y):
            stacked = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a]), params)
            each = jax.checkpoint(lambda p: jax.grad(scalar(inverse))(p, context, y))
            return jax.vmap(each)(stacked)

        return several

    both(case, transform)


def layer(**options):
    network = masked.MaskedNetwork(3, (8,), 2, **options)
    return network, perturbed(jax.jit(network.init)(jax.random.key(0)), 0.5, 0)


@pytest.mark.parametrize("activation", ["relu", "softplus"])
def test_other_activations(activation, x64):
    del x64
    network, params = layer(activation=activation)
    y = np.random.default_rng(1).normal(size=(3, 3))

    def loss(params, fast):
        bound = network.bind(params)
        if fast:
            x, log_det = solve.inverse_and_log_det(bound, AFFINE, y)
        else:
            x, log_det = invert_by_passes(lambda x: AFFINE(bound(x)), y)
        return (x**2).sum() + log_det.sum()

    agree(*jax.jit(lambda p: [jax.grad(loss)(p, True), jax.grad(loss)(p, False)])(params))


@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3)])
def test_batch_shapes_broadcast_against_the_context(batch):
    network, params = layer(context_size=2)
    y = np.random.default_rng(1).normal(size=(*batch, 3)).astype(np.float32)

    @jax.jit
    def run(params, context):
        layer = fv.IAF(network.bind(params, context), AFFINE)
        x, log_det = layer.inverse_and_log_det(y)
        return x, log_det, layer.forward(x)

    for context_batch in ((), (3,) if batch[-1:] == (3,) else (1,)):
        x, log_det, back = run(params, np.ones((*context_batch, 2), np.float32))
        expected = np.broadcast_shapes(batch, context_batch)
        assert x.shape == (*expected, 3)
        assert log_det.shape == expected
        np.testing.assert_allclose(back, np.broadcast_to(y, back.shape), atol=1e-5)


def test_float32_stays_float32_under_64_bits(x64):
    del x64
    network, params = layer()
    params = jax.tree.map(lambda a: np.asarray(a, np.float32), params)
    x, log_det = jax.eval_shape(
        lambda p: fv.IAF(network.bind(p), AFFINE).inverse_and_log_det(jnp.ones(3, jnp.float32)),
        params,
    )
    assert x.dtype == log_det.dtype == jnp.float32


def test_a_row_with_nan_spoils_no_other():
    network, params = layer()
    y = np.ones((3, 3), np.float32)
    y[1, 0] = np.nan
    x = np.asarray(jax.jit(lambda p: fv.IAF(network.bind(p), AFFINE).inverse(y))(params))
    assert np.isfinite(x[[0, 2]]).all()
    assert np.isnan(x[1]).any()


def test_visible_weights_take_the_walk_and_others_the_passes(monkeypatch):
    calls = []
    original = solve.inverse_and_log_det
    monkeypatch.setattr(
        fv.bijectors.autoregressive.triangular,
        "inverse_and_log_det",
        lambda *a: calls.append(1) or original(*a),
    )
    network, params = layer()
    conditioner, x = network.bind(params), np.ones(3, np.float32)
    jax.eval_shape(fv.IAF(conditioner).inverse, x)
    jax.eval_shape(fv.MAF(conditioner).forward, x)
    assert len(calls) == 2
    jax.eval_shape(fv.IAF(lambda x: conditioner(x)).inverse, x)
    jax.eval_shape(fv.IAF(conditioner, lambda theta: AFFINE(theta)).inverse, x)
    assert len(calls) == 2


def test_groups_cover_every_unit_once():
    network = masked.MaskedNetwork(10, (7, 23), 2)
    plan = walks.groups(network, 4)
    assert plan[0].coordinates[0] == 0
    assert plan[-1].coordinates[1] == 10
    for layer, width in enumerate(network.hidden_sizes):
        slices = [group.units[layer] for group in plan]
        assert slices[0][0] == 0
        assert slices[-1][1] == width
        assert all(a[1] == b[0] for a, b in itertools.pairwise(slices))


def test_the_score_goes_forward_with_the_draws(case):
    fast, slow, params, context, y = case

    def log_prob(params, context, y):
        x, log_det = slow(params, context, y)
        return (jnp.sin(x).sum(-1) + log_det).sum()

    @jax.jit
    def run(params, context, y):
        x, log_det = slow(params, context, y)
        got = fast.forward_with_score(params, context, x, jnp.cos(x))
        return got, (y, -log_det, jax.grad(lambda y: log_prob(params, context, y))(y))

    agree(*run(params, context, y))


def test_groups_are_for_matrices_that_outgrow_the_caches():
    network = masked.MaskedNetwork(61, (122, 122), 2)
    assert solve.num_groups(network, jnp.float64) == 4
    assert solve.num_groups(network, jnp.float32) == 1
