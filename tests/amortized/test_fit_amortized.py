"""Amortized posteriors of a linear Gaussian simulator, whose posteriors are known."""

import dataclasses
import re

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import flowvi as fv
from flowvi._tfp import tfd
from flowvi.amortized.prior import as_prior, layout_of
from flowvi.networks import SetEncoder
from flowvi.supports import as_support
from tests.small import AFFINE

KEY = jax.random.key(0)
PRIOR = distrax.Normal(jnp.zeros(2), jnp.ones(2))
NOISE = 0.5


def simulator(key, theta):
    return theta + NOISE * jax.random.normal(key, theta.shape)


def log_likelihood(theta, x):
    return jax.scipy.stats.norm.logpdf(x, theta, NOISE).sum()


#: The posterior is N(x GAIN, SD^2) in each coordinate.
GAIN, SD = 1 / (1 + NOISE**2), NOISE / np.sqrt(1 + NOISE**2)
FAMILY = fv.maf(2, context_size=2, **AFFINE)
FEW = {"num_steps": 2, "progress": False}


@pytest.fixture(scope="module")
def posterior():
    return fv.fit_amortized(
        PRIOR,
        simulator,
        key=KEY,
        num_simulations=10_000,
        family=FAMILY,
        log_likelihood=log_likelihood,
        num_steps=800,
        progress=False,
    )


def test_it_is_the_posterior_of_any_observation(posterior):
    x = np.array([[0.0, 0.0], [1.0, -1.0], [-1.5, 0.5]])
    draws = posterior.sample(x, KEY, 4000)
    assert draws.shape == (4000, 3, 2)
    np.testing.assert_allclose(draws.mean(0), GAIN * x, atol=0.05)
    np.testing.assert_allclose(draws.std(0), SD, rtol=0.08)
    theta = GAIN * x + np.array([0.5, -0.5]) * SD
    exact = -0.5 * (((theta - GAIN * x) / SD) ** 2).sum(-1) - 2 * np.log(SD * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(posterior.log_prob(x, theta), exact, atol=0.25)


def test_draws_have_the_densities_that_are_said(posterior):
    theta, log_q = posterior.sample_and_log_prob([0.2, 0.4], KEY, 5)
    np.testing.assert_allclose(log_q, posterior.log_prob([0.2, 0.4], theta), atol=1e-4)
    np.testing.assert_array_equal(theta, posterior.sample([0.2, 0.4], KEY, 5))


def test_importance_weights_know_the_evidence(posterior):
    x = np.array([[0.5, -0.5], [1.0, 0.0]])
    found = posterior.weights(x, KEY, 2000)
    assert found.log_weights.shape == (2000, 2) and (found.ess > 0.9).all()
    total = np.sqrt(1 + NOISE**2)
    exact = jax.scipy.stats.norm.logpdf(x, 0, total).sum(-1)
    for value, estimate in zip(exact, found.log_evidence, strict=True):
        assert abs(estimate.value - value) < 4 * estimate.standard_error + 1e-3
    given = posterior.given(x[0])
    assert abs(given.diagnosis.log_evidence.value - exact[0]) < 0.02
    assert given.sample(KEY, 10)["theta"].shape == (10, 2)


def test_without_a_likelihood_nothing_is_claimed(posterior):
    bare = dataclasses.replace(posterior, log_likelihood=None)
    given = bare.given([0.5, 0.5])
    assert np.isnan(given.diagnosis.khat) and "no likelihood" in given.diagnosis.messages[0]
    u, log_q = given.sample_and_log_prob(KEY, 3)
    np.testing.assert_allclose(given.target(u), log_q, atol=1e-3)
    with pytest.raises(ValueError, match="`weights` need `log_likelihood`"):
        bare.weights([0.5, 0.5], KEY)


def test_an_observation_far_from_all_simulations_is_named(posterior):
    assert posterior.distance([0.5, 0.5]) < 1
    with pytest.warns(fv.AmortizationWarning, match="times as far from the nearest simulation"):
        posterior.sample([12.0, -9.0], KEY, 2)
    with pytest.warns(fv.AmortizationWarning, match=re.escape("Observation 1 is")):
        posterior.sample([[0.0, 0.0], [30.0, 0.0]], KEY, 2)


def test_a_file_gives_the_same_draws(posterior, tmp_path):
    posterior.save(tmp_path / "p.flowvi")
    again = fv.load(tmp_path / "p.flowvi")
    np.testing.assert_array_equal(
        again.sample([0.1, 0.2], KEY, 5), posterior.sample([0.1, 0.2], KEY, 5)
    )
    np.testing.assert_allclose(again.distance([0.1, 0.2]), posterior.distance([0.1, 0.2]))


def test_names_and_supports_of_parameters_are_kept():
    prior = {"scale": dist.HalfNormal(1.0), "place": dist.Uniform(-1.0, 1.0).expand([2])}

    def simulate(key, theta):
        return theta["place"] + theta["scale"] * jax.random.normal(key, (2,))

    family = fv.maf(3, context_size=2, **AFFINE)
    found = fv.fit_amortized(prior, simulate, key=KEY, num_simulations=600, family=family, **FEW)
    draws = found.sample([0.1, 0.3], KEY, 50_000)
    assert draws["scale"].shape == (50_000,) and draws["place"].shape == (50_000, 2)
    assert (draws["scale"] > 0).all() and (np.abs(draws["place"]) < 1).all()
    given = found.given([0.1, 0.3])
    assert given.target.labels() == ["scale", "place[0]", "place[1]"]
    first = {name: each[0] for name, each in draws.items()}
    density = found.log_prob([0.1, 0.3], first)
    np.testing.assert_allclose(jax.jit(given.target.log_density)(first), density, atol=1e-3)


def test_a_set_does_not_depend_on_its_order():
    def simulate(key, theta):
        return theta + jax.random.normal(key, (6, 2))

    embedding = SetEncoder((6, 2), 4, hidden_sizes=(8,))
    family = fv.maf(2, context_size=4, **AFFINE)
    options = {"family": family, "embedding": embedding, **FEW}
    found = fv.fit_amortized(PRIOR, simulate, key=KEY, num_simulations=600, **options)
    x = np.random.default_rng(0).normal(size=(6, 2))
    one, other = (found.sample(each, KEY, 3) for each in (x, x[::-1]))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_simulations_that_are_not_finite_are_left_out_and_counted():
    theta = np.random.default_rng(0).normal(size=(600, 2))
    x = theta.copy()
    x[::6, 0] = np.nan
    with pytest.warns(RuntimeWarning, match="100 of 600 simulations are not finite"):
        found = fv.fit_amortized(PRIOR, pairs=(theta, x), key=KEY, family=FAMILY, **FEW)
    assert (found.num_pairs, found.num_dropped) == (500, 100)


def test_a_simulator_in_python_has_its_own_generators():
    def simulate(generator, theta):
        return theta + generator.normal(size=2)

    found = fv.fit_amortized(
        PRIOR, simulate, key=KEY, num_simulations=600, num_processes=1, family=FAMILY, **FEW
    )
    assert found.num_pairs == 600


GOOD = np.random.default_rng(1).normal(size=(600, 2))
BOX = distrax.Uniform(-jnp.ones(2), jnp.ones(2))


def ragged(generator, theta):
    return np.zeros(2 + int(theta[0] > 0))


BAD = [
    ({"prior": 3.0}, TypeError, "`prior` must be a distribution with a sampler"),
    ({}, ValueError, "`simulator` must be given, or else `pairs`; got neither"),
    ({"pairs": (GOOD, GOOD), "simulator": simulator}, ValueError, "or else `pairs`; got both"),
    ({"pairs": (GOOD[:9], GOOD[:9])}, ValueError, "at least 20 simulations"),
    ({"pairs": (GOOD, GOOD[:-1])}, ValueError, "`theta` must have a row for each of the 599"),
    ({"pairs": (GOOD, np.nan * GOOD)}, ValueError, "got none of 600"),
    ({"pairs": (GOOD, [*GOOD[1:], GOOD[0, :1]])}, ValueError, "rows of one shape"),
    ({"pairs": (3 * GOOD, GOOD), "prior": BOX}, ValueError, "`theta` must lie strictly inside"),
    ({"simulator": ragged, "num_processes": 1}, ValueError, "x of one shape; row 0 has"),
    ({"simulator": lambda key, theta: np.asarray(theta)}, TypeError, "a function of JAX"),
    ({"pairs": (GOOD, GOOD.reshape(600, 1, 2))}, ValueError, "`embedding` must be given"),
    (
        {"pairs": (GOOD, GOOD), "family": fv.maf(3, context_size=2)},
        ValueError,
        "over the 2 unconst",
    ),
    ({"x": GOOD}, ValueError, "`x` must come with `log_likelihood`"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_input(arguments, error, message):
    prior = arguments.get("prior", PRIOR)
    rest = {name: value for name, value in arguments.items() if name != "prior"}
    with pytest.raises(error, match=re.escape(message)):
        fv.fit_amortized(prior, key=KEY, num_simulations=600, **FEW, **rest)


def test_few_pairs_are_warned_of(posterior):
    with pytest.warns(RuntimeWarning, match="100 pairs are too few"):
        fv.fit_amortized(PRIOR, pairs=(GOOD[:100], GOOD[:100]), key=KEY, family=FAMILY, **FEW)
    with pytest.raises(ValueError, match="`x` must be finite"):
        posterior.sample([np.nan, 0.0], KEY, 2)
    with pytest.raises(ValueError, match="ends in"):
        posterior.sample([0.0, 0.0, 0.0], KEY, 2)


PRIORS = [
    (distrax.MultivariateNormalTri(jnp.zeros(2), jnp.eye(2)), None),
    (distrax.Independent(distrax.Uniform(jnp.zeros(2), jnp.ones(2)), 1), (0, 1)),
    (dist.LogNormal(0, 1).expand([2]).to_event(1), "positive"),
    (dist.Dirichlet(np.ones(2)), "simplex"),
    (tfd.Sample(tfd.HalfNormal(1.0), 2), None),
]


@pytest.mark.parametrize(("prior", "support"), PRIORS)
def test_supports_of_distributions_are_known(prior, support):
    own = as_prior(prior)
    layout, single = layout_of(own, KEY)
    assert single and layout.supports[0].event_shape == (2,)
    if not isinstance(prior, tfd.Distribution):
        assert layout.supports[0] == as_support(support, (2,))
    assert jax.eval_shape(own.log_prob, jnp.ones(2)).shape == ()


def test_a_transformed_prior_must_say_where_it_lies():
    prior = distrax.Transformed(distrax.Normal(0.0, 1.0), distrax.Tanh())
    with pytest.raises(TypeError, match="`prior` must say where its draws may lie"):
        as_prior(prior)
