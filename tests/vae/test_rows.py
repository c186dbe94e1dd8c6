"""Posteriors of single rows: without an encoder, of new rows, and refined."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowvi as fv
from flowvi.networks import MLP
from tests.small import SMALL
from tests.tolerances import FLOAT32
from tests.training.helpers import assert_trees_equal
from tests.vae.helpers import KEY, Linear, binary_rows, binary_vae, perturbed, single
from tests.vae.test_fit_vae import pca_log_prob

SIZE, LATENT, NUM_ROWS = 8, 2, 40
TRUTH = Linear(size=SIZE, latent=LATENT)
LIKELIHOOD = fv.conditional(fv.gaussian(SIZE, scale="learned"), MLP(LATENT, (), SIZE))


def local_vae(num_rows=NUM_ROWS, **families):
    posterior = fv.local(fv.gaussian(LATENT, scale="full"), num_rows)
    return fv.VAE(
        **{
            "prior": fv.standard_normal(LATENT),
            "likelihood": LIKELIHOOD,
            "posterior": posterior,
            **families,
        }
    )


def exact(truth=TRUTH):
    """A linear model, its parameters and the exact posterior's, in single precision."""
    vae = truth.vae()
    return vae, single(truth.params(vae))


@pytest.mark.slow
@pytest.mark.optimized
def test_without_an_encoder_a_linear_model_is_probabilistic_pca():
    x = TRUTH.rows(NUM_ROWS)
    vae = local_vae()
    result = fv.fit_vae(
        vae,
        x,
        key=KEY,
        num_steps=1500,
        batch_size=NUM_ROWS,
        objective=vae.loss(num_samples=4, path=True),
        progress=False,
    )
    elbo = np.asarray(vae.elbo(result.params, KEY, x, 1000))
    assert abs(elbo.mean() - pca_log_prob(x, LATENT)) < 0.05


@pytest.mark.parametrize(
    "num_steps", [2, pytest.param(500, marks=(pytest.mark.slow, pytest.mark.optimized))]
)
def test_new_rows_are_fitted_and_nothing_else_is(num_steps):
    amortized, params = exact()
    vae = fv.VAE(
        amortized.prior, amortized.likelihood, fv.local(fv.gaussian(LATENT, scale="full"), 3)
    )
    params = {**params, "posterior": vae.posterior.init(KEY)}
    x = TRUTH.rows(12, seed=5)
    new = fv.fit_rows(vae, params, x, key=KEY, num_steps=num_steps, progress=False)
    for name in ("prior", "likelihood"):
        assert_trees_equal(new.params[name], params[name])
    assert new.vae.posterior == fv.local(fv.gaussian(LATENT, scale="full"), 12)
    if num_steps == 500:
        elbo = new.elbo(KEY, x, 200, kl="sampled")
        # The family holds the exact posterior, so its bound is the likelihood.
        np.testing.assert_allclose(elbo, TRUTH.log_prob(x), atol=0.1)


@pytest.mark.slow
@pytest.mark.optimized
def test_the_gap_of_an_encoder():
    amortized, params = exact()
    x = TRUTH.rows(15, seed=6)
    spoilt = {**params, "posterior": fv.testing.perturbed(params["posterior"], 0.1, 0)}
    gap = fv.amortization_gap(
        amortized, spoilt, x, key=KEY, num_samples=500, num_steps=300, progress=False
    )
    found = TRUTH.log_prob(x)
    assert (gap.amortization >= 0).all() and gap.amortization.mean() > 0.1
    np.testing.assert_allclose(gap.importance_weighted, found, atol=0.05)
    np.testing.assert_allclose(gap.refined, found, atol=0.3)
    np.testing.assert_allclose(gap.inference, gap.amortization + gap.approximation, atol=1e-4)
    # What is handed back is what was judged, and amortized is not above unamortized elsewhere.
    key = jax.random.key(7)
    refined = np.asarray(gap.rows.vae.elbo(gap.rows.params, key, x, 500))
    encoder = np.asarray(amortized.elbo(spoilt, key, x, 500))
    difference = encoder - refined
    assert difference.mean() < 2 * difference.std(ddof=1) / len(x) ** 0.5
    np.testing.assert_allclose(refined, gap.refined, atol=0.3)


def test_nothing_to_gain_is_no_gap():
    amortized, params = exact()
    x = TRUTH.rows(6, seed=7)
    # At a rate of zero no row gets better, and each keeps what the encoder said.
    gap = fv.amortization_gap(
        amortized,
        params,
        x,
        key=KEY,
        num_samples=1,
        num_steps=1,
        optimizer=optax.sgd(0.0),
        progress=False,
    )
    assert (gap.amortization == 0).all()
    assert gap.importance_weighted is None is gap.approximation is gap.inference
    begun = gap.rows.params["posterior"]["rows"].value
    expected = amortized.posterior.features(params["posterior"], np.asarray(x, np.float32))
    np.testing.assert_allclose(begun, expected, rtol=FLOAT32)


#: Steps that make every row worse.
AWAY = optax.stateless(lambda updates, params: jax.tree.map(jnp.ones_like, updates))


def test_a_row_that_got_worse_keeps_what_the_encoder_said():
    amortized, params = exact()
    x = TRUTH.rows(6, seed=7)
    gap = fv.amortization_gap(
        amortized, params, x, key=KEY, num_samples=50, num_steps=3, optimizer=AWAY, progress=False
    )
    assert (gap.amortization == 0).all()
    kept = gap.rows.vae.elbo(gap.rows.params, KEY, x, 50)
    np.testing.assert_allclose(kept, amortized.elbo(params, KEY, x, 50), rtol=FLOAT32)


@pytest.mark.slow
def test_draws_without_gradients_are_refined_by_their_score():
    vae = binary_vae(posterior=fv.conditional(fv.bernoulli(2), MLP((3, 4), (8,), 2)))
    params = perturbed(vae, 1.0)
    gap = fv.amortization_gap(
        vae, params, binary_rows(10), key=KEY, num_samples=200, num_steps=100, progress=False
    )
    # Two bits for each row: nearly all of them have a better place than that of a random encoder.
    assert (gap.amortization >= 0).all() and (gap.amortization > 0.1).sum() >= 8


def test_rows_in_all_methods():
    vae = binary_vae(posterior=fv.local(fv.gaussian(2), 20))
    params = perturbed(vae, 0.5)
    x = binary_rows(20)
    rows = np.array([7, 3, 19])
    table = params["posterior"]["rows"].value

    # The same rows of a table that holds them alone.
    few = binary_vae(posterior=fv.local(fv.gaussian(2), 3))
    alone = {**params, "posterior": few.posterior.with_rows(params["posterior"], table[rows])}
    calls = {
        "evaluate": lambda vae, params, **kw: vae.evaluate(params, KEY, x[rows], 3, **kw),
        "log_weights": lambda vae, params, **kw: vae.log_weights(params, KEY, x[rows], 3, **kw),
        "encode": lambda vae, params, **kw: vae.encode(params, KEY, x[rows], 3, **kw),
        "reconstruct": lambda vae, params, **kw: vae.reconstruct(params, KEY, x[rows], 3, **kw),
        "sample_given": lambda vae, params, **kw: vae.sample_given(params, KEY, x[rows], 3, **kw),
    }
    for call in calls.values():
        found, expected = call(vae, params, rows=rows), call(few, alone)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=FLOAT32)
    assert vae.elbo(params, KEY, x.reshape(4, 5, 3, 4)).shape == (4, 5)


def refuse(**options):
    vae = binary_vae(posterior=fv.local(fv.gaussian(2), 20))
    params = jax.eval_shape(vae.init, KEY)
    return vae.elbo(params, KEY, binary_rows(20), **options)


BAD = {
    "more rows than were fitted": (
        ValueError,
        "`context` must hold numbers of rows from 0 to 9, .*; got 10. Perhaps fit new rows",
        lambda: binary_vae(posterior=fv.local(fv.gaussian(2), 10)).elbo({}, KEY, binary_rows(20)),
    ),
    "out of range": (ValueError, "from 0 to 19.*got 20", lambda: refuse(rows=np.arange(20) + 1)),
    "floats": (TypeError, "integers.*float", lambda: refuse(rows=np.arange(20.0))),
    "shape": (
        ValueError,
        r"`rows` must have shape \(20,\), as `x` does; got \(3,\)",
        lambda: refuse(rows=np.arange(3)),
    ),
    "amortized": (
        ValueError,
        "`rows` must be None for an amortized posterior",
        lambda: binary_vae().elbo({}, KEY, binary_rows(3), rows=np.arange(3)),
    ),
    "fit of more rows": (
        ValueError,
        "from 0 to 9.*got 10",
        lambda: fv.fit_vae(
            binary_vae(posterior=fv.local(fv.gaussian(2), 10)),
            binary_rows(20),
            key=KEY,
            num_steps=1,
        ),
    ),
    "validation": (
        ValueError,
        "`validation_data` must be None where each row has its own posterior.*`fv.fit_rows`",
        lambda: fv.fit_vae(
            binary_vae(posterior=fv.local(fv.gaussian(2), 20)),
            binary_rows(20),
            key=KEY,
            num_steps=1,
            validation_data=binary_rows(3),
        ),
    ),
    "no model": (
        TypeError,
        r"`vae` must be a `fv.VAE\(...\)`; got 3",
        lambda: fv.fit_rows(3, {}, binary_rows(), key=KEY),
    ),
    "another posterior": (
        TypeError,
        "`vae` must have a posterior by `fv.conditional` or `fv.local`",
        lambda: fv.fit_rows(
            flow_vae(), jax.eval_shape(flow_vae().init, KEY), np.zeros((3, 2)), key=KEY
        ),
    ),
    "no encoder": (
        TypeError,
        "`vae` must have an encoder, a posterior by `fv.conditional`",
        lambda: fv.amortization_gap(local_vae(), {}, np.zeros((3, SIZE)), key=KEY),
    ),
}


def flow_vae():
    return fv.VAE(
        fv.standard_normal(2),
        fv.conditional(fv.gaussian(2), MLP(2, (), 4)),
        fv.iaf(2, **SMALL, context_size=2),
    )


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, message, call = BAD[name]
    with pytest.raises(error, match=message):
        call()
