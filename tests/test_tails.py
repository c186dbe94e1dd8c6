import jax
import numpy as np
import pytest
from scipy import stats

from flowvi.transformers import TailedSpline, as_transformer
from tests.tolerances import FLOAT64

TAILED = TailedSpline()


def raw(low=0.0, high=0.0, low_shape=0.0, high_shape=0.0):
    """theta of tails only: powers p, and shapes."""
    theta = np.zeros(TAILED.num_params)
    theta[-4:-2] = [2 * np.arctanh(np.log(p) / 2) if p else 0 for p in (low, high)]
    theta[-2:] = low_shape, high_shape
    return theta


@jax.jit
def both(theta, x):
    bijector = TAILED(theta)
    y, log_det = bijector.forward_and_log_det(x)
    back, inverse_log_det = bijector.inverse_and_log_det(y)
    slope = jax.vmap(jax.grad(bijector.forward))(x)
    parameters = jax.grad(lambda theta: TAILED(theta).forward(x).sum())(theta)
    return y, log_det, back, inverse_log_det, slope, parameters


@pytest.mark.usefixtures("x64")
def test_it_is_the_identity_and_inverts_with_the_right_slope():
    rng = np.random.default_rng(0)
    x = np.concatenate([5 * rng.normal(size=200), [0.01, 1.99, 2.01, -2.01]])
    np.testing.assert_allclose(both(np.zeros(TAILED.num_params), x)[0], x, atol=FLOAT64)
    for theta in (0.5 * rng.normal(size=TAILED.num_params), raw(2, 0.5, 1.0, -1.0)):
        y, log_det, back, inverse_log_det, slope, parameters = both(theta, x)
        np.testing.assert_allclose(back, x, rtol=FLOAT64, atol=FLOAT64)
        np.testing.assert_allclose(log_det, -inverse_log_det, rtol=FLOAT64, atol=FLOAT64)
        np.testing.assert_allclose(np.exp(log_det), slope, rtol=FLOAT64)
        assert np.isfinite(parameters).all()
        assert (np.diff(y[np.argsort(x)]) > 0).all()


@pytest.mark.usefixtures("x64")
def test_tails_have_the_laws_that_their_parameters_say():
    # Of a standard normal: exponential below, with survival exp(-2 (|y| - 2)); a power law above.
    theta = raw(2, 2, 0.0, 1.0)
    y = np.array([-60.0, -50.0, 1e5, 1e6])

    @jax.jit
    def log_density(theta, y):
        x, log_det = TAILED(theta).inverse_and_log_det(y)
        return jax.scipy.stats.norm.logpdf(x) + log_det

    found = log_density(theta, y)
    assert found[1] - found[0] == pytest.approx(20, abs=0.3)
    # For heavy tails the density falls as |y|^-2, up to the logarithm of a normal's own tail.
    assert (found[2] - found[3]) / np.log(10) == pytest.approx(2.0, abs=0.1)
    # A lighter tail than normal: p = 1/2.
    light = log_density(raw(0.5, 0.5), np.array([8.0]))
    assert light[0] < stats.norm.logpdf(8.0)


@pytest.mark.usefixtures("x64")
def test_a_shape_may_rise_again_from_below_zero():
    theta = raw(2, 2, -0.5, -0.5)
    parameters = both(theta, np.array([3.0, -3.0]))[-1]
    assert (np.abs(parameters[-2:]) > 0.1).all()


def test_by_name():
    assert as_transformer("tailed") == TAILED
    with pytest.raises(ValueError, match="`max_shape` must be positive"):
        TailedSpline(max_shape=0.0)
