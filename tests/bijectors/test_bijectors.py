"""What the laws do not say: how our bijectors live with Haiku, Distrax, and bad arguments."""

import distrax
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi.bijectors import Coupling, Stack, Units
from flowvi.masked import MaskedNetwork
from flowvi.transformers import Affine, Spline

KEY = jax.random.key(0)
NETWORK = MaskedNetwork(3, (8,), 2)


def params(network=NETWORK, seed=0):
    fresh = network.init(KEY)
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    return jax.tree.map(lambda a: a + 0.3 * jax.random.normal(next(keys), a.shape), fresh)


def layer(seed=0, cls=fv.IAF):
    return cls(NETWORK.bind(params(seed=seed)))


def waves(stays):
    return jnp.stack([stays, jnp.sin(stays)], -1)


def coupling(conditioner=waves, **options):
    return Coupling(conditioner, Affine(), event_size=3, **options)


@pytest.mark.parametrize("odd", [False, True])
def test_coupling_is_the_masked_coupling_of_distrax(odd):
    def conditioner(x):
        # x_0 and x_2 where x_1 moves, or x_1 and a zero that stands for no coordinate.
        theta = waves(x[..., ::2]) if odd else waves(jnp.stack([x[..., 1], 0 * x[..., 1]], -1))
        return theta[..., [0, 0, 0] if odd else [0, 0, 1], :]

    ours = coupling(odd=odd)
    theirs = distrax.MaskedCoupling(jnp.arange(3) % 2 == (not odd), conditioner, Affine())
    x = jax.random.normal(KEY, (4, 3))
    for method in ("forward_and_log_det", "inverse_and_log_det"):
        for a, b in zip(getattr(ours, method)(x), getattr(theirs, method)(x), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    assert ours.same_as(coupling(odd=odd))
    assert not ours.same_as(coupling(odd=not odd))


@pytest.mark.parametrize("cls", [fv.IAF, fv.MAF])
@pytest.mark.parametrize("bind", [True, False])
def test_a_haiku_module_inside_of_transform(cls, bind):
    def both(x):
        made = fv.MADE(3, [8], 2)
        bijector = cls(made.bind() if bind else made)
        y, log_det = bijector.forward_and_log_det(x)
        return bijector.inverse(y), bijector.inverse_and_log_det(y)[1] + log_det

    transformed = hk.without_apply_rng(hk.transform(both))
    x = jax.random.normal(KEY, (4, 3))
    flat = jax.tree.map(lambda a: a + 0.3, transformed.init(KEY, x))
    assert set(flat) == {"made"}
    back, total = jax.jit(transformed.apply)(flat, x)
    np.testing.assert_allclose(back, x, atol=1e-5)
    np.testing.assert_allclose(total, 0, atol=1e-5)


def test_maf_is_the_inverse_of_iaf():
    x = jax.random.normal(KEY, (4, 3))
    np.testing.assert_array_equal(layer(cls=fv.MAF).inverse(x), layer().forward(x))
    assert layer(cls=fv.MAF).name == "MAF"
    shared = NETWORK.bind(params())
    assert fv.MAF(shared).same_as(distrax.Inverse(fv.IAF(shared)))
    assert not fv.MAF(shared).same_as(layer(cls=fv.MAF))
    assert not fv.IAF(shared).same_as(fv.IAF(shared, Affine(max_log_scale=1.0)))


def test_inside_of_stock_distrax():
    base = distrax.Independent(distrax.Normal(jnp.zeros(3), jnp.ones(3)), 1)
    chain = distrax.Chain([layer(0), distrax.Inverse(layer(1)), fv.Permutation([2, 0, 1])])
    flow = distrax.Transformed(base, chain)
    x, log_prob = flow.sample_and_log_prob(seed=KEY, sample_shape=(5,))
    np.testing.assert_allclose(flow.log_prob(x), log_prob, atol=1e-4)
    blocked = distrax.Block(layer(0), 1)
    y, log_det = blocked.forward_and_log_det(jnp.ones((4, 2, 3)))
    assert y.shape == (4, 2, 3)
    assert log_det.shape == (4,)


@pytest.mark.parametrize("pattern", [1, 2])
def test_chain_scans_layers_of_one_structure(pattern):
    turn = fv.Permutation([2, 1, 0])
    bijectors = (
        [layer(0), turn, layer(1), turn, layer(2), turn]
        if pattern == 2
        else [
            layer(0),
            layer(1),
            layer(2),
        ]
    )
    ours, theirs = fv.Chain(bijectors), distrax.Chain(bijectors)
    assert [type(b) for b in ours.bijectors] == [Stack]
    assert ours.bijectors[0].num_layers == 3
    x = jax.random.normal(KEY, (4, 3))
    for method in ("forward_and_log_det", "inverse_and_log_det"):
        for a, b in zip(getattr(ours, method)(x), getattr(theirs, method)(x), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        ours.bijectors[0].layer(1).forward(x),
        distrax.Chain(bijectors[pattern : 2 * pattern]).forward(x),
        rtol=1e-5,
    )


def test_chain_keeps_what_cannot_be_stacked():
    different = [layer(0), fv.Permutation([2, 1, 0]), fv.LULinear(jnp.zeros((3, 3)))]
    assert fv.Chain(different).bijectors == different
    lambdas = [fv.IAF(lambda x: jnp.stack([x * 0, x * 0], -1)) for _ in range(3)]
    assert fv.Chain(lambdas).bijectors == lambdas


def test_chain_does_not_copy_a_shared_context():
    network = MaskedNetwork(3, (8,), 2, context_size=2)
    context = jnp.ones((1000, 2))
    chain = fv.Chain([fv.IAF(network.bind(params(network, i), context)) for i in range(4)])
    shapes = [leaf.shape for leaf in jax.tree.leaves(chain)]
    assert shapes.count((1000, 2)) == 1
    assert chain.forward(jnp.ones(3)).shape == (1000, 3)


def test_program_does_not_grow_with_the_number_of_layers():
    def size(num_layers):
        family = fv.iaf(3, num_layers=num_layers, hidden_sizes=[8], transformer="affine")
        shapes = jax.eval_shape(family.init, KEY)
        loss = lambda p, x: family.distribution(p).log_prob(x).sum()  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(shapes, jnp.ones((4, 3)))).count(" = ")

    assert size(32) == size(4)


@pytest.mark.parametrize("transformer", [Affine(), Spline(), Spline(num_bins=3, interval=2.0)])
def test_transformers_are_the_identity_at_zero_and_bounded(transformer):
    x = jnp.linspace(-6, 6, 101)
    y, log_det = transformer(jnp.zeros(transformer.num_params)).forward_and_log_det(x)
    np.testing.assert_allclose(y, x, atol=1e-5)
    np.testing.assert_allclose(log_det, 0, atol=1e-5)
    theta = 100 * jax.random.normal(KEY, (50, transformer.num_params))
    _, log_det = transformer(theta).forward_and_log_det(x[:50])
    assert abs(log_det).max() < 10


def test_spline_has_identity_tails():
    theta = jax.random.normal(KEY, (3, Spline().num_params))
    x = jnp.array([-7.0, 5.0, 1e4])
    np.testing.assert_array_equal(Spline()(theta).forward(x), x)


class TestUnits:
    """The map into the data's units and support."""

    INF = jnp.inf
    LOWER = jnp.array([-INF, 0.0, -INF, -1.0])
    UPPER = jnp.array([INF, INF, 0.0, 3.0])

    def units(self):
        shift, scale = jnp.array([1.0, 0.5, -1.0, 0.2]), jnp.array([2.0, 0.5, 1.0, 3.0])
        return Units(shift, scale, self.LOWER, self.UPPER)

    def test_round_trip_and_log_det(self):
        x = jax.random.normal(KEY, (50, 4))
        y, log_det = self.units().forward_and_log_det(x)
        assert ((y > self.LOWER) & (y < self.UPPER)).all()
        back, inverse = self.units().inverse_and_log_det(y)
        np.testing.assert_allclose(back, x, atol=1e-3)
        np.testing.assert_allclose(inverse, -log_det, atol=1e-3)
        jacobian = jax.vmap(jax.jacfwd(self.units().forward))(x)
        np.testing.assert_allclose(jnp.linalg.slogdet(jacobian)[1], log_det, atol=1e-4)

    @pytest.mark.parametrize("value", [-1e4, -100.0, 100.0, 1e4])
    def test_never_reaches_a_bound(self, value):
        y = self.units().forward(jnp.full(4, value))
        assert ((y > self.LOWER) & (y < self.UPPER)).all()
        assert jnp.isfinite(y).all()
        assert jnp.isfinite(jax.grad(lambda x: self.units().forward(x).sum())(jnp.ones(4))).all()

    def test_density_outside_is_zero_and_nan_stays_nan(self):
        inside = jnp.array([0.0, 1.0, -1.0, 0.0])
        for index, value in ((1, -1.0), (2, 1.0), (3, 3.5), (1, 0.0)):
            assert self.units().inverse_and_log_det(inside.at[index].set(value))[1] == -self.INF
        assert jnp.isnan(self.units().inverse(inside.at[1].set(jnp.nan))[1])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fv.Permutation([0, 2]), ValueError, "`permutation` must hold each of 0, ..., n"),
        (lambda: fv.Permutation([]), ValueError, "`permutation` must hold each of 0, ..., n - 1"),
        (lambda: fv.Permutation(3), TypeError, "`permutation` must hold each of 0, ..., n - 1"),
        (lambda: fv.Permutation([0.0, 1.0]), TypeError, "`permutation` must hold each of 0, ...,"),
        (
            lambda: fv.Permutation([1, 0]).forward(jnp.ones(3)),
            ValueError,
            r"`x` must have a shape that ends in \(2,\) for Permutation; got shape \(3,\)",
        ),
        (lambda: fv.IAF(3), TypeError, "`conditioner` must be callable; got 3"),
        (lambda: fv.MAF(jnp.sin, 3), TypeError, "`transformer` must be callable; got 3"),
        (
            lambda: fv.IAF(lambda x: x).forward(jnp.ones(3)),
            ValueError,
            r"`conditioner` must return an array of shape \[..., 3, 2\] for x of shape \(3,\)",
        ),
        (
            lambda: fv.IAF(lambda x: jnp.ones((3, 5))).inverse(jnp.ones(3)),
            ValueError,
            r"`conditioner` must return an array of shape \[..., 3, 2\].*got shape \(3, 5\)",
        ),
        (
            lambda: layer().forward(jnp.ones(4)),
            ValueError,
            r"`x` must have a shape that ends in \(3,\)",
        ),
        (
            lambda: layer().inverse(jnp.ones(4)),
            ValueError,
            r"`y` must have a shape that ends in \(3,\) for IAF",
        ),
        (
            lambda: coupling().inverse(jnp.ones(4)),
            ValueError,
            r"`y` must have a shape that ends in \(3,\) for Coupling",
        ),
        (
            lambda: coupling(lambda stays: stays).forward(jnp.ones(3)),
            ValueError,
            r"`conditioner` must return an array of shape \[..., 2, 2\] for 2 coordinates that",
        ),
        (lambda: layer().forward(1.0), ValueError, "`event_ndims_in==1`, but the input has only 0"),
        (lambda: fv.Chain([]), ValueError, "The sequence of bijectors cannot be empty"),
        (
            lambda: fv.LULinear(jnp.ones((2, 3))),
            ValueError,
            r"`matrix` must have shape \[..., D, D",
        ),
        (
            lambda: fv.LULinear(jnp.ones((2, 2)), jnp.ones(3)),
            ValueError,
            r"`bias` must have a shape that ends in \(2,\)",
        ),
        (lambda: Affine(max_log_scale=0), ValueError, "`max_log_scale` must be positive; got 0"),
        (lambda: Spline(num_bins=1), ValueError, "`num_bins` must be at least 2; got 1"),
        (lambda: Spline(num_bins=2.5), TypeError, "`num_bins` must be a positive integer"),
        (lambda: Spline(interval=-1), ValueError, "`interval` must be positive; got -1"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
