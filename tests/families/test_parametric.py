"""Families of a context that is their parameters: arguments, moments, densities, KL divergences."""

import functools

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi.networks import MLP
from flowvi.objectives import closed_form
from tests import tolerances
from tests.families.test_families import PARAMETRIC, contexts, perturbed, started

KEY = jax.random.key(0)
CONTINUOUS = ["gaussian", "gaussian_full", "gaussian_learned", "laplace", "logistic", "gumbel"]
EXACT = ["gaussian", "gaussian_full", "gaussian_fixed", "gaussian_image"]
MOMENTS = [*CONTINUOUS, "continuous_bernoulli", "gamma"]


@functools.cache
def program(name):
    """What all tests of a family look at, as one function of parameters and contexts."""
    family = PARAMETRIC[name]

    @jax.jit
    def run(params, context, fixed):
        q = family.distribution(params, context)
        named = family.distribution(params, family.take_apart(context))
        x = q.sample(seed=KEY, sample_shape=10_000)
        score = lambda c: family.distribution(params, c).log_prob(x[:3]).sum()  # noqa: E731
        found = {"x": x, "log_prob": q.log_prob(fixed), "gradient": jax.grad(score)(context)}
        found["named"] = (named.log_prob(fixed), named.sample(seed=KEY, sample_shape=3))
        if name in MOMENTS:
            found |= {"mean": q.mean(), "variance": q.variance()}
        if name in EXACT:
            prior = fv.standard_normal(family.event_shape).distribution({})
            found["kl"] = closed_form.kl_divergence(q, prior)
            found["terms"] = q.log_prob(x) - prior.log_prob(x)
        return found

    return run


@functools.cache
def results(name, scale=1.0):
    context = contexts(name, 6, scale=scale)
    fixed = np.ones((3, 6, *PARAMETRIC[name].event_shape), np.float32)
    if name in ("continuous_bernoulli", "gamma"):
        fixed *= 0.3
    found = program(name)(started(name), context, fixed)
    return jax.tree.map(lambda a: np.asarray(a, np.float64), found)


@pytest.mark.parametrize("name", PARAMETRIC)
def test_a_dict_of_arguments_is_the_same_as_an_array(name):
    found, family = results(name), PARAMETRIC[name]
    np.testing.assert_array_equal(found["named"][0], found["log_prob"])
    named = jax.eval_shape(family.take_apart, contexts(name, 6))
    shapes = {argument: each.shape for argument, each in named.items()}
    assert shapes == {argument: (6, *shape) for argument, shape in family.arguments.items()}


@pytest.mark.parametrize("name", [name for name in PARAMETRIC if name != "gamma"])
@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_any_finite_context_is_acceptable(name, scale):
    found = results(name, scale)
    # A density may underflow to zero; it may not be undefined.
    assert not np.isnan(found["log_prob"]).any()
    assert np.isfinite(found["x"]).all()
    # Where it is not zero it has a gradient.
    assert scale > 1e3 or np.isfinite(found["gradient"]).all()


@pytest.mark.parametrize("name", MOMENTS)
def test_moments_are_those_of_samples(name):
    found = results(name)
    x = found["x"]
    squares = (x - x.mean(0)) ** 2
    for draws, expected in ((x, found["mean"]), (squares, found["variance"])):
        error = draws.std(0) / 100 * tolerances.STANDARD_ERRORS
        assert (np.abs(draws.mean(0) - expected) < error).all()


@pytest.mark.parametrize("name", EXACT)
def test_divergences_from_a_standard_normal_are_exact(name):
    found = results(name)
    error = 4 * found["terms"].std(0) / 100
    assert found["kl"].shape == (6,)
    assert (np.abs(found["kl"] - found["terms"].mean(0)) < error).all()


def test_no_divergence_is_made_up():
    prior = fv.standard_normal(2).distribution({})
    for name in ("laplace", "logistic", "gumbel"):
        q = PARAMETRIC[name].distribution({}, jnp.zeros(4))
        with pytest.raises(NotImplementedError):
            closed_form.kl_divergence(q, prior)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_densities_integrate_to_one(name):
    family, axis = PARAMETRIC[name], np.linspace(-60, 60, 4001)
    fine = np.sinh(axis / 10) * 0.4  # close together where the density is
    step = np.gradient(fine)
    grid = np.stack(np.meshgrid(fine, fine, indexing="ij"), -1)[::4, ::4].astype(np.float32)
    log_prob = family.log_prob(started(name), grid, contexts(name, seed=3))
    weight = 16 * np.outer(step, step)[::4, ::4]
    assert abs((np.exp(np.asarray(log_prob)) * weight).sum() - 1) < tolerances.INTEGRAL


def test_discrete_densities():
    """They sum to one; where there is no probability it is -inf, and where there is NaN, NaN."""
    cases = [
        (fv.bernoulli(1), np.arange(2), [0.5, -1.0, 2.0]),
        (fv.categorical(1, 4), np.arange(4), [-1.0, 4.0, 1.5]),
        (fv.continuous_bernoulli(1), None, [-0.1, 1.1]),
    ]
    for family, values, outside in cases:
        context = np.random.default_rng(0).normal(size=family.context_shape).astype(np.float32)
        inside = np.zeros(0) if values is None else values
        x = np.concatenate([inside, outside, [np.nan]])[:, None].astype(np.float32)
        log_prob = np.asarray(family.log_prob({}, x, context))
        if values is not None:
            np.testing.assert_allclose(np.exp(log_prob[: len(inside)]).sum(), 1, rtol=1e-5)
            whole = family.log_prob({}, values[:, None], context)
            np.testing.assert_array_equal(whole, log_prob[: len(inside)])
        assert (log_prob[len(inside) : -1] == -np.inf).all() and np.isnan(log_prob[-1])


class TestContinuousBernoulli:
    LOGITS = np.array([0.0, 1e-30, 1e-6, 1e-3, -0.02, 0.3, 0.499, 0.501, -3.0, 30.0, -80.0])
    FAMILY = fv.continuous_bernoulli(())

    def test_the_normaliser_is_accurate(self):
        """Against the integral by Gauss and Legendre's rule."""
        nodes, weights = np.polynomial.legendre.leggauss(200)
        nodes, weights = (nodes + 1) / 2, weights / 2
        eta = self.LOGITS[:, None]
        density = np.exp(eta * nodes - np.maximum(eta, 0))
        shifted = density @ weights
        log_normaliser = np.log(shifted) + np.maximum(eta[:, 0], 0)
        mean, square = (density @ (weights * nodes**k) / shifted for k in (1, 2))

        @jax.jit
        def found(logits):
            q = self.FAMILY.distribution({}, logits)
            at = jnp.asarray(0.3, logits.dtype)
            return q.log_prob(0 * at), q.mean(), q.variance(), q.entropy(), q.log_prob(at), q.mode()

        with jax.enable_x64(True):
            exact = list(map(np.asarray, found(self.LOGITS)))
        entropy = log_normaliser - self.LOGITS * mean
        np.testing.assert_allclose(exact[0], -log_normaliser, rtol=tolerances.FLOAT64, atol=1e-15)
        np.testing.assert_allclose(exact[1], mean, rtol=tolerances.FLOAT64)
        np.testing.assert_allclose(exact[2], square - mean**2, rtol=1e-7)
        np.testing.assert_allclose(exact[3], entropy, rtol=1e-7, atol=1e-12)
        np.testing.assert_array_equal(exact[5], self.LOGITS > 0)
        single = found(self.LOGITS.astype(np.float32))[4]
        np.testing.assert_allclose(single, exact[4], rtol=tolerances.FLOAT32, atol=1e-6)

    def test_samples_invert_the_distribution_function(self):
        x = np.asarray(self.FAMILY.sample({}, KEY, 20_000, self.LOGITS.astype(np.float32)))
        assert ((x >= 0) & (x <= 1)).all()
        for eta, column in zip(self.LOGITS, x.T, strict=True):
            points = np.linspace(0.05, 0.95, 7)
            exact = points if abs(eta) < 1e-5 else np.expm1(eta * points) / np.expm1(eta)
            share = (column[:, None] < points).mean(0)
            error = np.sqrt(exact * (1 - exact) / 20_000) + 1e-4
            assert (np.abs(share - exact) < tolerances.STANDARD_ERRORS * error).all(), eta


def test_full_with_no_correlation_is_diagonal():
    rng = np.random.default_rng(0)
    loc, scale, x = rng.normal(size=(3, 5, 3)).astype(np.float32)
    rows, columns = np.tril_indices(3)
    factor = np.zeros((5, 6), np.float32)
    factor[:, rows == columns] = scale
    full = fv.gaussian(3, scale="full").log_prob({}, x, {"loc": loc, "factor": factor})
    expected = fv.gaussian(3).log_prob({}, x, {"loc": loc, "scale": scale})
    np.testing.assert_allclose(full, expected, rtol=1e-5)


@pytest.mark.parametrize("scale", ["predicted", "full"])
def test_mixtures(scale):
    family, component = fv.mixture(2, 3, scale=scale), fv.gaussian(2, scale=scale)
    params = perturbed(jax.jit(family.init)(KEY))

    @jax.jit
    def found(params):
        own = params["context"]
        x, log_prob = family.distribution(params).sample_and_log_prob(seed=KEY, sample_shape=(4, 5))
        parts = [
            component.build({}, {n: own[n][k] for n in component.arguments}).log_prob(x)
            for k in range(3)
        ]
        whole = jax.nn.logsumexp(jnp.stack(parts, -1) + jax.nn.log_softmax(own["logits"]), -1)
        score, draw = (
            jax.grad(lambda p, f=f: f(family.distribution(p)).sum())(params)
            for f in (lambda q: q.log_prob(x), lambda q: q.sample(seed=KEY, sample_shape=50))
        )
        return log_prob, whole, score, draw["context"]["logits"]

    log_prob, whole, score, logits = found(params)
    assert log_prob.shape == (4, 5)
    np.testing.assert_allclose(log_prob, whole, rtol=1e-4, atol=1e-5)
    assert all((np.asarray(g) != 0).all() for g in jax.tree.leaves(score))
    assert (np.asarray(logits) == 0).all()
    assert not fv.iaf(2, base=family).reparameterized


def test_a_density_with_parameters_and_a_context():
    def log_density(params, x, context):
        return -0.5 * (x - params["w"] * context) ** 2 - 0.5 * jnp.log(2 * jnp.pi)

    def sampler(params, key, context):
        return params["w"] * context + jax.random.normal(key)

    family = fv.custom(
        log_density,
        (),
        sampler=sampler,
        init=lambda key: {"w": jax.random.normal(key)},
        context_shape=(),
    )
    params, context = family.init(KEY), np.arange(5.0, dtype=np.float32)
    x, log_prob = map(np.asarray, family.sample_and_log_prob(params, KEY, 2, context))
    assert x.shape == log_prob.shape == (2, 5)
    error = x - np.asarray(params["own"]["w"]) * context
    np.testing.assert_allclose(log_prob, -0.5 * error**2 - 0.5 * np.log(2 * np.pi), rtol=1e-5)
    plain = fv.custom(lambda x: -jnp.sum(x**2), (2, 2))
    assert plain.log_prob({}, np.ones((3, 4, 2, 2))).shape == (3, 4)
    with pytest.raises(NotImplementedError, match="`sampler` must be given to draw"):
        plain.sample({}, KEY, 3)


def test_both_forms_of_output():
    def init(key):
        return {"w": jax.random.normal(key, (4, 6))}

    def named(params, x):
        loc, scale = jnp.split(x @ params["w"], 2, -1)
        return {"loc": loc, "scale": scale}

    rng, found = np.random.default_rng(0), []
    context, x = rng.normal(size=(2, 5, 4)), rng.normal(size=(2, 5, 3))
    for apply in (lambda params, x: x @ params["w"], named):
        family = fv.conditional(fv.gaussian(3), (init, apply), context_shape=4)
        found.append(family.log_prob(family.init(KEY), x, context))
    np.testing.assert_array_equal(*found)


def test_a_scale_that_is_learned():
    family = fv.conditional(fv.gaussian(3, scale="learned"), MLP(4, (), 3))
    params = jax.jit(family.init)(KEY)
    assert params["family"]["scale"].shape == ()
    stddev = jax.jit(lambda params: family.distribution(params, jnp.ones((5, 4))).stddev())
    np.testing.assert_allclose(stddev(params), 1, rtol=1e-6)


def test_a_constraint_of_ones_own():
    constraints = {"loc": jnp.tanh, "scale": "positive"}
    family = fv.from_distrax(distrax.Normal, 2, {"loc": 2, "scale": 2}, constraints=constraints)
    mean = jax.jit(lambda context: family.distribution({}, context).mean())
    context = np.array([1.0, -3.0, 0.0, 0.0], np.float32)
    np.testing.assert_allclose(mean(context), np.tanh(context[:2]), rtol=1e-6)
