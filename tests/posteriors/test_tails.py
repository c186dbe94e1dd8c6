import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi.posteriors import tails
from flowvi.posteriors.posterior import draws

KEY = jax.random.key(0)
FAMILY = fv.mean_field(2)
TARGET = fv.Target(lambda u: -0.5 * jnp.sum(u**2), 2)


def params_of_scale(scale):
    """Parameters of a normal distribution so wide."""
    params = FAMILY.init(KEY)
    raw = jnp.full(2, np.log(np.expm1(scale)) - np.log(np.e - 1))
    params = {**params, "transform": {"loc": jnp.zeros(2), "raw_scale": raw}}
    np.testing.assert_allclose(FAMILY.distribution(params).variance(), scale**2, rtol=1e-6)
    return params


def look(params):
    weights = draws(FAMILY, TARGET, params, jax.random.key(1), 20_000)[2]
    return fv.diagnostics.psis(weights).khat, weights.mean()


@pytest.mark.usefixtures("x64")
def test_light_tails_are_mended(monkeypatch):
    monkeypatch.setattr(tails, "LIGHT", 0.2)
    narrow = params_of_scale(0.8)
    khat, elbo = look(narrow)
    # The weights' tail index by theory.
    assert abs(khat - (1 - 0.8**2)) < 0.15
    mended = tails.mend(FAMILY, TARGET, narrow, KEY)
    khat_after, elbo_after = look(mended)
    assert khat_after < 0.2
    assert elbo_after > elbo
    scale = np.sqrt(FAMILY.distribution(mended).variance())
    np.testing.assert_allclose(scale, 1.0, atol=0.05)


@pytest.mark.usefixtures("x64")
def test_what_is_good_stays():
    wide = params_of_scale(1.1)
    assert tails.mend(FAMILY, TARGET, wide, KEY) is wide


@pytest.mark.usefixtures("x64")
def test_a_worse_elbo_is_not_taken(monkeypatch):
    narrow = params_of_scale(0.7)
    monkeypatch.setattr(tails, "MOST_LOSS", -10.0)
    assert tails.mend(FAMILY, TARGET, narrow, KEY) is narrow


@pytest.mark.usefixtures("x64")
def test_nothing_is_learned_from_poor_weights(monkeypatch):
    narrow = params_of_scale(0.7)
    monkeypatch.setattr(tails, "LEAST_ESS", 1.0)
    assert tails.mend(FAMILY, TARGET, narrow, KEY) is narrow
