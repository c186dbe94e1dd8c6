"""One small fit of each kind, saved and loaded: what `.ci/matrix` tries on every Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi.networks import MLP
from tests.small import AFFINE

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(500.0, 100.0, (200, 2))
TARGET = fv.Target.from_named(
    lambda p: -0.5 * jnp.sum(p["x"] ** 2) - p["rate"],
    {"x": ((2,), "real"), "rate": ((), "positive")},
)
VAE = fv.VAE(
    prior=fv.standard_normal(2),
    likelihood=fv.conditional(fv.bernoulli(4), MLP(2, (4,), 4)),
    posterior=fv.conditional(fv.gaussian(2), MLP(4, (4,), 4)),
)

FITS = {
    "density": (
        lambda: fv.fit_density(fv.maf(2, **AFFINE), X, key=KEY, num_steps=20, progress=False),
        None,
    ),
    "posterior": (
        lambda: fv.fit_posterior(
            TARGET, key=KEY, family=fv.full_rank(3), num_steps=20, progress=False
        ),
        TARGET,
    ),
    "model": (
        lambda: fv.fit_vae(VAE, np.tile(X > 500, 2), key=KEY, num_steps=20, progress=False),
        None,
    ),
}


@pytest.mark.slow  # all of it is tested elsewhere too
@pytest.mark.compilations(150)
@pytest.mark.filterwarnings("ignore::flowvi.PosteriorWarning")
@pytest.mark.parametrize("name", FITS)
def test_a_fit_samples_and_comes_back_from_a_file(name, tmp_path):
    fit, like = FITS[name]
    fitted = fit()
    fitted.save(tmp_path / "fitted.flowvi")
    again = fv.load(tmp_path / "fitted.flowvi", like=like)
    draws, same = (jax.tree.leaves(each.sample(KEY, 3)) for each in (fitted, again))
    assert all(np.isfinite(each).all() and len(each) == 3 for each in draws)
    for one, other in zip(draws, same, strict=True):
        np.testing.assert_array_equal(one, other)
    assert 0 < fitted.num_steps == again.num_steps <= 20
    assert len(repr(fitted)) < 300
