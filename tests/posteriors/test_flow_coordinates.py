"""The target where the flow comes from, for samplers of other libraries."""

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi.posteriors import default_family
from flowvi.testing import perturbed
from tests.interop import unfitted
from tests.tolerances import FLOAT64, STANDARD_ERRORS


def banana(p):
    return -0.5 * p["x"] ** 2 - 2.0 * (p["y"] - p["x"] ** 2) ** 2


TARGET = fv.Target.from_named(banana, {"x": ((), "real"), "y": ((), "real")})


def test_the_density_is_that_of_the_flow_moved(x64):
    """Log p(f(z)) + log det f'(z), and what a flow without error would have: that of its base."""
    family = fv.iaf(2, num_layers=2, hidden_sizes=(8,), transformer="affine")
    params = perturbed(family.init(jax.random.key(0)), 0.3, seed=0)
    posterior = unfitted(fv.Target(lambda u: family.log_prob(params, u), 2), family, params)
    flow = posterior.flow_coordinates()
    z = np.random.default_rng(0).normal(size=(2, 5, 2))

    @jax.jit
    def program(z):
        return jax.vmap(jax.vmap(flow.log_density))(z), flow.unconstrained(z)

    densities, u = program(z)
    expected = jax.scipy.stats.norm.logpdf(z).sum(-1)
    np.testing.assert_allclose(densities, expected, rtol=FLOAT64, atol=FLOAT64)
    np.testing.assert_allclose(flow.constrain(z), u, rtol=FLOAT64)
    assert flow.sample(jax.random.key(0), 3).shape == (3, 2) and flow.event_size == 2


def test_mixtures_have_no_coordinates():
    family = fv.mixture(2, 2)
    posterior = unfitted(fv.Target(lambda u: -jnp.sum(u**2), 2), family)
    with pytest.raises(TypeError, match="`family` must be a map of a base, as flows are"):
        posterior.flow_coordinates()


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.compilations(150)
@pytest.mark.filterwarnings("ignore::flowvi.PosteriorWarning")  # so short a fit is not right alone
def test_nuts_of_blackjax_in_flow_coordinates(x64):
    family = default_family(2)
    options = {"family": family, "num_steps": 800, "num_samples": 64, "progress": False}
    posterior = fv.fit_posterior(TARGET, key=jax.random.key(0), **options)
    flow = posterior.flow_coordinates()

    def chain(key, z):
        warmup = blackjax.window_adaptation(blackjax.nuts, flow.log_density)
        (state, tuned), _ = warmup.run(key, z, 300)
        step = blackjax.nuts(flow.log_density, **tuned).step
        keys = jax.random.split(key, 1_000)
        return jax.lax.scan(lambda s, k: (step(k, s)[0], s.position), state, keys)[1]

    keys = jax.random.split(jax.random.key(1), 4)
    z = jax.jit(jax.vmap(chain))(keys, flow.sample(jax.random.key(2), 4))
    draws = flow.constrain(z)
    # x is standard normal, and y is x^2 and noise of half a standard deviation.
    ess = jax.jit(blackjax.ess)
    for x, expected in [(draws["x"], 0.0), (draws["x"] ** 2, 1.0), (draws["y"], 1.0)]:
        error = x.std() / np.sqrt(ess(x))
        assert error < 0.1
        assert abs(x.mean() - expected) < STANDARD_ERRORS * error
