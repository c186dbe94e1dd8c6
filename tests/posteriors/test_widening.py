"""Draws that are spread where importance weights have a heavy tail."""

import jax
import jax.numpy as jnp
import numpy as np

import flowvi as fv
from flowvi.posteriors.posterior import draws
from flowvi.posteriors.widening import widened

KEY = jax.random.key(0)


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
    before, after = (each["whitening"].value["matrix"] for each in (fitted, wide))
    width = after[0, 0] / before[0, 0]
    assert 1 < width <= 1.04


def test_draws_stay_where_the_weights_have_no_heavy_tail(x64):
    family = fv.whitened(fv.standard_normal(2))
    params = family.init(KEY)
    same = fv.Target(lambda u: -0.5 * jnp.sum(u**2), 2)
    assert widened(family, same, params, KEY) is params
