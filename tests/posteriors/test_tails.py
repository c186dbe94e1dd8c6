"""Fits of the tails, and draws that are spread where importance weights are heavy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi.objectives import ELBO
from flowvi.posteriors.posterior import draws
from flowvi.posteriors.tails import WideELBO, widened
from flowvi.testing import perturbed
from tests.small import SMALL
from tests.tolerances import FLOAT64, STANDARD_ERRORS

KEY = jax.random.key(0)


def normal(params, key, z, batch):
    """log N(z; 0, I)."""
    del params, key, batch
    return jnp.sum(-0.5 * z**2 - 0.5 * np.log(2 * np.pi), -1)


def grad(loss_fn, params, key=KEY):
    return jax.grad(lambda params: loss_fn({"posterior": params}, key, None))(params)


@pytest.mark.usefixtures("x64")
class TestWideELBO:
    def test_of_width_one_it_is_the_elbo_by_path_gradients(self):
        family = fv.whitened(fv.iaf(3, **SMALL))
        params = perturbed(family.init(KEY), 0.3, 0)
        pairs = [
            (loss_fn({"posterior": params}, KEY, None), grad(loss_fn, params))
            for loss_fn in (
                WideELBO(family, normal, num_samples=7, width=1.0),
                ELBO(family, normal, num_samples=7, path=True),
            )
        ]
        for found, expected in zip(*map(jax.tree.leaves, pairs), strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=FLOAT64)

    def test_its_value_is_that_of_the_elbo(self):
        family = fv.mean_field(2)
        params = perturbed(family.init(KEY), 1.0, 0)
        q = family.distribution(params)
        mean, variance = q.mean(), q.variance()
        kl = 0.5 * jnp.sum(variance + mean**2 - 1 - jnp.log(variance))
        loss_fn = WideELBO(family, normal, num_samples=10_000, width=1.3)
        keys = jax.random.split(KEY, 100)
        losses = jax.vmap(lambda key: loss_fn({"posterior": params}, key, None))(keys)
        assert kl > 0.1
        assert abs(losses.mean() - kl) < STANDARD_ERRORS * losses.std() / np.sqrt(len(keys))

    def test_its_gradient_vanishes_draw_by_draw_at_the_posterior(self):
        family = fv.iaf(3, **SMALL)
        params = perturbed(family.init(KEY), 0.3, 0)

        def posterior(_, key, z, batch):
            return family.log_prob(params, z)

        gradient = grad(WideELBO(family, posterior, num_samples=3, width=1.5), params)
        for leaf in jax.tree.leaves(gradient):
            np.testing.assert_allclose(leaf, 0.0, atol=FLOAT64)

    def test_of_a_centred_normal_its_gradient_is_the_elbos_times_the_variance(self):
        # d/dy [log q - log p] = y - y / s^2 at y = w s x, with dy = w x ds.
        family = fv.mean_field(2)
        params = family.init(KEY)
        params["transform"]["raw_scale"] += jnp.array([0.3, -0.2])
        once, wide = (
            grad(WideELBO(family, normal, num_samples=50, width=width), params)["transform"]
            for width in (1.0, 1.5)
        )
        assert abs(once["raw_scale"]).min() > 0.01
        np.testing.assert_allclose(wide["raw_scale"], 1.5**2 * once["raw_scale"], rtol=1e-6)

    def test_skipped_draws_leave_the_value_where_it_is(self):
        # q is the posterior, shifted by 500 nats, with a hole in the tails, where wide draws are.
        def with_hole(params, key, z, batch):
            hole = jnp.linalg.norm(z, axis=-1) > 2
            return jnp.where(hole, jnp.nan, normal(params, key, z, batch) - 500)

        family = fv.mean_field(2)
        loss_fn = WideELBO(family, with_hole, num_samples=50, width=1.5, skip_nonfinite=True)
        loss, metrics = loss_fn({"posterior": family.init(KEY)}, KEY, None)
        assert metrics["skipped"] > 0.2
        np.testing.assert_allclose(loss, 500, rtol=1e-9)

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match=r"`width` must be at least 1; got 0\.5\."):
            WideELBO(fv.mean_field(2), normal, width=0.5)
        with pytest.raises(ValueError, match=r"`family` must be a flow; got StandardNormal"):
            WideELBO(fv.standard_normal(2), normal)({"posterior": {}}, KEY, None)


def test_draws_are_spread_where_that_bounds_the_weights(x64):
    # A normal distribution of the same variance: narrower than a Student t far out.
    df = 200.0
    student = fv.Target(lambda u: -0.5 * (df + 2) * jnp.log1p(jnp.sum(u**2) / df), 2)
    family = fv.whitened(fv.standard_normal(2))
    fitted = family.widen(family.init(KEY), float(np.sqrt(df / (df - 2))))

    def khat(params):
        weights = draws(family, student, params, jax.random.key(3), 10_000)[2]
        return fv.diagnostics.psis(weights).khat

    wide = widened(family, student, fitted, KEY)
    assert khat(fitted) > 1
    assert khat(wide) < 0.5
    width = wide["width"].value / fitted["width"].value
    assert 1 < width <= 1.04


def test_draws_stay_where_the_weights_have_no_heavy_tail(x64):
    family = fv.whitened(fv.standard_normal(2))
    params = family.init(KEY)
    same = fv.Target(lambda u: -0.5 * jnp.sum(u**2), 2)
    assert widened(family, same, params, KEY) is params
