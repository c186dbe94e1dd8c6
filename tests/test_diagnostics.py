import numpy as np
import pytest

from flowvi import diagnostics
from tests.tolerances import STANDARD_ERRORS


def normal_weights(scale, size=20_000, seed=0):
    """Log weights of a standard normal target under draws of a normal of another scale."""
    x = scale * np.random.default_rng(seed).normal(size=size)
    return -0.5 * x**2 + 0.5 * (x / scale) ** 2 + np.log(scale)


def test_elbo_is_minus_the_kl_divergence():
    estimate = diagnostics.elbo(normal_weights(0.7))
    exact = -(-np.log(0.7) + 0.5 * (0.7**2 - 1))
    assert abs(estimate.value - exact) < STANDARD_ERRORS * estimate.standard_error
    assert 0 < estimate.standard_error < 0.01


def test_log_evidence_of_a_normalised_target_is_zero():
    # Weights up to e^40, so that a plain exponential would overflow.
    estimate = diagnostics.log_evidence(normal_weights(1.5) + 1000.0)
    assert abs(estimate.value - 1000.0) < STANDARD_ERRORS * estimate.standard_error
    # The standard error is that of repetitions.
    values = [diagnostics.log_evidence(normal_weights(1.5, 2_000, s)).value for s in range(200)]
    one = diagnostics.log_evidence(normal_weights(1.5, 2_000))
    assert abs(np.std(values) / one.standard_error - 1) < 0.3


def test_effective_sample_size():
    assert diagnostics.effective_sample_size(np.zeros(10)) == 1.0
    assert diagnostics.effective_sample_size([0.0, -np.inf]) == 0.5
    assert diagnostics.effective_sample_size([-np.inf, -np.inf]) == 0.0
    # E[w]^2 / E[w^2] of two normals: sqrt(2 s^2 - 1) / s^2.
    exact = np.sqrt(2 * 1.5**2 - 1) / 1.5**2
    assert abs(diagnostics.effective_sample_size(normal_weights(1.5)) - exact) < 0.02


@pytest.mark.parametrize("shape", [0.2, 0.6, 0.9])
def test_khat_is_the_tail_of_the_weights(shape):
    weights = np.random.default_rng(0).pareto(1 / shape, size=50_000) + 1
    assert abs(diagnostics.psis(np.log(weights)).khat - shape) < 0.1


def test_smoothed_weights_are_normalised_and_keep_their_order():
    log_weights = normal_weights(0.8)
    smoothed = diagnostics.psis(log_weights)
    assert abs(np.exp(smoothed.log_weights).sum() - 1) < 1e-9
    order = np.argsort(log_weights)
    assert (np.diff(smoothed.log_weights[order]) >= 0).all()
    # The bulk keeps its ratios.
    bulk = order[:10_000]
    np.testing.assert_allclose(
        np.diff(smoothed.log_weights[bulk]), np.diff(log_weights[bulk]), atol=1e-9
    )
    assert smoothed.ess == diagnostics.effective_sample_size(smoothed.log_weights)


@pytest.mark.parametrize("scale", [0.6, 0.8, 1.3])
def test_psis_agrees_with_arviz(scale):
    base = pytest.importorskip("arviz_stats.base", reason="arviz-stats is not installed")
    log_weights = normal_weights(scale)
    # It takes log likelihoods, whose weights are their inverses.
    expected, khat = base.array_stats.psislw(-log_weights)
    ours = diagnostics.psis(log_weights)
    assert abs(ours.khat - float(khat)) < 1e-6
    np.testing.assert_allclose(ours.log_weights, expected, atol=1e-6)


def test_equal_weights_are_no_cause_for_alarm():
    assert diagnostics.psis(np.full(1000, 3.0)).khat < 0.7
    noise = 1e-12 * np.random.default_rng(0).standard_t(2, size=1000)
    assert diagnostics.psis(3.0 + noise).khat < 0.7


@pytest.mark.parametrize(
    "function",
    [
        diagnostics.elbo,
        diagnostics.log_evidence,
        diagnostics.effective_sample_size,
        diagnostics.psis,
    ],
)
def test_bad_input(function):
    with pytest.raises(ValueError, match=r"`log_weights` must have shape \[num_samples\]"):
        function(np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"`log_weights` must not be NaN; got 1 of 2"):
        function([0.0, np.nan])
