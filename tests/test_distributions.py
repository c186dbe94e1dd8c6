"""What a flow's distribution answers: shapes, moments, and no silent zero from any KL."""

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorflow_probability.substrates import jax as tfp

import flowvi as fv
from tests.small import SMALL

tfd = tfp.distributions

KEY = jax.random.key(0)


def flow(seed=0, family=None):
    family = fv.maf(2, **SMALL) if family is None else family
    params = family.init(KEY)
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    params = jax.tree.map(lambda a: a + 0.5 * jax.random.normal(next(keys), a.shape), params)
    return family.distribution(params)


def stock(distribution):
    """The same distribution as a `distrax.Transformed`."""
    return distrax.Transformed(distribution.distribution, distribution.bijector)


KL_PATHS = {
    "method": lambda p, q: p.kl_divergence(q),
    "tfd": tfd.kl_divergence,
    "method, stock second": lambda p, q: p.kl_divergence(stock(q)),
    "method, stock first": lambda p, q: stock(p).kl_divergence(q),
    "tfd, stock second": lambda p, q: tfd.kl_divergence(p, stock(q)),
    "tfd, stock first": lambda p, q: tfd.kl_divergence(stock(p), q),
    "cross entropy": lambda p, q: p.cross_entropy(q),
}


@pytest.mark.parametrize("path", KL_PATHS)
def test_no_path_returns_a_silent_zero(path):
    with pytest.raises(NotImplementedError, match=r"has no closed form. Estimate it from samples"):
        KL_PATHS[path](flow(0), flow(1))


def test_the_defect_that_is_refused_is_real():
    kl = stock(flow(0)).kl_divergence(stock(flow(1)))
    assert kl == 0.0, "Distrax has mended its rule: the documentation can say so"


def test_kl_is_estimated_where_samples_are_asked_for():
    p, q = flow(0), flow(1)
    estimate = p.kl_divergence(q, seed=KEY, num_samples=20_000)
    x, log_prob = p.sample_and_log_prob(seed=jax.random.key(1), sample_shape=20_000)
    terms = log_prob - q.log_prob(x)
    error = np.sqrt(2) * terms.std() / np.sqrt(20_000)
    assert abs(estimate - terms.mean()) < 4 * error
    assert estimate > 0.01
    other = distrax.mc_estimate_kl(p, q, KEY, 20_000)
    assert abs(other - terms.mean()) < 4 * error
    with pytest.raises(ValueError, match="`seed` must be given with `num_samples`"):
        p.kl_divergence(q, num_samples=10)


@pytest.mark.parametrize("family", [fv.mean_field(3), fv.full_rank(3)])
def test_moments_of_affine_flows_are_exact(family):
    distribution = flow(2, family)
    x = distribution.sample(seed=KEY, sample_shape=100_000)
    error = 4 * x.std(0) / np.sqrt(len(x))
    assert (abs(distribution.mean() - x.mean(0)) < error).all()
    np.testing.assert_allclose(distribution.covariance(), jnp.cov(x.T), atol=0.05)
    np.testing.assert_allclose(distribution.variance(), jnp.diag(distribution.covariance()))
    np.testing.assert_allclose(distribution.stddev() ** 2, distribution.variance(), rtol=1e-5)
    log_prob = distribution.log_prob(x)
    assert abs(distribution.entropy() + log_prob.mean()) < 4 * log_prob.std() / np.sqrt(len(x))
    assert distribution.log_prob(distribution.mode()) >= log_prob.max()


def test_covariance_on_a_base_of_correlated_coordinates():
    base = flow(family=fv.full_rank(2))
    scale = distrax.Block(distrax.ScalarAffine(shift=jnp.ones(2), scale=jnp.array([2.0, 0.5])), 1)
    both = fv.FlowDistribution(base, scale)
    expected = jnp.diag(jnp.array([2.0, 0.5])) @ base.covariance() @ jnp.diag(jnp.array([2.0, 0.5]))
    assert abs(expected[0, 1]) > 0.01
    np.testing.assert_allclose(both.covariance(), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["mean", "variance", "stddev", "mode", "entropy", "covariance"])
def test_moments_of_other_flows_refuse_and_say_what_to_call(name):
    with pytest.raises(
        NotImplementedError, match=f"`{name.replace('stddev', 'variance')}` of a flow"
    ):
        getattr(flow(), name)()


def test_rows_of_a_batch_never_share_noise():
    family = fv.iaf(2, num_layers=1, hidden_sizes=[4], context_size=1)
    x = family.sample(family.init(KEY), KEY, 3, jnp.zeros((4, 1)))
    assert x.shape == (3, 4, 2)
    assert len(np.unique(np.asarray(x).round(5))) == 24


def test_distribution_crosses_jit_both_ways():
    distribution = jax.jit(lambda: flow())()
    x = jax.random.normal(KEY, (5, 2))
    np.testing.assert_allclose(
        jax.jit(lambda d, x: d.log_prob(x))(distribution, x), flow().log_prob(x), rtol=1e-5
    )


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_nan_in_nan_out(value):
    log_prob = flow().log_prob(jnp.array([[0.1, 0.2], [value, 0.2], [0.1, value]]))
    assert jnp.isfinite(log_prob[0])
    if jnp.isnan(value):
        assert jnp.isnan(log_prob[1:]).all()
    else:
        assert not (log_prob[1:] > -1e6).any()
