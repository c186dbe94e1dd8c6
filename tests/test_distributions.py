"""What a flow's distribution answers: shapes, moments, and no silent zero from any KL."""

import functools

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorflow_probability.substrates import jax as tfp

import flowvi as fv
from flowvi.distributions import BinaryConcrete, OneHotConcrete
from flowvi.testing import perturbed
from tests.small import AFFINE, SMALL
from tests.tolerances import STANDARD_ERRORS

tfd = tfp.distributions

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)


@functools.cache
def start(family):
    return jax.jit(family.init)(KEY)


def flow(seed=0, family=None):
    family = fv.maf(2, **SMALL) if family is None else family
    return jax.jit(family.distribution)(perturbed(start(family), 0.5, seed))


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


def test_no_path_returns_a_silent_zero():
    p, q = flow(0), flow(1)
    for path in KL_PATHS.values():
        with pytest.raises(NotImplementedError, match=r"has no closed form. Estimate it from samp"):
            path(p, q)


def test_the_defect_that_is_refused_is_real():
    kl = stock(flow(0)).kl_divergence(stock(flow(1)))
    assert kl == 0.0, "Distrax has mended its rule: the documentation can say so"


def test_kl_is_estimated_where_samples_are_asked_for():
    p, q = flow(0), flow(1)

    @jax.jit
    def run(p, q):
        x, log_prob = p.sample_and_log_prob(seed=jax.random.key(1), sample_shape=4_000)
        ours = p.kl_divergence(q, seed=KEY, num_samples=4_000)
        return ours, distrax.mc_estimate_kl(p, q, KEY, 4_000), log_prob - q.log_prob(x)

    estimate, other, terms = map(np.asarray, run(p, q))
    error = np.sqrt(2) * terms.std() / np.sqrt(4_000)
    assert abs(estimate - terms.mean()) < STANDARD_ERRORS * error
    assert estimate > 0.01
    assert abs(other - terms.mean()) < STANDARD_ERRORS * error
    with pytest.raises(ValueError, match="`seed` must be given with `num_samples`"):
        p.kl_divergence(q, num_samples=10)


def moments(d):
    return d.mean(), d.covariance(), d.variance(), d.stddev(), d.entropy(), d.mode()


@pytest.mark.parametrize("family", [fv.mean_field(3), fv.full_rank(3)])
def test_moments_of_affine_flows_are_exact(family):
    @jax.jit
    def run(d):
        x, log_prob = d.sample_and_log_prob(seed=KEY, sample_shape=100_000)
        return x, log_prob, d.log_prob(d.mode()), *moments(d)

    results = map(np.asarray, run(flow(2, family)))
    x, log_prob, at_mode, mean, covariance, variance, stddev, entropy, _ = results
    assert (abs(mean - x.mean(0)) < STANDARD_ERRORS * x.std(0) / np.sqrt(len(x))).all()
    np.testing.assert_allclose(covariance, np.cov(x.T), atol=0.05)
    np.testing.assert_allclose(variance, np.diag(covariance))
    np.testing.assert_allclose(stddev**2, variance, rtol=1e-5)
    assert abs(entropy + log_prob.mean()) < STANDARD_ERRORS * log_prob.std() / np.sqrt(len(x))
    assert at_mode >= log_prob.max()


def test_covariance_on_a_base_of_correlated_coordinates():
    @jax.jit
    def run(base):
        scale = distrax.ScalarAffine(shift=jnp.ones(2), scale=jnp.array([2.0, 0.5]))
        both = fv.FlowDistribution(base, distrax.Block(scale, 1))
        return both.covariance(), base.covariance()

    got, base = map(np.asarray, run(flow(family=fv.full_rank(2))))
    expected = np.diag([2.0, 0.5]) @ base @ np.diag([2.0, 0.5])
    assert abs(expected[0, 1]) > 0.01
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["mean", "variance", "stddev", "mode", "entropy", "covariance"])
def test_moments_of_other_flows_refuse_and_say_what_to_call(name):
    with pytest.raises(
        NotImplementedError, match=f"`{name.replace('stddev', 'variance')}` of a flow"
    ):
        getattr(flow(), name)()


def test_rows_of_a_batch_never_share_noise():
    family = fv.iaf(2, num_layers=1, hidden_sizes=[4], context_size=1)
    x = jax.jit(lambda p: family.sample(p, KEY, 3, jnp.zeros((4, 1))))(start(family))
    assert x.shape == (3, 4, 2)
    assert len(np.unique(np.asarray(x).round(5))) == 24


CONTEXTS = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


def answers(d, x):
    """Draws with their density, other draws, and the density at given points."""
    draws, log_prob = d.sample_and_log_prob(seed=KEY, sample_shape=(3, 4))
    return draws, log_prob, d.sample(seed=KEY), d.log_prob(x), d.log_prob(x[0, 0])


@pytest.mark.parametrize("make", [fv.maf, fv.iaf])
def test_a_distribution_made_by_vmap_over_contexts_has_their_batch_shape(make):
    family = make(2, **AFFINE, context_size=3)
    params = perturbed(start(family), 0.3, 0)
    x = np.random.default_rng(1).normal(size=(7, 5, 2)).astype(np.float32)

    @jax.jit
    def run(params):
        mapped = jax.vmap(lambda c: family.distribution(params, c))(CONTEXTS)
        whole = family.distribution(params, CONTEXTS)
        assert mapped.batch_shape == whole.batch_shape == (5,)
        assert mapped.event_shape == (2,)
        got = answers(mapped, x)
        return got, whole.log_prob(got[0]), whole.log_prob(x), whole.log_prob(x[0, 0])

    (draws, log_prob, draw, at_x, at_one), *expected = run(params)
    assert draws.shape == (3, 4, 5, 2)
    assert draw.shape == (5, 2)
    assert len(np.unique(np.asarray(draws).round(5))) == draws.size
    for got, want in zip((log_prob, at_x, at_one), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_distribution_made_by_vmap_over_parameters_has_their_batch_shape():
    def stacked(family):
        trees = [perturbed(start(family), 0.3, seed) for seed in range(2)]
        return trees, jax.tree.map(lambda *leaves: np.stack(leaves), *trees)

    flow, normal = fv.maf(2, **AFFINE, context_size=3), fv.full_rank(2)
    x = np.ones((7, 5, 2), np.float32)

    @jax.jit
    def run(trees, together, normals, normals_together):
        rows = jax.vmap(lambda p, c: flow.distribution(p, c), (None, 0))
        nested = jax.vmap(rows, (0, None))(together, CONTEXTS)
        assert nested.batch_shape == (2, 5)
        mapped = jax.vmap(normal.distribution)(normals_together)
        assert mapped.batch_shape == (2,)
        alone = [flow.distribution(p, CONTEXTS).log_prob(x) for p in trees]
        each = [moments(normal.distribution(p)) for p in normals]
        shape = nested.sample(seed=KEY, sample_shape=3).shape
        assert shape == (3, 2, 5, 2)
        got = nested.log_prob(x[:, None])
        return (got, *moments(mapped)), (
            jnp.stack(alone, 1),
            *map(jnp.stack, zip(*each, strict=True)),
        )

    for got, want in zip(*run(*stacked(flow), *stacked(normal)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.05, 0.5])
@pytest.mark.parametrize("cls", [BinaryConcrete, OneHotConcrete])
def test_relaxed_draws_have_a_finite_density(cls, temperature):
    logits = np.float32([[-3.0, 0.0, 5.0], [1.0, 0.5, -1.0]])

    @jax.jit
    def run(logits):
        d = cls(logits, temperature)
        x, log_prob = d.sample_and_log_prob(seed=KEY, sample_shape=1000)
        slopes = jax.grad(lambda v: cls(v, temperature).log_prob(x).sum())(logits)
        ends = d.log_prob(jnp.eye(3)[:2])
        return x, log_prob, d.log_prob(x), slopes, ends, d.log_prob(jnp.full((2, 3), jnp.nan))

    x, known, log_prob, slopes, ends, at_nan = map(np.asarray, run(logits))
    for values in (known, log_prob, slopes, ends):
        assert np.isfinite(values).all()
    assert (x > 0).all()
    assert np.isnan(at_nan).all()
    if cls is BinaryConcrete:
        assert (x < 1).all()
        known, log_prob, x = (v[(x > 1e-3) & (x < 1 - 1e-3)] for v in (known, log_prob, x))
        assert len(x) > 100
    else:
        inside = x.min(-1) > 1e-30
        known, log_prob = known[inside], log_prob[inside]
        assert len(known) > 100
    np.testing.assert_allclose(log_prob, known, rtol=1e-3, atol=1e-2)


def test_distribution_crosses_jit_both_ways():
    family = fv.maf(2, **SMALL)
    params = perturbed(start(family), 0.5, 0)
    inside = jax.jit(lambda p: family.distribution(p).log_prob(X))(params)
    across = jax.jit(lambda d, x: d.log_prob(x))(flow(), X)
    np.testing.assert_allclose(across, inside, rtol=1e-5)


def test_nan_in_nan_out():
    values = np.array([np.nan, np.inf, -np.inf], np.float32)
    x = np.tile(np.float32([[0.1, 0.2], [0.1, 0.2], [0.1, 0.2]]), (3, 1, 1))
    x[:, 1, 0] = x[:, 2, 1] = values
    log_prob = np.asarray(jax.jit(lambda d: d.log_prob(x))(flow()))
    assert np.isfinite(log_prob[:, 0]).all()
    assert np.isnan(log_prob[0, 1:]).all()
    assert not (log_prob[1:, 1:] > -1e6).any()


@pytest.mark.parametrize("make", [fv.maf, fv.iaf, fv.coupling])
def test_nan_parameters_give_nan_draws_and_densities(make):
    family = make(2, **SMALL)
    params = jax.tree.map(lambda a: np.nan * a, start(family))
    run = jax.jit(lambda p: (*family.sample_and_log_prob(p, KEY, 5), family.log_prob(p, 9 * X)))
    for part in run(params):
        assert np.isnan(part).any(-1).all()


def test_keys_are_used_once_and_ranks_are_not_promoted():
    x = np.ones((4, 2), np.float32)
    with jax.debug_key_reuse(True), jax.numpy_rank_promotion("raise"):
        for make in (fv.maf, fv.iaf):
            family = make(2, **AFFINE)

            @jax.jit
            def run(key, family=family):
                first, second = jax.random.split(key)
                params = family.init(first)
                # One event at a time, for the normal distribution of Distrax promotes ranks.
                one = lambda p, x: family.log_prob(p, x)  # noqa: E731
                loss = lambda p: jax.vmap(one, (None, 0))(p, x).sum()  # noqa: E731
                return jax.grad(loss)(params), family.sample(params, second, (3,))

            run(jax.random.key(0))
