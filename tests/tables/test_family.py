"""The family of tables: any order, any holes, what it begins from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

import flowvi as fv
from flowvi.objectives import NegativeLogLikelihood
from flowvi.params import combine, partition
from flowvi.tables import Angle, Category, Integer, Real, Schema, base, heads

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
SCHEMA = Schema.of(
    x=Real(),
    sex=Category(("f", "m")),
    wind=Angle(),
    y=Real(atoms=(0.0,)),
    n=Integer(),
    k=Category((1, 2, 3)),
)
FAMILY = fv.table(SCHEMA, width=8)


def rows(count):
    """Encoded rows with holes, as an encoder would make them."""
    result = np.zeros((count, 7, 4), np.float32)
    result[..., 0] = RNG.normal(size=(count, 7))
    result[:, 1, 0], result[:, 3, 0], result[:, 6, 0] = RNG.integers(0, (2, 2, 3), (count, 3)).T
    result[:, 2, 0] %= 2 * np.pi
    result[:, 5, 1:3] = RNG.uniform(0.01, 1, (count, 2))
    result[result[:, 3, 0] == 1, 4] = np.nan
    result[RNG.uniform(size=(count, 7)) < 0.2] = np.nan
    result[np.isnan(result[:, 3, 0]), 4] = np.nan
    return result


@pytest.fixture(scope="module")
def params():
    """Parameters of which none is at its start."""
    trainable, fixed = partition(jax.jit(FAMILY.init)(KEY))
    leaves, tree = jax.tree.flatten(trainable)
    moved = [np.asarray(x) + 0.5 * RNG.normal(size=x.shape).astype(np.float32) for x in leaves]
    known = dict(fixed["known"].value)
    factor = np.eye(9) + 0.3 * RNG.normal(size=(9, 9))
    covariance = np.eye(10, dtype=np.float32)
    covariance[:9, :9] = factor @ factor.T
    fixed["known"].value = known | {"covariance": covariance}
    return combine(jax.tree.unflatten(tree, moved), fixed)


@jax.jit
def parts(params, x, positions):
    return FAMILY.field_log_probs(params, x, positions)


def test_each_field_sees_those_before_it_and_no_others(params):
    x = rows(40)
    position = np.array([[3, 0, 6, 1, 4, 2, 5]])
    found = np.asarray(parts(params, x, position))
    assert np.isfinite(found).all() and np.all(found[np.isnan(x[..., 0])] == 0)
    for f in range(7):
        other = x.copy()
        there = ~np.isnan(x[:, f, 0])
        other[there, f] = x[there][np.argsort(RNG.uniform(size=there.sum()))][:, f]
        changed = np.asarray(parts(params, other, position))
        moved = np.abs(changed - found).max(0) > 1e-6
        assert not moved[position[0] < position[0, f]].any()
        later = position[0] > position[0, f]
        assert moved[later].all() or not later.any()


def test_rows_are_dealt_out_to_orders(params):
    x = rows(10)
    positions = np.stack([RNG.permutation(7) for _ in range(3)])
    both = np.asarray(parts(params, x, positions))
    each = [np.asarray(parts(params, x, position[None])) for position in positions]
    np.testing.assert_allclose(both, np.stack([each[i % 3][i] for i in range(10)]), atol=1e-4)


def test_orders_of_training():
    """Half of them are the natural one, and a number never stands before what says it is there."""
    draw = jax.jit(lambda key: FAMILY.train_distribution(None, key)[0]._positions)
    for number in range(20):
        positions = np.asarray(draw(jax.random.key(number)))
        assert np.all(np.sort(positions, 1) == np.arange(7))
        assert np.all(positions[:4] == FAMILY.positions) and not np.all(
            positions[4:] == positions[4]
        )
        assert np.all(positions[:, 4] > positions[:, 3])


def test_what_it_begins_from_is_a_normal_in_any_order_with_any_holes():
    size, count = 4, 300
    factor = RNG.normal(size=(size, size)) + np.eye(size)
    z = RNG.normal(size=(count, size)) @ factor.T + 1
    schema = Schema.of({f"c{i}": Real() for i in range(size)})
    family = fv.table(schema, width=4)
    x = np.zeros((count, size, 4), np.float32)
    x[..., 0] = z
    mean, covariance = base.moments(z, None)
    params = family.alone(family.place(family.init(KEY), _Encoder(), x))
    x[RNG.uniform(size=(count, size)) < 0.4] = np.nan
    run = jax.jit(lambda p, x, position: family.field_log_probs(p, x, position).sum(1))
    for position in ([0, 1, 2, 3], [2, 0, 3, 1]):
        found = np.asarray(run(params, x, np.array([position])))
        for row in range(20):
            seen = np.flatnonzero(~np.isnan(x[row, :, 0]))
            if len(seen):
                own = stats.multivariate_normal(mean[seen], covariance[np.ix_(seen, seen)])
                assert abs(own.logpdf(z[row, seen]) - found[row]) < 2e-3


class _Encoder:
    def units(self):
        return np.zeros((4, 3))

    def steps(self):
        return np.zeros((0, 257)), np.zeros((0, 258))


def test_moments_with_holes():
    z = RNG.normal(size=(4000, 3)) @ np.array([[1, 0, 0], [0.8, 0.6, 0], [0.5, 0.5, 0.7]]).T + 2
    whole = base.moments(z, None)
    z[RNG.uniform(size=z.shape) < 0.3] = np.nan
    for one, other in zip(base.moments(z, None), whole, strict=True):
        np.testing.assert_allclose(one, other, atol=0.06)


def test_weights_are_repeated_rows(params):
    x = rows(30)
    counts = RNG.integers(0, 4, 30)
    loss = jax.jit(NegativeLogLikelihood(FAMILY, training=False))
    weight = (counts / counts.mean()).astype(np.float32)
    one = loss(params, KEY, {"x": x, "weight": weight})
    other = loss(params, KEY, {"x": np.repeat(x, counts, 0)})
    assert abs(one / other - 1) < 1e-6
    scores = base.scores(FAMILY.fields, x, np)
    for a, b in zip(
        base.moments(scores, counts.astype(float)),
        base.moments(np.repeat(scores, counts, 0), None),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)


mass_and_slopes = jax.jit(jax.value_and_grad(heads.log_normal_mass, (0, 1)))


@pytest.mark.parametrize("low", [-30.0, -4.0, -1e-3, 3.0, 28.0])
@pytest.mark.parametrize("width", [1e-5, 0.04, 0.06, 2.0])
def test_masses_of_cells(low, width):
    found, slopes = mass_and_slopes(low, width)
    side = 1 if low + width / 2 < 0 else -1
    a, b = sorted((side * low, side * (low + width)))
    truth = stats.norm.logcdf(b) + np.log1p(-np.exp(stats.norm.logcdf(a) - stats.norm.logcdf(b)))
    if width > 1e-4:  # below, that form has no digits left
        assert abs(found - truth) < 2e-3 * max(1, abs(truth) * 1e-2)
    assert np.isfinite(found) and np.isfinite(slopes).all()


def test_conditionals_integrate_to_one(params):
    """Over its values each field has mass 1, given whatever stands before it."""
    theta = RNG.normal(size=30).astype(np.float32)
    z = np.linspace(-60, 60, 400_001)
    row = np.zeros((len(z), 3), np.float32)
    row[:, 0] = z
    size = heads.num_params("real", 1)
    real = jax.jit(lambda row: heads.log_density(theta[:size], 0.3, 1.7, row))
    assert abs(np.exp(np.asarray(real(row), float)).sum() * (z[1] - z[0]) - 1) < 1e-3
    size = heads.num_params("angle", 1)
    angle = jax.jit(lambda row: heads.log_circular(theta[:size], row))
    row = row[:4000]
    row[:, 0] = np.linspace(0, 2 * np.pi, 4000, endpoint=False)
    assert abs(np.exp(np.asarray(angle(row), float)).mean() * 2 * np.pi - 1) < 1e-3
    levels = heads.log_levels(
        jnp.asarray(theta[:4]),
        jnp.log(jnp.array([0.5, 0.3, 0.2, 0.0])),
        jnp.array([0.9, -0.2, 0.0]),
    )
    assert np.isneginf(levels[3]) and abs(special.logsumexp(np.asarray(levels[:3]))) < 1e-5


def test_gradients_are_finite(params):
    x = rows(24)
    gradient = jax.jit(
        jax.grad(lambda t, f: NegativeLogLikelihood(FAMILY)(combine(t, f), KEY, {"x": x}))
    )
    found = gradient(*partition(params))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found) if leaf.size)


def test_parameters_of_double_precision_draw_in_that_of_the_rows(params, x64):
    del x64
    double = jax.tree.map(lambda a: a.astype(a.dtype.str.replace("f4", "f8")), params)
    drawn = jax.eval_shape(lambda p, x: FAMILY.walk(p, KEY, x, False), double, rows(3))
    assert drawn.dtype == np.float32


def test_draws_have_the_masses_that_it_gives(params):
    """Of the categories given a number, within the error of the draws."""
    count = 6000
    x = jnp.full((count, 7, 4), jnp.nan).at[:, 0].set(jnp.array([0.7, 0.0, 0.0, 0.7]))
    drawn = np.asarray(jax.jit(FAMILY.walk, static_argnums=3)(params, KEY, x, False))
    assert np.all(drawn[:, 0] == np.float32(0.7))
    assert np.array_equal(np.isnan(drawn[:, 4]), drawn[:, 3] == 1)
    # The categories come first, given x: so x stands before them.
    order = [0, *(f for f in FAMILY.order if f)]
    grid = np.full((12, 7, 4), np.nan, np.float32)
    grid[:, 0] = 0.7, 0, 0, 0.7
    grid[:, [1, 3, 6], 0] = np.stack(np.unravel_index(np.arange(12), (2, 2, 3)), 1)
    mass = np.exp(np.asarray(parts(params, grid, np.argsort(order)[None]))[:, 1:].sum(1))
    assert abs(mass.sum() - 1) < 1e-5
    code = (6 * drawn[:, 1] + 3 * drawn[:, 3] + drawn[:, 6]).astype(int)
    part = np.bincount(code, minlength=12) / count
    assert np.all(np.abs(part - mass) < 4 * np.sqrt(mass * (1 - mass) / count) + 1 / count)
    assert np.isfinite(drawn[:, [2, 5]]).all()
