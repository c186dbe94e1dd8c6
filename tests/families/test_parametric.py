"""Laws of families of a context that is their parameters, over one list of cases."""

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi.networks import MLP
from flowvi.objectives import closed_form
from tests import tolerances

KEY = jax.random.key(0)


def sample_laplace(key, context):
    return context[:2] + jax.random.laplace(key, (2,))


def laplace_density(x, context):
    return -jnp.sum(jnp.abs(x - context[:2])) - 2 * jnp.log(2.0)


CASES = {
    "gaussian": fv.gaussian(2),
    "gaussian_full": fv.gaussian(2, scale="full"),
    "gaussian_fixed": fv.gaussian(2, scale=0.5),
    "gaussian_learned": fv.gaussian(2, scale="learned"),
    "gaussian_image": fv.gaussian((3, 2, 1)),
    "laplace": fv.laplace(2),
    "logistic": fv.logistic(2),
    "gumbel": fv.gumbel(2),
    "bernoulli": fv.bernoulli((2, 3)),
    "continuous_bernoulli": fv.continuous_bernoulli(2),
    "categorical": fv.categorical(2, 4),
    "categorical_scalar": fv.categorical((), 3),
    "one_hot": fv.categorical(2, 4, one_hot=True),
    "mixture": fv.mixture(2, 3, components="predicted"),
    "gamma": fv.from_distrax(
        distrax.Gamma,
        2,
        ("concentration", "rate"),
        constraints={"concentration": "positive", "rate": "positive"},
        reparameterized=True,
    ),
    "custom": fv.custom(
        laplace_density, 2, sampler=sample_laplace, context_shape=2, reparameterized=True
    ),
}
PARAMETRIC = [name for name in CASES if name != "custom"]
DISCRETE = ["bernoulli", "categorical", "categorical_scalar", "one_hot"]
CONTINUOUS = ["gaussian", "gaussian_full", "gaussian_learned", "laplace", "logistic", "gumbel"]


def contexts(name, *batch, scale=1.0, seed=0):
    family = CASES[name]
    return scale * jax.random.normal(jax.random.key(seed), (*batch, *family.context_shape))


@pytest.mark.parametrize("name", CASES)
def test_batch_shape_is_that_of_the_context(name):
    family = CASES[name]
    params = family.init(KEY)
    context = contexts(name, 5, 3)
    distribution = family.distribution(params, context)
    assert distribution.batch_shape == (5, 3)
    assert distribution.event_shape == family.event_shape
    x, log_prob = family.sample_and_log_prob(params, KEY, 4, context)
    assert x.shape == (4, 5, 3, *family.event_shape)
    assert log_prob.shape == (4, 5, 3)
    np.testing.assert_allclose(family.log_prob(params, x, context), log_prob, rtol=1e-4, atol=1e-4)
    rows = jnp.stack([family.log_prob(params, x[:, i], context[i]) for i in range(5)], 1)
    np.testing.assert_allclose(rows, log_prob, rtol=1e-4, atol=1e-4)
    assert family.sample(params, KEY, (), contexts(name)).shape == family.event_shape
    assert family.sample(params, KEY, 0, context).shape == (0, 5, 3, *family.event_shape)


@pytest.mark.parametrize("name", CASES)
def test_rows_do_not_share_noise(name):
    family = CASES[name]
    same = jnp.zeros((50, *family.context_shape))
    x = family.sample(family.init(KEY), KEY, (), same).reshape(50, -1)
    assert len(np.unique(x, axis=0)) > (2 if name in DISCRETE else 49)


@pytest.mark.parametrize("name", PARAMETRIC)
def test_a_dict_of_arguments_is_the_same_as_an_array(name):
    family = CASES[name]
    params = family.init(KEY)
    context = contexts(name, 5)
    named = family.take_apart(context)
    assert set(named) == set(family.arguments)
    for argument, shape in family.arguments.items():
        assert named[argument].shape == (5, *shape)
    x = family.sample(params, KEY, 3, context)
    np.testing.assert_array_equal(family.sample(params, KEY, 3, named), x)
    np.testing.assert_array_equal(
        family.log_prob(params, x, named), family.log_prob(params, x, context)
    )


@pytest.mark.parametrize("name", CASES)
def test_families_are_static(name):
    assert hash(CASES[name]) == hash(CASES[name])
    assert CASES[name] == CASES[name]
    assert len({CASES[each] for each in CASES}) == len(CASES)


@pytest.mark.parametrize("name", [name for name in PARAMETRIC if name != "gamma"])
@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_any_finite_context_is_acceptable(name, scale):
    family = CASES[name]
    params = family.init(KEY)
    context = contexts(name, 50, scale=scale)
    # A density may underflow to zero; it may not be undefined.
    x = family.sample(params, KEY, 3, jnp.zeros_like(context))
    log_prob = family.log_prob(params, x, context)
    assert not jnp.isnan(log_prob).any()
    own = family.sample(params, KEY, 3, context)
    assert jnp.isfinite(own).all()
    # Where it is not zero it has a gradient.
    if scale < 1e3:
        gradient = jax.grad(lambda c: jnp.sum(family.log_prob(params, own, c)))(context)
        assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("name", CASES)
def test_reparameterized_is_honest(name):
    """Samples carry a gradient to every argument, or the family says that they do not."""
    family = CASES[name]
    params = family.init(KEY)
    context = contexts(name, 5)

    def total(context, params):
        return jnp.sum(jnp.sin(family.sample(params, KEY, 20, context).astype(float)))

    gradients = jax.grad(total, argnums=(0, 1))(context, params)
    arrived = all((g != 0).all() for g in jax.tree.leaves(gradients))
    assert arrived is family.reparameterized


@pytest.mark.parametrize("name", [*CONTINUOUS, "continuous_bernoulli", "gamma"])
def test_moments_are_those_of_samples(name):
    family = CASES[name]
    params = family.init(KEY)
    distribution = family.distribution(params, contexts(name, 3))
    x = np.asarray(distribution.sample(seed=KEY, sample_shape=10_000), np.float64)
    error = x.std(0) / 100 * tolerances.STANDARD_ERRORS
    assert (np.abs(x.mean(0) - distribution.mean()) < error).all()
    squares = (x - x.mean(0)) ** 2
    error = squares.std(0) / 100 * tolerances.STANDARD_ERRORS
    assert (np.abs(squares.mean(0) - distribution.variance()) < error).all()


@pytest.mark.parametrize("name", CONTINUOUS)
def test_densities_integrate_to_one(name):
    family = CASES[name]
    params = family.init(KEY)
    context = contexts(name, seed=3)
    axis = np.linspace(-60, 60, 4001)
    fine = np.sinh(axis / 10) * 0.4  # close together where the density is
    step = np.gradient(fine)
    grid = np.stack(np.meshgrid(fine, fine, indexing="ij"), -1)[::4, ::4]
    density = np.exp(np.asarray(family.log_prob(params, jnp.asarray(grid, "float32"), context)))
    weight = 16 * np.outer(step, step)[::4, ::4]
    assert abs((density * weight).sum() - 1) < tolerances.INTEGRAL


@pytest.mark.parametrize("name", ["bernoulli", "categorical"])
def test_probabilities_sum_to_one(name):
    family = {"bernoulli": fv.bernoulli(1), "categorical": fv.categorical(1, 4)}[name]
    context = jax.random.normal(KEY, family.context_shape)
    values = jnp.arange(2 if name == "bernoulli" else 4)[:, None]
    for x in (values, values.astype(float)):
        total = jnp.exp(family.log_prob({}, x, context)).sum()
        np.testing.assert_allclose(total, 1, rtol=1e-5)


class TestOutside:
    """Where there is no probability, the log density is -inf; where there is NaN, NaN."""

    @pytest.mark.parametrize(
        ("family", "values"),
        [
            (fv.bernoulli(1), [0.5, -1.0, 2.0]),
            (fv.continuous_bernoulli(1), [-0.1, 1.1]),
            (fv.categorical(1, 3), [-1.0, 3.0, 1.5]),
        ],
    )
    def test_density(self, family, values):
        context = jnp.zeros(family.context_shape)
        log_prob = family.log_prob({}, jnp.array(values)[:, None], context)
        assert (log_prob == -jnp.inf).all()
        assert jnp.isnan(family.log_prob({}, jnp.array([jnp.nan]), context))

    @pytest.mark.parametrize(
        ("family", "message"),
        [
            (
                fv.bernoulli(2),
                r"`images` must hold only 0 and 1 for BernoulliFamily.*got 0.5 in row 1. Perhaps "
                r"binarise it once, `x > 0.5` .*`fv.continuous_bernoulli`",
            ),
            (fv.continuous_bernoulli(2), r"must hold only numbers from 0 to 1 .*got 2.0 in row 2"),
            (fv.categorical(2, 3), r"must hold only the numbers 0, ..., 2 of classes.*got 0.5"),
        ],
    )
    def test_check(self, family, message):
        inside = np.array([[0, 1], [1, 0]])
        outside = np.array([[0, 1], [1, 0.5], [2, 0]])
        decoder = fv.conditional(family, MLP(3, (), family.context_shape))
        for each in (family, decoder):
            each.check_support(inside)
            with pytest.raises(ValueError, match=message):
                each.check_support(outside, "images")
        fv.gaussian(2).check_support(outside)


class TestContinuousBernoulli:
    LOGITS = np.array([0.0, 1e-30, 1e-6, 1e-3, -0.02, 0.3, 0.499, 0.501, -3.0, 30.0, -80.0])

    def test_the_normaliser_is_accurate(self, x64):
        """Against the integral by Gauss and Legendre's rule."""
        nodes, weights = np.polynomial.legendre.leggauss(200)
        nodes, weights = (nodes + 1) / 2, weights / 2
        eta = self.LOGITS[:, None]
        shifted = np.exp(eta * nodes - np.maximum(eta, 0)) @ weights
        expected = -(np.log(shifted) + np.maximum(eta[:, 0], 0))
        family = fv.continuous_bernoulli(())
        got = family.log_prob({}, jnp.zeros(()), jnp.asarray(self.LOGITS))
        np.testing.assert_allclose(got, expected, rtol=tolerances.FLOAT64, atol=1e-15)
        mean = np.exp(eta * nodes - np.maximum(eta, 0)) @ (weights * nodes) / shifted
        distribution = family.distribution({}, jnp.asarray(self.LOGITS))
        np.testing.assert_allclose(distribution.mean(), mean, rtol=tolerances.FLOAT64)
        square = np.exp(eta * nodes - np.maximum(eta, 0)) @ (weights * nodes**2) / shifted
        np.testing.assert_allclose(distribution.variance(), square - mean**2, rtol=1e-7)

    def test_float32(self):
        family = fv.continuous_bernoulli(())
        with jax.enable_x64(True):
            exact = family.log_prob({}, jnp.full((), 0.3), jnp.asarray(self.LOGITS))
        got = family.log_prob({}, jnp.full((), 0.3), jnp.asarray(self.LOGITS, jnp.float32))
        np.testing.assert_allclose(got, exact, rtol=tolerances.FLOAT32, atol=1e-6)

    def test_samples_invert_the_distribution_function(self):
        family = fv.continuous_bernoulli(())
        logits = jnp.asarray(self.LOGITS, jnp.float32)
        x = np.asarray(family.sample({}, KEY, 20_000, logits))
        assert ((x >= 0) & (x <= 1)).all()
        for eta, column in zip(self.LOGITS, x.T, strict=True):
            points = np.linspace(0.05, 0.95, 7)
            exact = points if abs(eta) < 1e-5 else np.expm1(eta * points) / np.expm1(eta)
            share = (column[:, None] < points).mean(0)
            error = np.sqrt(exact * (1 - exact) / 20_000) + 1e-4
            assert (np.abs(share - exact) < tolerances.STANDARD_ERRORS * error).all(), eta


class TestClosedForm:
    """The KL divergence of a posterior from the prior is found by itself."""

    @pytest.mark.parametrize(
        "name", ["gaussian", "gaussian_full", "gaussian_fixed", "gaussian_image"]
    )
    def test_against_samples(self, name):
        family = CASES[name]
        prior = fv.standard_normal(family.event_shape).distribution({})
        q = family.distribution(family.init(KEY), contexts(name, 4))
        kl = closed_form.kl_divergence(q, prior)
        assert kl.shape == (4,)
        x, log_prob = q.sample_and_log_prob(seed=KEY, sample_shape=10_000)
        terms = np.asarray(log_prob - prior.log_prob(x), np.float64)
        assert (np.abs(kl - terms.mean(0)) < 4 * terms.std(0) / 100).all()

    def test_none_is_made_up(self):
        prior = fv.standard_normal(2).distribution({})
        for name in ("laplace", "logistic", "gumbel"):
            q = CASES[name].distribution({}, contexts(name, 4))
            with pytest.raises(NotImplementedError):
                closed_form.kl_divergence(q, prior)

    def test_full_with_no_correlation_is_diagonal(self):
        loc, scale = jax.random.normal(KEY, (2, 5, 3))
        full = fv.gaussian(3, scale="full")
        rows, columns = np.tril_indices(3)
        factor = jnp.zeros((5, 6)).at[:, rows == columns].set(scale)
        x = jax.random.normal(KEY, (5, 3))
        np.testing.assert_allclose(
            full.log_prob({}, x, {"loc": loc, "factor": factor}),
            fv.gaussian(3).log_prob({}, x, {"loc": loc, "scale": scale}),
            rtol=1e-5,
        )


class TestMixture:
    @pytest.mark.parametrize("scale", ["predicted", "full"])
    def test_density(self, scale):
        family = fv.mixture(2, 3, scale=scale)
        params = family.init(KEY)
        own = {**params["context"], "logits": jnp.array([0.0, 1.0, -1.0])}
        params = {**params, "context": own}
        x, log_prob = family.sample_and_log_prob(params, KEY, (4, 5))
        assert x.shape == (4, 5, 2)
        component = fv.gaussian(2, scale=scale)
        each = jnp.stack(
            [
                component.log_prob({}, x, {n: own[n][k] for n in component.arguments})
                for k in range(3)
            ],
            -1,
        )
        expected = jax.nn.logsumexp(each + jax.nn.log_softmax(own["logits"]), -1)
        np.testing.assert_allclose(log_prob, expected, rtol=1e-4, atol=1e-5)

    def test_gradients(self):
        family = fv.mixture((2, 2), 3)
        params = family.init(KEY)
        x = jax.random.normal(KEY, (50, 2, 2))
        gradients = jax.grad(lambda p: family.log_prob(p, x).sum())(params)
        assert all((g != 0).all() for g in jax.tree.leaves(gradients))
        sampled = jax.grad(lambda p: family.sample(p, KEY, 50).sum())(params)
        assert (sampled["context"]["logits"] == 0).all()
        assert not family.reparameterized
        assert not fv.iaf(2, base=fv.mixture(2, 3)).reparameterized

    def test_it_is_a_base(self):
        flow = fv.iaf(2, num_layers=1, hidden_sizes=[4], base=fv.mixture(2, 3))
        params = flow.init(KEY)
        x, log_prob = flow.sample_and_log_prob(params, KEY, 5)
        np.testing.assert_allclose(flow.log_prob(params, x), log_prob, rtol=1e-4)


class TestCustom:
    def test_parameters_and_context(self):
        def log_density(params, x, context):
            return -0.5 * (x - params["w"] * context) ** 2 - 0.5 * jnp.log(2 * jnp.pi)

        def sampler(params, key, context):
            return params["w"] * context + jax.random.normal(key)

        def init(key):
            return {"w": jax.random.normal(key)}

        family = fv.custom(log_density, (), sampler=sampler, init=init, context_shape=())
        params = family.init(KEY)
        context = jnp.arange(5.0)
        x, log_prob = family.sample_and_log_prob(params, KEY, 2, context)
        assert x.shape == log_prob.shape == (2, 5)
        expected = distrax.Normal(params["own"]["w"] * context, 1.0).log_prob(x)
        np.testing.assert_allclose(log_prob, expected, rtol=1e-5)

    def test_without_a_sampler(self):
        family = fv.custom(lambda x: -jnp.sum(x**2), (2, 2))
        assert family.log_prob({}, jnp.ones((3, 4, 2, 2))).shape == (3, 4)
        with pytest.raises(NotImplementedError, match="`sampler` must be given to draw"):
            family.sample({}, KEY, 3)


class TestFlowsOfFeatures:
    """The base of a flow takes the features too, through a linear layer if need be."""

    @pytest.mark.parametrize("make", [fv.iaf, fv.maf, fv.coupling])
    def test_base(self, make):
        flow = make(
            3, num_layers=2, hidden_sizes=[8], context_size=5, base=fv.gaussian(3, scale="full")
        )
        encoder = fv.conditional(flow, MLP((4, 4), (16,), 5))
        params = encoder.init(KEY)
        context = jax.random.normal(KEY, (6, 4, 4))
        x, log_prob = encoder.sample_and_log_prob(params, KEY, 2, context)
        assert x.shape == (2, 6, 3)
        np.testing.assert_allclose(encoder.log_prob(params, x, context), log_prob, atol=2e-4)
        features = encoder.network.apply(params["network"], context)
        base = flow.base.distribution(params["family"]["base"], features)
        assert base.batch_shape == (6,)
        assert (base.mean() != 0).all()
        # A new flow is its base, whose parameters the encoder reaches at once.
        gradient = jax.grad(
            lambda n: encoder.sample({**params, "network": n}, KEY, (), context).sum()
        )(params["network"])
        assert all((g != 0).any() for g in jax.tree.leaves(gradient))

    def test_another_base_context_without_one_of_the_flow(self):
        with pytest.raises(ValueError, match="`base` must take no context or that of the flow"):
            fv.iaf(3, base=fv.gaussian(3))


class TestConditional:
    def test_both_forms_of_output(self):
        def pair(key):
            return {"w": jax.random.normal(key, (4, 6))}

        def joined(params, x):
            return x @ params["w"]

        def named(params, x):
            loc, scale = jnp.split(x @ params["w"], 2, -1)
            return {"loc": loc, "scale": scale}

        context = jax.random.normal(KEY, (2, 5, 4))
        x = jax.random.normal(KEY, (2, 5, 3))
        results = []
        for apply in (joined, named):
            family = fv.conditional(fv.gaussian(3), (pair, apply), context_shape=4)
            results.append(family.log_prob(family.init(KEY), x, context))
        np.testing.assert_array_equal(*results)

    def test_only_the_loc(self):
        family = fv.conditional(fv.gaussian(3, scale="learned"), MLP(4, (), 3))
        params = family.init(KEY)
        assert params["family"]["scale"].shape == ()
        context = jnp.ones((5, 4))
        np.testing.assert_allclose(family.distribution(params, context).stddev(), 1, rtol=1e-6)


class TestBadInput:
    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (
                lambda: fv.gaussian(2, scale="wide"),
                ValueError,
                '`scale` must be "predicted", "learned", "full" or a positive number; got \'wide\'',
            ),
            (lambda: fv.gaussian(2, scale=0), ValueError, "`scale` must be .*; got 0"),
            (lambda: fv.gaussian(2, scale=None), TypeError, "`scale` must be .*; got None"),
            (lambda: fv.laplace(2, scale="full"), ValueError, "`scale` must be .*; got 'full'"),
            (
                lambda: fv.gaussian((2, 2), scale="full"),
                ValueError,
                '`event_shape` must be that of a vector for `scale="full"`',
            ),
            (lambda: fv.bernoulli(0), ValueError, "`event_shape` must be a sequence of positive"),
            (lambda: fv.categorical(2, 0), ValueError, "`num_classes` must be a positive integer"),
            (lambda: fv.mixture(2, 0), ValueError, "`num_components` must be a positive integer"),
            (lambda: fv.mixture(2, 2, scale=1.0), ValueError, '`scale` must be "predicted" or "fu'),
            (lambda: fv.custom(3, 2), TypeError, "`log_density` must be a function; got 3"),
            (
                lambda: fv.custom(lambda x: x, 2),
                ValueError,
                r"`log_density` must return an array of shape \(\) for one event; got Shape",
            ),
            (
                lambda: fv.custom(jnp.sum, 2, sampler=lambda key: jnp.zeros(3)),
                ValueError,
                r"`sampler` must return an array of shape \(2,\) for one event",
            ),
            (
                lambda: fv.custom(jnp.sum, 2, reparameterized=True),
                ValueError,
                "`sampler` must be given for a reparameterised family",
            ),
            (
                lambda: fv.from_distrax(3, 2, ("loc",)),
                TypeError,
                "`constructor` must be a class or a function; got 3",
            ),
            (
                lambda: fv.from_distrax(distrax.Normal, 2, "loc"),
                TypeError,
                "`arguments` must be names, or a dict of shapes by name; got 'loc'",
            ),
            (
                lambda: fv.from_distrax(distrax.Normal, 2, ()),
                ValueError,
                "`arguments` must name at least one argument",
            ),
            (
                lambda: fv.from_distrax(
                    distrax.Normal, 2, ("loc", "scale"), constraints={"sigma": "positive"}
                ),
                ValueError,
                "`constraints` must be for loc, scale; got 'sigma'",
            ),
            (
                lambda: fv.from_distrax(
                    distrax.Normal, 2, ("loc", "scale"), constraints={"scale": "big"}
                ),
                ValueError,
                "`constraints` must be functions or one of 'positive', 'unit interval'; got 'big'",
            ),
            (
                lambda: fv.from_distrax(distrax.Normal, 3, {"loc": (4,), "scale": (4,)}),
                ValueError,
                r"`constructor` must return a distribution over events of shape \(3,\)",
            ),
            (
                lambda: fv.from_distrax(lambda loc: loc, 3, ("loc",)),
                TypeError,
                "`constructor` must return a distribution of Distrax",
            ),
        ],
    )
    def test_configuration(self, make, error, message):
        with pytest.raises(error, match=message):
            make()

    def test_contexts(self):
        family = fv.gaussian(2)
        x = jnp.zeros(2)
        with pytest.raises(ValueError, match=r"`context` must have a shape that ends in \(4,\)"):
            family.log_prob({}, x, jnp.zeros(2))
        with pytest.raises(ValueError, match=r"`context` must be a dict of loc, scale.*got loc"):
            family.log_prob({}, x, {"loc": x})
        with pytest.raises(ValueError, match=r'`context\["scale"\]` must have a shape that ends'):
            family.log_prob({}, x, {"loc": x, "scale": jnp.zeros(3)})
        with pytest.raises(ValueError, match="with the same leading axes"):
            family.log_prob({}, x, {"loc": jnp.zeros((5, 2)), "scale": x})
