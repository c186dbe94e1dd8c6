"""Calibration: what is right passes, and what is too narrow is caught."""

import warnings

import jax
import matplotlib.pyplot as plt
import numpy as np
import pytest

import flowvi as fv
from flowvi.calibration.uniform import band, uniformity

KEY = jax.random.key(0)


class Scaled:
    """Of theta from N(0, 1) and x from N(theta, 1): the posterior, with its sds times a factor."""

    def __init__(self, factor):
        self.sd = factor * np.sqrt(0.5)

    def sample_and_log_prob(self, x, key, num_samples):
        noise = np.asarray(jax.random.normal(key, (num_samples, *np.shape(x))))
        return np.asarray(x) / 2 + self.sd * noise, -0.5 * (noise**2).sum(-1)

    def sample(self, x, key, num_samples):
        return self.sample_and_log_prob(x, key, num_samples)[0]

    def log_prob(self, x, theta):
        return -0.5 * (((theta - x / 2) / self.sd) ** 2).sum(-1)


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    theta = rng.normal(size=(1000, 3))
    return theta, theta + rng.normal(size=theta.shape)


def test_the_right_posterior_is_calibrated(pairs):
    found = fv.calibrate(Scaled(1.0), *pairs, key=KEY)
    assert found.messages == () and min(each.p_value for each in found.parts.values()) > 0.05
    assert abs(found.excess.value) < 4 * found.excess.standard_error
    assert "inside of" in str(found) and "outside of" not in str(found)
    plt.close(found.plot())


def test_narrow_posteriors_are_caught(pairs):
    with pytest.warns(fv.CalibrationWarning, match="overconfident"):
        found = fv.calibrate(Scaled(0.7), *pairs, key=KEY)
    assert all(each.p_value < 0.01 for each in found.parts.values())
    assert found.excess.value < -10 * found.excess.standard_error
    assert found.ranks.spread.value > 0.2 and found.tarp.spread.value > 0.2


def test_wide_posteriors_are_not_called_overconfident(pairs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fv.calibrate(Scaled(1.4), *pairs, key=KEY)
    assert found.excess.value > 0.1 and found.ranks.p_value < 0.01


def test_a_function_from_data_to_posteriors(pairs):
    class One:
        def __init__(self, x):
            self.x = x

        def sample(self, key, number):
            return Scaled(0.5).sample(self.x, key, number)

    theta, x = (each[:200] for each in pairs)
    with pytest.warns(fv.CalibrationWarning, match="crowd"):
        found = fv.calibrate(One, theta, x, key=KEY, num_draws=100)
    assert found.coverage is None


def test_bands_hold_what_they_promise():
    rng = np.random.default_rng(3)
    places, lower, upper = band(300, 2)
    inside, refused = 0, 0
    for _ in range(400):
        values = rng.random((300, 2))
        below = np.stack([np.searchsorted(np.sort(c), places, "right") / 300 for c in values.T])
        inside += bool(((below >= lower) & (below <= upper)).all())
        refused += uniformity(values).p_value < 0.05
    # 20 of 400 are expected, with a standard deviation of 4.4.
    assert abs(400 - inside - 20) < 18 and abs(refused - 20) < 18


@pytest.mark.slow
def test_the_local_test_sees_a_narrow_posterior(pairs):
    right, narrow = (
        fv.local_c2st(Scaled(s), *pairs, pairs[1][0], key=KEY, num_null=19) for s in (1.0, 0.6)
    )
    assert right.p_value > 0.05 >= narrow.p_value
    assert narrow.statistic > 2 * max(narrow.null.max(), right.statistic)
    assert "is told from" in str(narrow)
    plt.close(narrow.plot())


def test_bad_input(pairs):
    theta, x = pairs
    with pytest.raises(ValueError, match="`x` must have a row for each of the 1000 rows"):
        fv.calibrate(Scaled(1.0), theta, x[:-1], key=KEY)
    with pytest.raises(TypeError, match="`posterior` must be an `AmortizedPosterior`, or a funct"):
        fv.calibrate(3, theta, x, key=KEY)
    with pytest.warns(RuntimeWarning, match="50 pairs tell little"):
        fv.calibrate(Scaled(1.0), theta[:50], x[:50], key=KEY)
