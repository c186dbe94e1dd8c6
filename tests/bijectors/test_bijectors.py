"""What the properties do not say: how our bijectors live with Haiku, Distrax, and bad arguments."""

import functools

import distrax
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi.bijectors import Coupling, Dense, LowRank, Stack, Units
from flowvi.masked import MaskedNetwork
from flowvi.testing import perturbed
from flowvi.testing.trial import cycle
from flowvi.transformers import Affine, ScaledSpline, Spline

KEY = jax.random.key(0)
NETWORK = MaskedNetwork(3, (8,), 2)
X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


@functools.cache
def params(network=NETWORK, seed=0):
    return perturbed(jax.jit(network.init)(KEY), 0.3, seed)


def layer(seed=0, cls=fv.IAF):
    return cls(NETWORK.bind(params(seed=seed)))


def waves(stays):
    return jnp.stack([stays, jnp.sin(stays)], -1)


def coupling(conditioner=waves, **options):
    return Coupling(conditioner, Affine(), event_size=3, **options)


@jax.jit
def both(bijector, x):
    return *bijector.forward_and_log_det(x), *bijector.inverse_and_log_det(x)


def agree(first, second, rtol=1e-5):
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("odd", [False, True])
def test_coupling_is_the_masked_coupling_of_distrax(odd):
    def conditioner(x):
        # x_0 and x_2 where x_1 moves, or x_1 and a zero that stands for no coordinate.
        theta = waves(x[..., ::2]) if odd else waves(jnp.stack([x[..., 1], 0 * x[..., 1]], -1))
        return theta[..., [0, 0, 0] if odd else [0, 0, 1], :]

    ours = coupling(odd=odd)
    mask = np.arange(3) % 2 == (not odd)
    agree(both(ours, X), both(distrax.MaskedCoupling(mask, conditioner, Affine()), X), 1e-6)
    assert ours.same_as(coupling(odd=odd))
    assert not ours.same_as(coupling(odd=not odd))


@pytest.mark.parametrize("cls", [fv.IAF, fv.MAF])
@pytest.mark.parametrize("bind", [True, False])
def test_a_haiku_module_inside_of_transform(cls, bind):
    def cycle(x):
        made = fv.MADE(3, [8], 2)
        bijector = cls(made.bind() if bind else made)
        y, log_det = bijector.forward_and_log_det(x)
        return bijector.inverse(y), bijector.inverse_and_log_det(y)[1] + log_det

    transformed = hk.without_apply_rng(hk.transform(cycle))
    flat = jax.tree.map(lambda a: np.asarray(a) + 0.3, jax.jit(transformed.init)(KEY, X))
    assert set(flat) == {"made"}
    agree(jax.jit(transformed.apply)(flat, X), (X, np.zeros(4)))


def test_maf_is_the_inverse_of_iaf():
    np.testing.assert_array_equal(
        both(layer(cls=fv.MAF), X)[2], jax.jit(lambda b: b.forward(X))(layer())
    )
    assert layer(cls=fv.MAF).name == "MAF"
    shared = NETWORK.bind(params())
    assert fv.MAF(shared).same_as(distrax.Inverse(fv.IAF(shared)))
    assert not fv.MAF(shared).same_as(layer(1, fv.MAF))
    assert not fv.IAF(shared).same_as(fv.IAF(shared, Affine(max_log_scale=1.0)))


def test_inside_of_stock_distrax():
    @jax.jit
    def run(layers):
        base = distrax.Independent(distrax.Normal(jnp.zeros(3), jnp.ones(3)), 1)
        chain = distrax.Chain([layers[0], distrax.Inverse(layers[1]), fv.Permutation([2, 0, 1])])
        flow = distrax.Transformed(base, chain)
        x, log_prob = flow.sample_and_log_prob(seed=KEY, sample_shape=(5,))
        blocked = distrax.Block(layers[0], 1)
        return flow.log_prob(x), log_prob, *blocked.forward_and_log_det(jnp.ones((4, 2, 3)))

    log_prob, expected, y, log_det = run([layer(0), layer(1)])
    np.testing.assert_allclose(log_prob, expected, atol=1e-4)
    assert y.shape == (4, 2, 3)
    assert log_det.shape == (4,)


@pytest.mark.parametrize("pattern", [1, 2])
def test_chain_scans_layers_of_one_structure(pattern):
    turn = [fv.Permutation([2, 1, 0])] * (pattern - 1)

    @jax.jit
    def run(layers):
        bijectors = [b for each in layers for b in (each, *turn)]
        ours, theirs = fv.Chain(bijectors), distrax.Chain(bijectors)
        assert [type(b) for b in ours.bijectors] == [Stack]
        assert ours.bijectors[0].num_layers == 3
        second = distrax.Chain(bijectors[pattern : 2 * pattern])
        return [
            (*both(ours, X), ours.bijectors[0].layer(1).forward(X)),
            (*both(theirs, X), second.forward(X)),
        ]

    agree(*run([layer(0), layer(1), layer(2)]))


def test_chain_keeps_what_cannot_be_stacked():
    different = [layer(0), fv.Permutation([2, 1, 0]), coupling()]
    assert fv.Chain(different).bijectors == different
    lambdas = [fv.IAF(lambda x: jnp.stack([x * 0, x * 0], -1)) for _ in range(3)]
    assert fv.Chain(lambdas).bijectors == lambdas


def test_chain_does_not_copy_a_shared_context():
    network = MaskedNetwork(3, (8,), 2, context_size=2)

    def run(params):
        context = jnp.ones((1000, 2))
        chain = fv.Chain([fv.IAF(network.bind(each, context)) for each in params])
        shapes = [leaf.shape for leaf in jax.tree.leaves(chain)]
        assert shapes.count((1000, 2)) == 1
        return chain.forward(jnp.ones(3))

    assert jax.eval_shape(run, [params(network, i) for i in range(4)]).shape == (1000, 3)


def test_program_does_not_grow_with_the_number_of_layers():
    def size(num_layers):
        family = fv.iaf(3, num_layers=num_layers, hidden_sizes=[8], transformer="affine")
        shapes = jax.eval_shape(family.init, KEY)
        loss = lambda p, x: family.distribution(p).log_prob(x).sum()  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(shapes, np.ones((4, 3)))).count(" = ")

    assert size(32) == size(4)


@pytest.mark.parametrize(
    "transformer", [Affine(), Spline(), ScaledSpline(max_log_scale=1.0), Spline(3, 2.0)]
)
def test_transformers_are_the_identity_at_zero_and_bounded(transformer):
    run = jax.jit(lambda theta, x: transformer(theta).forward_and_log_det(x))
    x = np.linspace(-6, 6, 50, dtype=np.float32)
    agree(run(np.zeros((50, transformer.num_params), np.float32), x), (x, 0 * x))
    theta = 100 * np.random.default_rng(0).normal(size=(50, transformer.num_params))
    assert abs(run(theta.astype(np.float32), x)[1]).max() < 10


def test_spline_has_identity_tails():
    theta = np.random.default_rng(0).normal(size=(3, Spline().num_params)).astype(np.float32)
    x = np.array([-7.0, 5.0, 1e4], np.float32)
    np.testing.assert_array_equal(jax.jit(lambda t: Spline()(t).forward(x))(theta), x)


class TestUnits:
    """The map into the data's units and support."""

    INF = np.inf
    LOWER = np.array([-INF, 0.0, -INF, -1.0], np.float32)
    UPPER = np.array([INF, INF, 0.0, 3.0], np.float32)

    def units(self):
        shift, scale = np.array([[1.0, 0.5, -1.0, 0.2], [2.0, 0.5, 1.0, 3.0]], np.float32)
        return Units(shift, scale, self.LOWER, self.UPPER)

    def test_never_reaches_a_bound(self):
        @jax.jit
        @jax.vmap
        def run(x):
            y, pull = jax.vjp(self.units().forward, x)
            return y, *pull(jnp.ones(4))

        y, slopes = run(np.float32([-1e4, -100.0, 1.0, 100.0, 1e4])[:, None] * np.ones(4))
        assert ((y > self.LOWER) & (y < self.UPPER)).all()
        assert np.isfinite(y).all()
        assert np.isfinite(slopes[2]).all()

    def test_density_outside_is_zero_and_nan_stays_nan(self):
        y = np.tile(np.float32([0.0, 1.0, -1.0, 0.0]), (5, 1))
        y[range(5), [1, 2, 3, 1, 1]] = [-1.0, 1.0, 3.5, 0.0, np.nan]
        x, log_det = jax.jit(self.units().inverse_and_log_det)(y)
        np.testing.assert_array_equal(log_det[:4], -np.inf)
        assert np.isnan(x[4, 1])


def test_arrays_of_integers_are_permutations():
    drawn = jax.random.permutation(KEY, 5)
    for given in (drawn, np.asarray(drawn), drawn.tolist(), list(drawn)):
        assert fv.Permutation(given).permutation == tuple(drawn.tolist())
    network = MaskedNetwork(3, np.array([4, 5]), 2, order=jnp.array([2, 0, 1]))
    assert network == MaskedNetwork(3, (4, 5), 2, order=(2, 0, 1))
    assert hash(fv.maf(np.int64(2), hidden_sizes=jnp.array([4]))) == hash(
        fv.maf(2, hidden_sizes=[4])
    )


def test_reprs_are_short():
    shift, scale = np.zeros(3), np.ones(3)
    shown = "MaskedNetwork(event_size=3, hidden_sizes=(8,), num_params=2, context_size=None, "
    shown += "activation='silu', order=None), Affine(max_log_scale=5.0)"
    chain = fv.Chain([layer(0), layer(1), fv.Permutation([2, 0, 1])])
    flow = fv.FlowDistribution(distrax.MultivariateNormalDiag(shift, scale), coupling())
    expected = {
        layer(): f"IAF({shown})",
        layer(cls=fv.MAF): f"MAF({shown})",
        chain: f"Chain([Stack(2 x IAF({shown})), Permutation((2, 0, 1))])",
        jax.jit(fv.LULinear)(np.zeros((3, 3)), shift): "LULinear(event_size=3)",
        Units(shift, scale): "Units(event_shape=(3,))",
        TestUnits().units(): "Units(event_shape=(4,), bounded)",
        Dense(shift, np.eye(3), np.eye(3), 0.0): "Dense(event_size=3)",
        LowRank(shift, scale, np.eye(3)[:, :1], scale[:1]): "LowRank(event_size=3, rank=1)",
    }
    for bijector, text in expected.items():
        assert repr(bijector) == text
    assert repr(coupling()).startswith("Coupling(<function waves at")
    assert repr(flow).startswith(
        "FlowDistribution(batch_shape=(), event_shape=(3,), bijector=Coupling("
    )
    assert len(repr(fv.Permutation(range(1000)))) < 140


def test_ranks_are_not_promoted():
    one, eye = np.ones(3, np.float32), np.eye(3, dtype=np.float32)
    affine = Dense(one, eye, eye, one[0]), LowRank(one, one, eye[:, :1], one[:1]), Units(one, one)
    with jax.numpy_rank_promotion("raise"):
        for bijector in (layer(), layer(cls=fv.MAF), coupling(), *affine):
            y, *_ = jax.eval_shape(lambda x, b=bijector: cycle(b, x), X)
            assert y.shape == X.shape


def test_a_traced_permutation_is_refused():
    with pytest.raises(TypeError, match=r"`permutation` must hold each of 0, ..., n - 1 once; got"):
        jax.eval_shape(lambda p: fv.Permutation(p).forward(jnp.ones(2)), np.arange(2))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fv.Permutation([0, 2]), ValueError, "`permutation` must hold each of 0, ..., n"),
        (lambda: fv.Permutation([]), ValueError, "`permutation` must hold each of 0, ..., n - 1"),
        (lambda: fv.Permutation(3), TypeError, "`permutation` must hold each of 0, ..., n - 1"),
        (lambda: fv.Permutation(np.ones((1, 1), int)), TypeError, "hold each of 0, ..., n - 1"),
        (lambda: fv.iaf(2**31), ValueError, "`event_size` must be at most 2147483647; got 2147483"),
        (
            lambda: fv.maf(2, num_layers=10**12),
            ValueError,
            "`num_layers` must be at most 2147483647; got 1000000000000",
        ),
        (
            lambda: fv.maf(2, hidden_sizes=[2**31]),
            ValueError,
            "`hidden_sizes` must be a sequence of positive integers of at most 2147483647; got",
        ),
        (lambda: fv.Permutation([0.0, 1.0]), TypeError, "`permutation` must hold each of 0, ...,"),
        (
            lambda: fv.Permutation([1, 0]).forward(np.ones(3)),
            ValueError,
            r"`x` must have a shape that ends in \(2,\) for Permutation; got shape \(3,\)",
        ),
        (lambda: fv.IAF(3), TypeError, "`conditioner` must be callable; got 3"),
        (lambda: fv.MAF(jnp.sin, 3), TypeError, "`transformer` must be callable; got 3"),
        (
            lambda: fv.IAF(lambda x: x).forward(np.ones(3)),
            ValueError,
            r"`conditioner` must return an array of shape \[..., 3, 2\] for x of shape \(3,\)",
        ),
        (
            lambda: fv.IAF(lambda x: np.ones((3, 5))).inverse(np.ones(3)),
            ValueError,
            r"`conditioner` must return an array of shape \[..., 3, 2\].*got shape \(3, 5\)",
        ),
        (
            lambda: layer().forward(np.ones(4)),
            ValueError,
            r"`x` must have a shape that ends in \(3,\)",
        ),
        (
            lambda: layer().inverse(np.ones(4)),
            ValueError,
            r"`y` must have a shape that ends in \(3,\) for IAF",
        ),
        (
            lambda: coupling().inverse(np.ones(4)),
            ValueError,
            r"`y` must have a shape that ends in \(3,\) for Coupling",
        ),
        (
            lambda: coupling(lambda stays: stays).forward(np.ones(3)),
            ValueError,
            r"`conditioner` must return an array of shape \[..., 2, 2\] for x of shape \(2,\)",
        ),
        (lambda: layer().forward(1.0), ValueError, "`event_ndims_in==1`, but the input has only 0"),
        (lambda: fv.Chain([]), ValueError, "The sequence of bijectors cannot be empty"),
        (
            lambda: fv.LULinear(np.ones((2, 3))),
            ValueError,
            r"`matrix` must have shape \[..., D, D",
        ),
        (
            lambda: fv.LULinear(np.ones((2, 2)), np.ones(3)),
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
