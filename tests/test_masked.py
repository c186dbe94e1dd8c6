"""Masks are proved right by the Jacobian of the network, not by comparing masks with themselves."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowvi import masked, masks
from flowvi.networks import MADE
from flowvi.testing import perturbed


def random_params(network, seed=0):
    """Parameters without zeros, so that only a mask can take a connection away."""
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: np.float32(rng.normal(scale=2**0.5, size=a.shape)), shapes)


def dependence(network, seed=0, context=None):
    """[D, D] booleans: does any parameter of output i depend on input j?"""
    x = np.random.default_rng(seed).normal(size=(20, network.event_size)).astype(np.float32)

    @jax.jit
    def run(params):
        conditioner = network.bind(params, context)
        return jnp.abs(jax.vmap(jax.jacfwd(conditioner))(x)).max((0, 2)) > 0

    return np.asarray(run(random_params(network, seed)))


sizes = st.lists(st.integers(1, 12), max_size=3).map(tuple)


@settings(max_examples=8)
@given(st.data(), st.integers(1, 7), sizes, st.booleans())
def test_jacobian_is_strictly_triangular_in_the_order(data, event_size, hidden_sizes, has_context):
    order = tuple(data.draw(st.permutations(range(event_size))))
    network = masked.MaskedNetwork(
        event_size, hidden_sizes, 2, context_size=3 if has_context else None, order=order
    )
    seen = dependence(network, context=np.ones(3) if has_context else None)
    allowed = np.zeros((event_size, event_size), bool)
    for k, coordinate in enumerate(order):
        allowed[coordinate, list(order[:k])] = True
    assert not (seen & ~allowed).any()


@pytest.mark.parametrize("hidden_sizes", [(), (6,), (7, 13), (40, 6, 40)])
@pytest.mark.parametrize("context_size", [None, 2])
def test_no_connection_is_lost_where_layers_are_wide_enough(hidden_sizes, context_size):
    size = 6 if context_size is None else 7
    hidden_sizes = tuple(max(h, size) for h in hidden_sizes)
    network = masked.MaskedNetwork(6, hidden_sizes, 1, context_size=context_size)
    context = None if context_size is None else np.ones(2)
    assert (dependence(network, context=context) == np.tri(6, k=-1, dtype=bool)).all()


@pytest.mark.parametrize(("hidden_sizes", "count"), [((), 3), ((2,), 7), ((30, 3, 24), 2)])
def test_blocks_change_nothing(monkeypatch, hidden_sizes, count):
    network = masked.MaskedNetwork(7, hidden_sizes, 2, context_size=2, order=(3, 1, 4, 0, 5, 2, 6))
    params, context = random_params(network), np.linspace(-1, 1, 8, dtype=np.float32).reshape(4, 2)
    x = np.random.default_rng(1).normal(size=(4, 7)).astype(np.float32)

    def value_and_derivatives(params, context):
        def total(params, x, context):
            return jnp.sum(jnp.sin(network.bind(params, context)(x)))

        arguments = params, x, context
        gradient = jax.grad(total, argnums=(0, 1, 2))(*arguments)
        curvature = jax.jvp(jax.grad(total, argnums=1), arguments, gradient)[1]
        return network.bind(params, context)(x), gradient, curvature

    whole, *derivatives = jax.jit(value_and_derivatives)(params, context)
    # Values are cut by columns, derivatives by blocks.
    monkeypatch.setattr(masked, "num_blocks", lambda network: count)
    monkeypatch.setattr(masked, "num_column_blocks", lambda rows, columns: min(count, columns))
    # A function of its own, for what is traced already would be found again.
    cut, *cut_derivatives = jax.jit(lambda *a: value_and_derivatives(*a))(params, context)
    np.testing.assert_allclose(cut, whole, rtol=1e-5, atol=1e-5)
    for a, b in zip(jax.tree.leaves(cut_derivatives), jax.tree.leaves(derivatives), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_wide_layers_are_cut_into_blocks():
    network = masked.MaskedNetwork(5, (512, 600), 1)
    assert masked.num_blocks(network) == 2
    assert (dependence(network) == np.tri(5, k=-1, dtype=bool)).all()


def test_every_output_depends_on_the_context_nonlinearly():
    network = masked.MaskedNetwork(3, (8, 8), 2, context_size=2)
    params = random_params(network)
    hessian = jax.jit(jax.hessian(lambda c: network.bind(params, c)(np.ones(3))))
    assert (np.abs(hessian(np.ones(2))).max((1, 2, 3)) > 1e-3).all()


def test_narrow_layers_keep_the_ends():
    seen = dependence(masked.MaskedNetwork(9, (3,), 1))
    assert seen[1:, 0].all()
    assert seen[8, :8].all()


def test_degrees_are_sorted_and_even():
    degrees = masks.hidden_degrees(5, 10, context=False)
    assert sorted(degrees) == list(degrees)
    assert set(np.bincount(degrees)[1:]) <= {2, 3}


@pytest.mark.parametrize("event_size", [1, 4])
def test_a_new_network_returns_zero(event_size):
    for hidden_sizes in [(), (5,), (5, 5)]:
        network = masked.MaskedNetwork(event_size, hidden_sizes, 3, context_size=2)
        bind = lambda key, n=network: n.bind(n.init(key), np.ones((7, 2)))  # noqa: E731
        x = np.ones((7, event_size), np.float32)
        theta = jax.jit(lambda key, b=bind, x=x: b(key)(x))(jax.random.key(0))
        assert theta.shape == (7, event_size, 3)
        assert (theta == 0).all()


def test_leading_axes_of_x_and_context_broadcast():
    network = masked.MaskedNetwork(3, (8,), 2, context_size=4)
    params = random_params(network)
    rng = np.random.default_rng(0)
    x, context = rng.normal(size=(5, 1, 3)), rng.normal(size=(6, 4))
    run = jax.jit(lambda p, c, x: network.bind(p, c)(x))
    theta, alone = run(params, context, x), run(params, context[2], x[4, 0])
    np.testing.assert_allclose(np.asarray(theta)[4, 2], alone, rtol=1e-5, atol=1e-6)
    assert theta.shape == (5, 6, 3, 2)


def test_units_have_the_same_scale_at_every_width():
    x = np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32)

    def root_mean_square(width):
        network = masked.MaskedNetwork(8, (width, width), 1, activation="tanh")
        start = jax.jit(network.init)(jax.random.key(0))
        run = jax.jit(lambda params: network.bind(params)(x)[:, 1:])
        theta = [run(perturbed(start, 1.0, seed)) for seed in range(8)]
        return float(np.sqrt(np.mean(np.stack(theta) ** 2)))

    assert 0.8 < root_mean_square(256) / root_mean_square(32) < 1.25


def test_conditioner_is_a_pytree_with_static_description():
    network = masked.MaskedNetwork(3, (8,), 2)
    conditioner = network.bind(jax.jit(network.init)(jax.random.key(0)))
    assert repr(conditioner) == repr(network)
    assert len(jax.tree.leaves(conditioner)) == 4
    assert jax.jit(lambda c, x: c(x))(conditioner, np.ones(3)).shape == (3, 2)
    assert network == masked.MaskedNetwork(3, [8], 2)
    assert hash(network) == hash(masked.MaskedNetwork(3, [8], 2))


def test_haiku_module_is_the_same_network():
    def forward(x, context):
        return MADE(3, [8, 5], 2, context_size=4, order=[2, 0, 1])(x, context)

    transformed = hk.without_apply_rng(hk.transform(forward))
    x, context = np.ones((6, 3)), np.ones((6, 4))
    flat = jax.jit(transformed.init)(jax.random.key(0), x, context)
    network = masked.MaskedNetwork(3, (8, 5), 2, context_size=4, order=(2, 0, 1))
    shapes = {k: v.shape for k, v in flat["made"].items()}
    assert shapes["layers_0_w"] == (3, 8)
    assert len(shapes) == len(jax.tree.leaves(jax.eval_shape(network.init, jax.random.key(0))))
    flat = jax.tree.map(lambda a: np.asarray(a) + 0.5, flat)["made"]
    layers = tuple({k: flat[f"layers_{i}_{k}"] for k in "wb"} for i in range(3))
    bound = network.bind({"layers": layers, "context": flat["context"]}, context)
    theta = jax.jit(transformed.apply)({"made": flat}, x, context)
    np.testing.assert_allclose(theta, jax.jit(lambda b: b(x))(bound), rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"event_size": 0}, ValueError, r"`event_size` must be a positive integer; got 0"),
        ({"event_size": 2.0}, TypeError, r"`event_size` must be a positive integer; got 2.0"),
        ({"hidden_sizes": (4, 0)}, ValueError, r"`hidden_sizes` must be a sequence of positive"),
        ({"hidden_sizes": 4}, TypeError, r"`hidden_sizes` must be a sequence of positive"),
        ({"num_params": -1}, ValueError, r"`num_params` must be a positive integer; got -1"),
        ({"context_size": 0}, ValueError, r"`context_size` must be a positive integer; got 0"),
        ({"order": (0, 0, 1)}, ValueError, r"`order` must hold each of 0, ..., 2 once; got \(0, 0"),
        ({"order": (0.0, 1, 2)}, TypeError, r"`order` must hold each of 0, ..., 2 once"),
        ({"activation": "swoosh"}, ValueError, r"`activation` must be a function or one of elu,"),
    ],
)
def test_bad_descriptions(arguments, error, message):
    good = {"event_size": 3, "hidden_sizes": (4,), "num_params": 2}
    with pytest.raises(error, match=message):
        masked.MaskedNetwork(**{**good, **arguments})


def test_bad_inputs():
    plain = masked.MaskedNetwork(3, (4,), 2)
    contextual = masked.MaskedNetwork(3, (4,), 2, context_size=2)
    with pytest.raises(ValueError, match=r"`x` must have a shape that ends in \(3,\)"):
        plain.bind(random_params(plain))(np.ones(4))
    with pytest.raises(ValueError, match="`context` must be None for a network without"):
        plain.bind(random_params(plain), np.ones(2))
    with pytest.raises(
        ValueError, match=r"`context` must have a shape that ends in \(2,\); got No"
    ):
        contextual.bind(random_params(contextual))
    with pytest.raises(
        ValueError, match=r"`context` must have a shape that ends in \(2,\) for this"
    ):
        contextual.bind(random_params(contextual), np.ones(3))
