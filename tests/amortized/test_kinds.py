"""Other ways to an amortized posterior: a learned likelihood, rounds, the evidence, fresh pairs."""

import jax
import numpy as np
import pytest

import flowvi as fv
from flowvi.amortized import augmented
from flowvi.families.placed import Gaussianized
from tests.amortized.test_fit_amortized import (
    FAMILY,
    GAIN,
    KEY,
    PRIOR,
    SD,
    log_likelihood,
    simulator,
)
from tests.small import AFFINE

OBSERVED = np.array([0.8, -0.4])


def check_posterior(draws):
    np.testing.assert_allclose(draws.mean(0), GAIN * OBSERVED, atol=0.06)
    np.testing.assert_allclose(draws.std(0), SD, rtol=0.1)


@pytest.mark.slow
def test_pairs_of_a_learned_likelihood_are_as_good(monkeypatch):
    monkeypatch.setattr(augmented, "NUM_MADE", 20_000)
    options = {"family": FAMILY, "num_simulations": 2000, "progress": False, "num_steps": 500}
    found = fv.fit_amortized(PRIOR, simulator, key=KEY, augment=True, **options)
    check_posterior(found.sample(OBSERVED, KEY, 4000))


@pytest.mark.slow
def test_fresh_pairs_in_each_step():
    options = {"family": FAMILY, "num_steps": 500, "progress": False}
    found = fv.fit_amortized(PRIOR, simulator, key=KEY, num_simulations=None, **options)
    check_posterior(found.sample(OBSERVED, KEY, 4000))


@pytest.mark.slow
def test_the_evidence_of_observations_alone():
    x = np.random.default_rng(0).normal(size=(1000, 2)) / np.sqrt(GAIN)
    found = fv.fit_amortized(
        PRIOR,
        x=x,
        log_likelihood=log_likelihood,
        key=KEY,
        family=fv.iaf(2, context_size=2, **AFFINE),
        num_steps=1500,
        progress=False,
    )
    check_posterior(found.sample(OBSERVED, KEY, 4000))


@pytest.mark.slow
def test_rounds_for_one_observation():
    found = fv.fit_rounds(
        PRIOR,
        simulator,
        OBSERVED,
        key=KEY,
        num_rounds=2,
        num_simulations=3000,
        family=FAMILY,
        num_steps=400,
        progress=False,
    )
    check_posterior(found.sample(OBSERVED, KEY, 4000))
    with pytest.warns(fv.AmortizationWarning, match="fitted for one observation"):
        found.sample(-OBSERVED, KEY, 2)


@pytest.mark.slow
def test_a_target_of_a_learned_likelihood():
    family = fv.maf(2, context_size=2, **AFFINE)
    options = {"family": family, "num_simulations": 3000, "num_steps": 500, "progress": False}
    likelihood = fv.fit_likelihood(PRIOR, simulator, key=KEY, **options)
    theta = np.array([0.3, 0.2])
    assert abs(float(likelihood.log_prob(OBSERVED, theta) - log_likelihood(theta, OBSERVED))) < 0.2
    target = likelihood.target(OBSERVED)
    u = np.stack([GAIN * OBSERVED, GAIN * OBSERVED + SD])
    # Two coordinates, one standard deviation from the mode.
    drop = target(u)[0] - target(u)[1]
    assert abs(float(drop) - 1.0) < 0.25
    assert likelihood.sample(theta, jax.random.key(1), 7).shape == (7, 2)


@pytest.mark.slow
@pytest.mark.compilations(70)
def test_a_normal_is_kept_where_no_flow_is_better():
    options = {"num_simulations": 3000, "num_steps": 50, "progress": False}
    found = fv.fit_amortized(PRIOR, simulator, key=KEY, **options)
    assert isinstance(found.family, Gaussianized)
    draws, log_q = found.sample_and_log_prob(OBSERVED, KEY, 4000)
    check_posterior(draws)
    np.testing.assert_allclose(log_q, found.log_prob(OBSERVED, draws), atol=1e-3)
