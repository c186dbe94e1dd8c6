"""Contracts of all families, over one list of cases."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi.networks import MLP
from tests.small import AFFINE, SMALL

KEY = jax.random.key(0)

FAMILIES = {
    "iaf": lambda d, **kw: fv.iaf(d, **SMALL, **kw),
    "maf": lambda d, **kw: fv.maf(d, **SMALL, **kw),
    "iaf_affine": lambda d, **kw: fv.iaf(d, **AFFINE, **kw),
    "maf_affine": lambda d, **kw: fv.maf(d, **AFFINE, **kw),
    "maf_lu": lambda d, **kw: fv.maf(d, **SMALL, mixing="lu", **kw),
    "maf_odd": lambda d, **kw: fv.maf(d, **{**SMALL, "num_layers": 3, "hidden_sizes": []}, **kw),
    "coupling": lambda d, **kw: fv.coupling(d, **SMALL, **kw),
    "coupling_affine": lambda d, **kw: fv.coupling(d, **AFFINE, **kw),
    "flow_on_flow": lambda d, **kw: fv.iaf(d, **SMALL, base=fv.maf(d, **SMALL, **kw), **kw),
    "flow_on_normal": lambda d, **kw: fv.maf(d, **SMALL, base=fv.full_rank(d), **kw),
}
NORMALS = {
    "mean_field": fv.mean_field,
    "full_rank": fv.full_rank,
    "standard_normal": fv.standard_normal,
}
ALL = {**FAMILIES, **NORMALS}


def perturbed(params, scale=0.3, seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 1000))
    return jax.tree.map(lambda a: a + scale * jax.random.normal(next(keys), a.shape), params)


@pytest.mark.parametrize("name", ALL)
def test_a_new_family_is_standard_normal(name):
    family = ALL[name](3)
    x = jax.random.normal(KEY, (5, 3))
    expected = fv.standard_normal(3).log_prob({}, x)
    np.testing.assert_allclose(family.log_prob(family.init(KEY), x), expected, rtol=1e-5)
    if name not in NORMALS:
        bijector = family.distribution(family.init(KEY)).bijector
        np.testing.assert_allclose(bijector.forward(x), x, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("event_size", [1, 3])
def test_samples_have_the_density_they_claim(name, event_size):
    family = ALL[name](event_size)
    params = perturbed(family.init(KEY))
    x, log_prob = family.sample_and_log_prob(params, KEY, (4, 2))
    assert x.shape == (4, 2, event_size)
    assert log_prob.shape == (4, 2)
    np.testing.assert_allclose(family.log_prob(params, x), log_prob, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(family.sample(params, KEY, (4, 2)), x, rtol=1e-4, atol=1e-6)
    distribution = family.distribution(params)
    assert distribution.event_shape == family.event_shape == (event_size,)
    assert distribution.batch_shape == ()
    assert distribution.dtype == x.dtype == log_prob.dtype == jnp.float32
    assert family.sample(params, KEY).shape == (event_size,)
    assert family.sample(params, KEY, 0).shape == (0, event_size)
    assert family.log_prob(params, jnp.zeros((0, event_size))).shape == (0,)


@pytest.mark.parametrize("name", ["maf", "iaf_affine", "maf_lu", "coupling", "flow_on_flow"])
def test_context_gives_the_batch_shape(name):
    family = FAMILIES[name](2, context_size=3)
    params = perturbed(family.init(KEY))
    context = jax.random.normal(KEY, (6, 3))
    x, log_prob = family.sample_and_log_prob(params, KEY, 4, context)
    assert family.distribution(params, context).batch_shape == (6,)
    assert x.shape == (4, 6, 2)
    np.testing.assert_allclose(family.log_prob(params, x, context), log_prob, atol=2e-4)
    rows = jnp.stack([family.log_prob(params, x[:, i], context[i]) for i in range(6)], 1)
    np.testing.assert_allclose(rows, log_prob, rtol=1e-4, atol=2e-4)
    assert abs(log_prob - family.log_prob(params, x, jnp.flip(context, 0))).max() > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_families_are_static_and_compile_once(name):
    assert ALL[name](2) == ALL[name](2)
    assert hash(ALL[name](2)) == hash(ALL[name](2))
    assert ALL[name](2) != ALL[name](3)
    count = 0

    def log_prob(family, params, x):
        nonlocal count
        count += 1
        return family.log_prob(params, x)

    compiled = jax.jit(log_prob, static_argnums=0)
    for seed in range(3):
        family = ALL[name](2)
        compiled(family, perturbed(family.init(KEY), seed=seed), jnp.ones((4, 2)))
    assert count == 1


@pytest.mark.parametrize("name", ALL)
def test_nan_in_nan_out(name):
    family = ALL[name](2)
    params = perturbed(family.init(KEY))
    x = jnp.array([[0.1, 0.2], [jnp.nan, 0.2], [0.1, jnp.nan]])
    log_prob = family.log_prob(params, x)
    assert jnp.isfinite(log_prob[0])
    assert jnp.isnan(log_prob[1:]).all()
    if jax.tree.leaves(params):
        broken = jax.tree.map(lambda a: a * jnp.nan, params)
        assert jnp.isnan(family.log_prob(broken, x)).all()


@pytest.mark.parametrize("name", ["maf", "iaf_affine", "maf_lu", "coupling"])
@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_any_finite_parameters_are_accepted(name, scale):
    family = FAMILIES[name](2)
    params = perturbed(family.init(KEY), scale)
    x = jax.random.normal(KEY, (50, 2))
    # A density may underflow to zero; it may not be undefined or infinite.
    log_prob = family.log_prob(params, x)
    assert not jnp.isnan(log_prob).any()
    assert (log_prob < jnp.inf).all()


@pytest.mark.parametrize("name", ["iaf", "coupling_affine", "mean_field", "full_rank"])
def test_units_move_the_density_into_the_data(name):
    family = ALL[name](2)
    params = perturbed(family.init(KEY))
    inf = jnp.inf
    units = {
        "shift": jnp.array([1.0, -1.0]),
        "scale": jnp.array([0.5, 2.0]),
        "lower": jnp.array([0.0, -inf]),
        "upper": jnp.array([inf, inf]),
    }
    placed = family.with_units(params, units)
    x, log_prob = family.sample_and_log_prob(placed, KEY, 100)
    assert (x[:, 0] > 0).all()
    np.testing.assert_allclose(family.log_prob(placed, x), log_prob, rtol=1e-3, atol=1e-3)
    v = jnp.stack([(jnp.log(x[:, 0]) - 1) / 0.5, (x[:, 1] + 1) / 2], 1)
    slope = jnp.log(0.5 * x[:, 0]) + jnp.log(2.0)
    np.testing.assert_allclose(family.log_prob(params, v) - slope, log_prob, rtol=1e-3, atol=1e-3)
    assert family.log_prob(placed, jnp.array([-1.0, 0.0])) == -inf


def integral(family, params, points):
    """The integral of a density over a box that holds its samples, by the midpoint rule."""
    x = np.asarray(family.sample(params, KEY, 10_000), np.float64)
    low, high = x.min(0) - 2 * x.std(0), x.max(0) + 2 * x.std(0)
    steps = (high - low) / points
    axes = [a + h * (np.arange(points) + 0.5) for a, h in zip(low, steps, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, x.shape[1])
    log_prob = family.log_prob(params, jnp.asarray(grid, jnp.float32))
    return np.exp(np.asarray(log_prob, np.float64)).sum() * steps.prod()


@pytest.mark.optimized
@pytest.mark.parametrize("name", ALL)
def test_densities_integrate_to_one(name):
    for event_size, points in ((1, 20_000), (2, 1_200)):
        family = ALL[name](event_size)
        assert abs(integral(family, perturbed(family.init(KEY)), points) - 1) < 1e-3


@pytest.mark.optimized
@pytest.mark.parametrize("name", ["iaf", "maf", "coupling", "maf_lu", "full_rank", "mean_field"])
def test_densities_integrate_to_one_after_training(name):
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 3, 2000)
    x = np.stack([np.cos(angle), np.sin(angle)], 1) * 5 + rng.normal(size=(2000, 2)) * 0.5
    family = ALL[name](2)
    result = fv.fit_density(family, x, key=KEY, num_steps=200, progress=False)
    assert abs(integral(family, result.params, 1_200) - 1) < 1e-3


def test_gradients_reach_every_parameter():
    family = fv.iaf(3, **SMALL, context_size=2, mixing="lu", base=fv.mean_field(3))
    params = perturbed(family.init(KEY))

    def loss(params):
        x, log_prob = family.sample_and_log_prob(params, KEY, 100, jnp.ones(2))
        return (log_prob + jnp.sin(x).sum(-1) + (x**2).sum(-1)).mean()

    for path, gradient in jax.tree_util.tree_leaves_with_path(jax.grad(loss)(params)):
        assert jnp.isfinite(gradient).all(), path
        assert (gradient != 0).any(), path


def test_conditional_owns_the_parameters_of_its_network():
    def encoder(x):
        return hk.nets.MLP([16, 4])(x)

    inner = fv.maf(2, **SMALL, context_size=4)
    networks = [
        fv.conditional(inner, MLP(10, (16,), 4)),
        fv.conditional(inner, hk.without_apply_rng(hk.transform(encoder)), context_shape=(10,)),
        fv.conditional(inner, hk.transform(encoder), context_shape=(10,)),
    ]
    for family in networks:
        params = perturbed(family.init(KEY))
        assert set(params) == {"family", "network", "origin"}
        context = jax.random.normal(KEY, (5, 10))
        x, log_prob = family.sample_and_log_prob(params, KEY, 3, context)
        assert x.shape == (3, 5, 2)
        np.testing.assert_allclose(family.log_prob(params, x, context), log_prob, atol=2e-4)
        features = family.network.apply(params["network"], context)
        np.testing.assert_allclose(
            inner.log_prob(params["family"], x, features), log_prob, atol=2e-4
        )


class TestBadInput:
    """Each complaint comes before anything compiles, in the house's words."""

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda: fv.maf(0), ValueError, "`event_size` must be a positive integer; got 0"),
            (lambda: fv.iaf(2.5), TypeError, "`event_size` must be a positive integer; got 2.5"),
            (
                lambda: fv.maf(2, num_layers=0),
                ValueError,
                "`num_layers` must be a positive integer",
            ),
            (lambda: fv.maf(2, hidden_sizes=[0]), ValueError, "`hidden_sizes` must be a sequence"),
            (lambda: fv.maf(2, context_size=-1), ValueError, "`context_size` must be a positive"),
            (
                lambda: fv.maf(2, transformer="cubic"),
                ValueError,
                "`transformer` must be one of 'affine', 'spline', or a transformer; got 'cubic'",
            ),
            (lambda: fv.maf(2, transformer=3), TypeError, "`transformer` must be one of 'affine'"),
            (lambda: fv.maf(2, mixing="shake"), ValueError, '`mixing` must be "reverse", "lu"'),
            (lambda: fv.maf(2, mixing=[0, 0]), ValueError, "`mixing` must hold each of 0, ..., 1"),
            (lambda: fv.maf(2, activation="no"), ValueError, "`activation` must be a function or"),
            (lambda: fv.maf(2, base="normal"), TypeError, "`base` must be a family, such as"),
            (
                lambda: fv.maf(2, base=fv.mean_field(3)),
                ValueError,
                r"`base` must have event shape \(2,\), that of the flow; got \(3,\)",
            ),
            (
                lambda: fv.maf(2, base=fv.maf(2, context_size=1)),
                ValueError,
                r"`base` must take no context or that of the flow, None; got context shape \(1,\)",
            ),
            (lambda: fv.coupling(0), ValueError, "`event_size` must be a positive integer"),
            (lambda: fv.mean_field(0), ValueError, "`event_size` must be a positive integer"),
            (lambda: fv.full_rank("a"), TypeError, "`event_size` must be a positive integer"),
            (lambda: fv.standard_normal((2, 0)), ValueError, "`event_shape` must be a sequence"),
            (
                lambda: fv.conditional(fv.maf(2), MLP(3, (), 4)),
                ValueError,
                "`family` must take a context; got Flow",
            ),
            (lambda: fv.conditional("maf", MLP(3, (), 4)), TypeError, "`family` must be a family"),
            (
                lambda: fv.conditional(fv.maf(2, context_size=4), MLP(3, (), 5)),
                ValueError,
                r"`network` must return an array of shape \(4,\), the context shape of Flow",
            ),
            (
                lambda: fv.conditional(fv.maf(2, context_size=4), lambda x: x),
                TypeError,
                "`network` must have `init` and `apply`",
            ),
            (
                lambda: fv.conditional(fv.maf(2, context_size=4), hk.transform(lambda x: x)),
                ValueError,
                "`context_shape` must be given for a network that does not know its input shape",
            ),
        ],
    )
    def test_configuration(self, make, error, message):
        with pytest.raises(error, match=message):
            make()

    def test_calls(self):
        family, contextual = fv.maf(2, **SMALL), fv.maf(2, **SMALL, context_size=3)
        params, contextual_params = family.init(KEY), contextual.init(KEY)
        x = jnp.ones((4, 2))
        with pytest.raises(ValueError, match=r"`x` must have a shape that ends in \(2,\) for Flow"):
            family.log_prob(params, jnp.ones((4, 3)))
        with pytest.raises(ValueError, match=r"`context` must be None for Flow.*Perhaps give"):
            family.log_prob(params, x, jnp.ones((4, 3)))
        with pytest.raises(
            ValueError, match=r"`context` must be an array whose shape ends in \(3,"
        ):
            contextual.log_prob(contextual_params, x)
        with pytest.raises(ValueError, match=r"`context` must have a shape that ends in \(3,\)"):
            contextual.sample(contextual_params, KEY, 1, jnp.ones((4, 2)))
        with pytest.raises(ValueError, match=r"`context` must have a shape that ends in \(3,\)"):
            contextual.distribution(contextual_params, jnp.ones(2))
        with pytest.raises(TypeError, match="`family` must be a flow to be given units"):
            fv.standard_normal(2).with_units({}, {})
