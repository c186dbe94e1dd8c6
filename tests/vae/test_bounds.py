"""Bounds of a model against what they bound, and against one another."""

import itertools

import jax
import numpy as np
import pytest

import flowvi as fv
from flowvi.networks import MLP
from tests.tolerances import STANDARD_ERRORS
from tests.vae.helpers import KEY, Linear, binary_rows, binary_vae, perturbed, single


def test_with_the_exact_posterior_the_elbo_is_the_likelihood(x64):
    truth = Linear()
    vae, x = truth.vae(), truth.rows(7)
    params = truth.params(vae)
    expected = truth.log_prob(x)
    found = vae.evaluate(params, KEY, x, 3, kl="sampled")
    np.testing.assert_allclose(found.elbo, expected, atol=1e-6)
    np.testing.assert_allclose(found.log_likelihood, expected, atol=1e-6)
    # With the rate in closed form the distortion alone is noisy, so a wrong rule would show.
    few, many = (np.asarray(vae.elbo(params, KEY, x, count)) for count in (33, 4000))
    assert abs(few - expected).max() > 1e-3
    np.testing.assert_allclose(many, expected, atol=0.2)


def test_bounds_from_the_posterior_and_from_the_prior(x64):
    truth = Linear(size=3, latent=1, noise=1.0)
    vae, x = truth.vae(), truth.rows(4)
    params = truth.params(vae)
    # A posterior that is not exact.
    params["posterior"] = jax.jit(fv.testing.perturbed, static_argnums=(1, 2))(
        params["posterior"], 0.3, 1
    )
    expected, keys = truth.log_prob(x), jax.vmap(jax.random.key)(np.arange(8))
    for bound in (vae.log_likelihood, vae.prior_bound):
        runs = np.stack([bound(params, key, x, 20_000) for key in keys])
        error = runs.std(0, ddof=1) / np.sqrt(len(runs))
        assert (abs(runs.mean(0) - expected) < STANDARD_ERRORS * error + 1e-4).all()
    assert (np.asarray(vae.elbo(params, KEY, x, 20_000)) < expected - 0.01).all()


def test_bounds_rise_with_the_number_of_draws():
    vae, x = binary_vae(), binary_rows()
    params = perturbed(vae, 0.5)
    log_weights = np.asarray(vae.log_weights(params, KEY, x, 6), np.float64)
    bounds = [
        np.mean(
            [
                np.logaddexp.reduce(log_weights[list(chosen)], axis=0) - np.log(count)
                for chosen in itertools.combinations(range(6), count)
            ]
        )
        for count in range(1, 7)
    ]
    assert (np.diff(bounds) > 0).all()
    found = jax.tree.map(np.asarray, vae.evaluate(params, KEY, x, 6, kl="sampled"))
    np.testing.assert_allclose(bounds[0], found.elbo.mean(), rtol=1e-5)
    np.testing.assert_allclose(bounds[-1], found.log_likelihood.mean(), rtol=1e-5)
    np.testing.assert_allclose(found.elbo, -found.rate - found.distortion, rtol=1e-5)


@pytest.mark.parametrize("method", ["evaluate", "prior_bound"])
def test_chunks_do_not_matter(method):
    vae, x = binary_vae(), binary_rows(7)
    params = perturbed(vae, 0.5)

    def found(x, **options):
        return np.asarray(getattr(vae, method)(params, KEY, x, 21, **options))

    whole = found(x)
    # Draws belong to their row and number: neither smaller chunks nor fewer rows change them.
    np.testing.assert_allclose(found(x, chunk_size=3), whole, rtol=1e-5)
    batch = found(x[:6].reshape(2, 3, 3, 4))
    np.testing.assert_allclose(batch.reshape(*batch.shape[:-2], 6), whole[..., :6], rtol=1e-5)
    if method == "evaluate":
        assert abs(whole[0] - np.asarray(vae.elbo(params, jax.random.key(1), x, 21))).max() > 1e-3


def test_memory_does_not_grow_with_the_number_of_draws():
    vae, x = binary_vae(), binary_rows()
    params = vae.init(KEY)
    from flowvi.vae import evaluation

    evaluate = jax.jit(evaluation.evaluate, static_argnums=(0, 5, 6))

    def memory(num_samples):
        arguments = (
            vae,
            params,
            KEY,
            {"x": x},
            np.int32(num_samples),
            evaluation.Chunks(64),
            "auto",
        )
        analysis = evaluate.lower(*arguments).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    assert memory(10_000_000) == memory(64) < 20e6


def test_any_shape_of_the_latents():
    vae = fv.VAE(
        prior=fv.standard_normal((2, 3)),
        likelihood=fv.conditional(fv.bernoulli((4, 4, 1)), MLP((2, 3), (8,), (4, 4, 1))),
        posterior=fv.conditional(fv.gaussian((2, 3)), MLP((4, 4, 1), (8,), (2, 6))),
    )
    params = perturbed(vae, 0.3)
    x = np.random.default_rng(0).integers(0, 2, (5, 4, 4, 1))
    closed, sampled = (
        jax.tree.map(np.asarray, vae.evaluate(params, KEY, x, 2000, kl=kl))
        for kl in ("analytic", "sampled")
    )
    np.testing.assert_allclose(closed.rate, sampled.rate, rtol=0.1)
    np.testing.assert_allclose(closed.distortion, sampled.distortion, rtol=1e-6)
    assert (closed.rate > 0).all()
    assert vae.encode(params, KEY, x, 7).shape == (7, 5, 2, 3)
    assert vae.reconstruct(params, KEY, x, 7).shape == x.shape


def test_log_joint_broadcasts():
    vae, x = binary_vae(), binary_rows(3)
    params = vae.init(KEY)
    z = np.random.default_rng(0).normal(size=(5, 1, 2))
    found = vae.log_joint(params, x, z)
    prior = vae.prior.log_prob(params["prior"], z)
    likelihood = vae.likelihood.log_prob(
        params["likelihood"], np.broadcast_to(x, (5, 3, 3, 4)), np.broadcast_to(z, (5, 3, 2))
    )
    np.testing.assert_allclose(found, np.asarray(prior) + np.asarray(likelihood), rtol=1e-5)


def test_draws_that_share_their_latent():
    # Noise much smaller than what z does.
    truth = Linear(noise=1e-3)
    vae = truth.vae()
    params = single(truth.params(vae))
    x = np.asarray(vae.sample(params, KEY, (50,), num_per_latent=4))
    assert x.shape == (50, 4, 5)
    assert x.std(1).max() < 0.01 < 0.1 < x.mean(1).std(0).min()
    assert vae.sample(params, KEY).shape == (5,)

    # The posterior is widened, so that draws of z show.
    bias = params["posterior"]["network"]["layers"][0]["b"]
    bias += np.array([0.0, 0.0, 9.0, 0.0, 9.0], np.float32)
    data = truth.rows(3)
    held = np.asarray(vae.sample_given(params, KEY, data, (6,), share_latent=True))
    anew = np.asarray(vae.sample_given(params, KEY, data, (6,)))
    assert held.shape == anew.shape == (6, 3, 5)
    assert held.std(0).max() < 0.01 < 0.1 < anew.std(0).min()


def test_a_second_call_compiles_nothing():
    from tests.training.helpers import compilations

    vae, x = binary_vae(), binary_rows()
    params = vae.init(KEY)
    vae.log_likelihood(params, KEY, x, 100)
    with compilations() as names:
        vae.log_likelihood(params, KEY, x, 1000)
        binary_vae().log_likelihood(params, KEY, x, 70)
    assert not names
