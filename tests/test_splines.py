import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowvi.splines import RationalQuadraticSpline

INTERVAL, NUM_BINS = 4.0, 8


def ours(theta):
    raw = list(jnp.moveaxis(theta, -1, 0))
    return RationalQuadraticSpline(
        raw[:NUM_BINS], raw[NUM_BINS : 2 * NUM_BINS], raw[2 * NUM_BINS :], INTERVAL
    )


def theirs(theta):
    ends = jnp.zeros((*theta.shape[:-1], 1), theta.dtype)
    sizes, slopes = theta[..., : 2 * NUM_BINS], theta[..., 2 * NUM_BINS :]
    return distrax.RationalQuadraticSpline(
        jnp.concatenate([sizes, ends, slopes, ends], -1),
        range_min=-INTERVAL,
        range_max=INTERVAL,
        boundary_slopes="identity",
    )


def case():
    theta_key, x_key = jax.random.split(jax.random.key(0))
    theta = 1.5 * jax.random.normal(theta_key, (500, 3 * NUM_BINS - 1))
    return theta, 2.5 * jax.random.normal(x_key, (500,))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", ["forward_and_log_det", "inverse_and_log_det"])
class TestAgainstDistrax:
    def test_values(self, method):
        theta, x = case()
        for got, want in zip(
            getattr(ours(theta), method)(x), getattr(theirs(theta), method)(x), strict=True
        ):
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-10)

    def test_gradients(self, method):
        theta, x = case()

        def total(make):
            def value(theta, x):
                y, log_det = getattr(make(theta), method)(x)
                return jnp.sum(jnp.sin(y) + log_det)

            return jax.grad(value, (0, 1))(theta, x)

        for got, want in zip(total(ours), total(theirs), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-8)


class TestEdges:
    @pytest.mark.parametrize("method", ["forward_and_log_det", "inverse_and_log_det"])
    def test_outside_it_is_the_identity_with_finite_gradients(self, method):
        theta = case()[0][0]
        x = jnp.array([-jnp.inf, -1e30, -INTERVAL, INTERVAL, 1e30, jnp.inf])
        y, log_det = getattr(ours(theta), method)(x)
        assert (y == x).all()
        assert (log_det == 0).all()
        gradient = jax.grad(lambda t: getattr(ours(t), method)(x)[1].sum())(theta)
        assert (gradient == 0).all()

    def test_nan_stays_nan(self):
        assert jnp.isnan(ours(case()[0][0]).forward(jnp.nan))

    def test_it_is_continuous_at_the_knots_and_ends(self):
        theta = case()[0][0]
        x = jnp.linspace(-1.01 * INTERVAL, 1.01 * INTERVAL, 100_001)
        y, log_det = ours(theta).forward_and_log_det(x)
        assert (jnp.diff(y) >= 0).all()
        assert jnp.diff(y).max() < 3 * jnp.exp(log_det.max()) * jnp.diff(x).max()
        assert abs(jnp.diff(log_det)).max() < 0.05

    def test_same_as_knows_its_parameters(self):
        theta, _ = case()
        spline = ours(theta)
        assert spline.same_as(spline)
        assert not spline.same_as(ours(theta))
        assert not spline.same_as(distrax.ScalarAffine(0.0, 1.0))
