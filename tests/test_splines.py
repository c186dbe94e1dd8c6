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
    rng = np.random.default_rng(0)
    return 1.5 * rng.normal(size=(500, 3 * NUM_BINS - 1)), 2.5 * rng.normal(size=500)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", ["forward_and_log_det", "inverse_and_log_det"])
def test_values_and_gradients_are_those_of_distrax(method):
    def evaluate(make, theta, x):
        def value(theta, x):
            y, log_det = getattr(make(theta), method)(x)
            return jnp.sum(jnp.sin(y) + log_det), (y, log_det)

        return jax.grad(value, (0, 1), has_aux=True)(theta, x)

    run = jax.jit(lambda theta, x: [evaluate(make, theta, x) for make in (ours, theirs)])
    (slopes, values), (their_slopes, their_values) = run(*case())
    for got, want in zip(values, their_values, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-10)
    for got, want in zip(slopes, their_slopes, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-8)


class TestEdges:
    @pytest.mark.parametrize("method", ["forward_and_log_det", "inverse_and_log_det"])
    def test_outside_it_is_the_identity_with_finite_gradients(self, method):
        x = np.float32([-np.inf, -1e30, -INTERVAL, INTERVAL, 1e30, np.inf])

        @jax.jit
        def run(theta):
            gradient = jax.grad(lambda t: getattr(ours(t), method)(x)[1].sum())(theta)
            return *getattr(ours(theta), method)(x), gradient

        y, log_det, gradient = map(np.asarray, run(np.float32(case()[0][0])))
        assert (y == x).all()
        assert (log_det == 0).all()
        assert (gradient == 0).all()

    @pytest.mark.parametrize("method", ["forward_and_log_det", "inverse_and_log_det"])
    def test_nan_stays_nan_in_values_and_in_parameters(self, method):
        x = np.float32([-9.0, 0.0, 9.0, np.nan])
        run = jax.jit(lambda theta: getattr(ours(theta), method)(x))
        theta = np.float32(case()[0][0])
        for part, spoilt in zip(run(theta), run(np.nan * theta), strict=True):
            np.testing.assert_array_equal(np.isnan(part), [False, False, False, True])
            assert np.isnan(spoilt).all()

    def test_it_is_continuous_at_the_knots_and_ends(self):
        x = np.linspace(-1.01 * INTERVAL, 1.01 * INTERVAL, 100_001, dtype=np.float32)
        run = jax.jit(lambda t: ours(t).forward_and_log_det(x))
        y, log_det = map(np.asarray, run(np.float32(case()[0][0])))
        assert (np.diff(y) >= 0).all()
        assert np.diff(y).max() < 3 * np.exp(log_det.max()) * np.diff(x).max()
        assert abs(np.diff(log_det)).max() < 0.05

    def test_same_as_knows_its_parameters(self):
        raw = list(np.moveaxis(case()[0], -1, 0))
        make = lambda raw: RationalQuadraticSpline(raw[:8], raw[8:16], raw[16:], 4.0)  # noqa: E731
        spline = make(raw)
        assert spline.same_as(make(raw))
        assert not spline.same_as(make([a.copy() for a in raw]))
        assert not spline.same_as(distrax.ScalarAffine(0.0, 1.0))
