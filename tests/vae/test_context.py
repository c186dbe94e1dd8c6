"""Models with covariates: every method against a linear Gaussian model in closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

import flowvi as fv
from flowvi import objectives as ob
from flowvi.networks import MLP
from tests.training.helpers import assert_trees_equal
from tests.vae.helpers import (
    KEY,
    binary_rows,
    binary_vae,
    gaussian_log_prob,
    linear,
    perturbed,
    raw_factor,
)

SIZE, LATENT, COVARIATES, NOISE = 5, 2, 3, 0.4
RNG = np.random.default_rng(0)
A, W, B = (
    0.5 * RNG.normal(size=shape)
    for shape in ((LATENT, COVARIATES), (SIZE, LATENT), (SIZE, COVARIATES))
)
M = RNG.normal(size=SIZE)


def linear_vae(scale=NOISE, **families):
    """z = A y + e, x = W z + B y + m + s e, and a posterior that can be exact."""
    return fv.VAE(
        **{
            "prior": fv.conditional(fv.gaussian(LATENT, scale=1.0), MLP(COVARIATES, (), LATENT)),
            "likelihood": fv.conditional(
                fv.gaussian(SIZE, scale=scale), MLP(LATENT + COVARIATES, (), SIZE)
            ),
            "posterior": fv.conditional(
                fv.gaussian(LATENT, scale="full"),
                MLP(SIZE + COVARIATES, (), LATENT * (LATENT + 3) // 2),
            ),
            "context_shape": COVARIATES,
            **families,
        }
    )


def exact_params(vae):
    """The parameters at which the model is the one above, and the posterior exact, float64."""
    params = jax.tree.map(lambda a: a, vae.init(KEY))
    covariance = np.linalg.inv(np.eye(LATENT) + W.T @ W / NOISE**2)
    gain = covariance @ W.T / NOISE**2
    raw = raw_factor(covariance)
    # The mean of z is A y + gain (x - m - (B + W A) y).
    encoder = np.concatenate([gain, A - gain @ (B + W @ A)], 1)
    encoder = np.concatenate([encoder, np.zeros((len(raw), SIZE + COVARIATES))])
    params["prior"]["network"] = linear(A, np.zeros(LATENT))
    params["likelihood"]["network"] = linear(np.concatenate([W, B], 1), M)
    params["posterior"]["network"] = linear(encoder, np.concatenate([-gain @ M, raw]))
    return params


def rows(num_rows, seed=1):
    rng = np.random.default_rng(seed)
    y = rng.normal(size=(num_rows, COVARIATES))
    z = y @ A.T + rng.normal(size=(num_rows, LATENT))
    return z @ W.T + y @ B.T + M + NOISE * rng.normal(size=(num_rows, SIZE)), y


def log_prob(x, y):
    covariance = W @ W.T + NOISE**2 * np.eye(SIZE)
    return gaussian_log_prob(x - y @ (W @ A + B).T, M, covariance)


@pytest.fixture(scope="module")
def model():
    vae = linear_vae()
    with jax.enable_x64(True):
        return vae, jax.tree.map(np.asarray, jax.jit(exact_params, static_argnums=0)(vae))


def test_every_bound_is_the_density_at_the_exact_posterior(model):
    vae, params = model
    x, y = rows(4)
    with jax.enable_x64(True):
        found = vae.evaluate(params, KEY, x, 3, context=y, kl="sampled")
        expected = log_prob(x, y)
        np.testing.assert_allclose(found.elbo, expected, rtol=1e-9)
        np.testing.assert_allclose(found.log_likelihood, expected, rtol=1e-9)
        weights = vae.log_weights(params, KEY, x, 3, context=y)
        np.testing.assert_allclose(weights, np.broadcast_to(expected, (3, 4)), rtol=1e-9)
        closed = vae.evaluate(params, KEY, x, 3, context=y, kl="analytic")
        means = vae.encode(params, KEY, x, 20_000, context=y).mean(0)
        draws = vae.log_joint(params, x, np.asarray(means), context=y)
    z = np.asarray(means)
    joint = -0.5 * np.sum((z - y @ A.T) ** 2, -1) - np.log(2 * np.pi) * LATENT / 2
    joint += gaussian_log_prob(x - z @ W.T - y @ B.T, M, NOISE**2 * np.eye(SIZE))
    np.testing.assert_allclose(draws, joint, rtol=1e-9)
    covariance = np.linalg.inv(np.eye(LATENT) + W.T @ W / NOISE**2)
    gain = covariance @ W.T / NOISE**2
    expected = y @ A.T + (x - M - y @ (B + W @ A).T) @ gain.T
    np.testing.assert_allclose(z, expected, atol=4 * np.sqrt(covariance.max() / 20_000))
    shift = np.sum((expected - y @ A.T) ** 2, -1)
    rate = 0.5 * (shift + np.trace(covariance) - LATENT - np.linalg.slogdet(covariance)[1])
    np.testing.assert_allclose(closed.rate, rate, rtol=1e-9)


def test_losses_see_the_covariates_of_their_rows(model):
    vae, params = model
    x, y = rows(4)
    with jax.enable_x64(True):
        batch = {"x": jnp.asarray(x), "context": jnp.asarray(y)}
        losses = [
            vae.loss(num_samples=2, kl="sampled"),
            vae.loss(ob.IWELBO, num_samples=2),
            vae.loss(ob.ScoreFunction, num_samples=2),
        ]
        assert vae.loss().kl_rule(params, batch) == "analytic"
        own = {**params, "control": ((),)}
        found = jax.jit(lambda: [jnp.asarray(_value(each(own, KEY, batch))) for each in losses])()
    np.testing.assert_allclose(found, -log_prob(x, y).mean(), rtol=1e-9)


def _value(output):
    return output[0] if isinstance(output, tuple) else output


def test_draws_given_covariates(model):
    vae, params = model
    y = rows(3)[1]
    with jax.enable_x64(True):
        x = np.asarray(vae.sample(params, KEY, 20_000, context=y))
        assert x.shape == (20_000, 3, SIZE)
        covariance = W @ W.T + NOISE**2 * np.eye(SIZE)
        error = 4 * np.sqrt(np.diag(covariance).max() / 20_000)
        np.testing.assert_allclose(x.mean(0), y @ (W @ A + B).T + M, atol=error)
        assert vae.sample(params, KEY, (2,), context=y, num_per_latent=4).shape == (2, 3, 4, SIZE)
        assert vae.sample_given(params, KEY, x[0], 2, context=y).shape == (2, 3, SIZE)
        again = vae.reconstruct(params, KEY, x[0], 2, context=y)
        assert again.shape == (3, SIZE)
        # One y serves all rows.
        z = np.ones((6, LATENT))
        np.testing.assert_allclose(
            vae.decode(params, z, context=y[0]), z @ W.T + y[0] @ B.T + M, rtol=1e-9
        )
        bound = vae.prior_bound(params, KEY, x[0], 2000, context=y)
        np.testing.assert_allclose(bound, log_prob(x[0], y), atol=0.5)


def blind_prior():
    """Binary images of 3 x 4, a prior that does not see y, and two latents."""
    return binary_vae(
        likelihood=fv.conditional(fv.bernoulli((3, 4)), MLP(2 + 3, (8,), (3, 4))),
        posterior=fv.conditional(fv.gaussian(2), MLP(12 + 3, (8,), 4)),
        context_shape=3,
    )


def test_who_sees_the_covariates():
    vae = blind_prior()
    seen = {name: [part for part, _ in parts.shapes] for name, parts in vae.parts.items()}
    assert seen == {"prior": [], "likelihood": ["z", "context"], "posterior": ["x", "context"]}
    local = binary_vae(
        likelihood=vae.likelihood, posterior=fv.local(fv.gaussian(2), 20), context_shape=(3,)
    )
    assert local.is_unamortized and not vae.is_unamortized
    assert local == dataclasses.replace(local, context_shape=3)
    # A prior that is blind to y still draws a z for each.
    params, y = perturbed(vae, 0.3), np.eye(3, dtype=int)
    x = vae.sample(params, KEY, 2, context=y)
    assert x.shape == (2, 3, 3, 4)


@pytest.mark.slow
@pytest.mark.compilations(60)
def test_rows_of_their_own_with_covariates(tmp_path):
    amortized = blind_prior()
    x, y = binary_rows(20), np.eye(3)[np.arange(20) % 3]
    options = {"key": KEY, "num_steps": 3, "progress": False}
    fitted = fv.fit_vae(
        amortized, x, context=y, validation_data=x[:5], validation_context=y[:5], **options
    )
    fitted.save(tmp_path / "vae.flowvi")
    loaded = fv.load(tmp_path / "vae.flowvi")
    assert loaded.vae == amortized
    assert_trees_equal(loaded.params, fitted.params)
    gap = fv.amortization_gap(
        amortized, fitted.params, x[:4], context=y[:4], num_samples=2, **options
    )
    assert (gap.amortization >= 0).all() and gap.rows.vae.context_shape == (3,)
    local = dataclasses.replace(amortized, posterior=fv.local(fv.gaussian(2), 20))
    found = fv.fit_vae(local, x, context=y, **options)
    assert found.evaluate(KEY, x[[3]], context=y[[3]], rows=[3]).elbo.shape == (1,)


def test_sums_over_a_code_that_depends_on_covariates():
    vae = fv.VAE(
        prior=fv.conditional(fv.bernoulli(2), MLP(3, (), 2)),
        likelihood=fv.conditional(fv.bernoulli(4), MLP(2 + 3, (6,), 4)),
        posterior=fv.conditional(fv.bernoulli(2), MLP(4 + 3, (6,), 2)),
        context_shape=3,
    )
    params = perturbed(vae, 0.5)
    x, y = binary_rows(6).reshape(6, 12)[:, :4], np.eye(3)[np.arange(6) % 3]
    z = np.array([[0, 0], [1, 0], [0, 1], [1, 1]], np.float32)
    batch = {"x": x, "context": y.astype(np.float32)}

    @jax.jit
    def by_hand():
        joint = jax.vmap(lambda each: vae.log_joint(params, x, each, context=y))(z)
        q = vae.distribution("posterior", params, batch)
        log_q = jax.vmap(lambda each: q.log_prob(jnp.broadcast_to(each, (6, 2))))(z)
        return joint, log_q, vae.loss(ob.Enumeration)(params, KEY, batch)[0]

    table, log_q, loss = map(np.asarray, by_hand())
    expected = np.log(np.exp(table).sum(0))
    np.testing.assert_allclose(fv.log_marginal(vae, params, x, context=y), expected, rtol=1e-5)
    found, log_posterior = fv.exact_posterior(vae, params, x, context=y)
    np.testing.assert_allclose(found, z)
    np.testing.assert_allclose(log_posterior, table - expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss, -(np.exp(log_q) * (table - log_q)).sum(0).mean(), rtol=1e-5)


@pytest.mark.compilations(60)
def test_pictures():
    vae = blind_prior()
    params, x, y = perturbed(vae, 0.3), binary_rows(7), np.eye(3)
    figure = fv.plotting.prior_samples(vae, params, KEY, context=y, num_columns=5)
    canvas = figure.axes[0].get_images()[0].get_array()
    # A row of images for each y.
    assert canvas.shape == (3 * 4 - 1, 5 * 5 - 1)
    z = vae.prior.sample(params["prior"], KEY, (5, 3))
    np.testing.assert_allclose(
        canvas[4:7, :4], vae.decode(params, z[0, 1], context=y[1]), rtol=1e-5
    )
    rows = y[np.arange(7) % 3]
    fv.plotting.prior_samples(vae, params, KEY, context=y, num_columns=2, means=False)
    fv.plotting.reconstructions(vae, params, KEY, x, context=rows)
    fv.plotting.latent_space(vae, params, KEY, x, context=rows)
    fv.plotting.manifold(vae, params, size=3, context=y[0])
    plt.close("all")


MESSAGES = {
    "no room": (
        ValueError,
        r"`context_shape` must be None where no family has room for the context; got \(3,\)",
        lambda: binary_vae(context_shape=3),
    ),
    "decoder": (
        ValueError,
        r"`likelihood` must take z of the prior standard_n.*, of shape \(2,\), or \(5,\) with the "
        r"context, as context rather than one of shape \(6,\)",
        lambda: binary_vae(
            likelihood=fv.conditional(fv.bernoulli((3, 4)), MLP(6, (8,), (3, 4))), context_shape=3
        ),
    ),
    "prior": (
        ValueError,
        r"`prior` must take no context, or \(3,\) with the context; got conditional",
        lambda: binary_vae(prior=fv.conditional(fv.gaussian(2), MLP(4, (), 4)), context_shape=3),
    ),
    "none": (
        ValueError,
        r"`context` must have a shape that ends in \(3,\) for this model; got None",
        lambda: blind_prior().elbo({}, KEY, binary_rows()),
    ),
    "size": (
        ValueError,
        r"`context` must have a shape that ends in \(3,\) for this model; got shape \(20, 4\)",
        lambda: blind_prior().elbo({}, KEY, binary_rows(), context=np.ones((20, 4))),
    ),
    "rows": (
        ValueError,
        r"`context` must have the leading axes \(20,\) of `x`, or the last of them; got \(19,\)",
        lambda: blind_prior().elbo({}, KEY, binary_rows(), context=np.ones((19, 3))),
    ),
    "not taken": (
        ValueError,
        "`context` must be None for a model without covariates; got .* Perhaps give the `VAE` a",
        lambda: binary_vae().elbo({}, KEY, binary_rows(), context=np.ones((20, 3))),
    ),
    "rows of a fit": (
        ValueError,
        r"`context` must have shape \(20, 3\), a row for each of `x`; got \(3,\)",
        lambda: fv.fit_vae(blind_prior(), binary_rows(), context=np.ones(3), key=KEY),
    ),
    "missing": (
        ValueError,
        r"`data\['context'\]` must be finite; got nan in row 2",
        lambda: fv.fit_vae(
            blind_prior(),
            binary_rows(3),
            context=np.array([[0, 0, 0], [0, 0, 0], [0, np.nan, 0]]),
            key=KEY,
        ),
    ),
    "context of a validation": (
        ValueError,
        r"`validation_context` must have shape \(2, 3\), a row for each of `validation_data`",
        lambda: fv.fit_vae(
            blind_prior(),
            binary_rows(3),
            context=np.ones((3, 3)),
            validation_data=binary_rows(2),
            validation_context=np.ones((3, 3)),
            key=KEY,
        ),
    ),
    "validation": (
        ValueError,
        "`validation_context` must be None without `validation_data`; got",
        lambda: fv.fit_vae(
            blind_prior(),
            binary_rows(3),
            context=np.ones((3, 3)),
            validation_context=np.ones((3, 3)),
            key=KEY,
        ),
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages(name):
    error, message, call = MESSAGES[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.slow
@pytest.mark.optimized
def test_a_linear_model_learns_the_best_density_given_covariates():
    x, y = rows(400)
    vae = linear_vae(scale="learned")
    fitted = fv.fit_vae(
        vae,
        x,
        context=y,
        key=KEY,
        num_steps=2000,
        batch_size=400,
        objective=vae.loss(num_samples=4, path=True),
        progress=False,
    )
    # The best of all such models: least squares, and probabilistic PCA of what they leave.
    design = np.concatenate([y, np.ones((len(y), 1))], 1)
    residuals = x - design @ np.linalg.lstsq(design, x, rcond=None)[0]
    values = np.linalg.eigvalsh(residuals.T @ residuals / len(x))[::-1]
    noise = values[LATENT:].mean()
    values[LATENT:] = noise
    best = -0.5 * (SIZE * np.log(2 * np.pi) + np.log(values).sum() + SIZE)
    elbo = np.asarray(fitted.elbo(KEY, x, 1000, context=y, kl="sampled")).mean()
    assert abs(elbo - best) < 0.01
