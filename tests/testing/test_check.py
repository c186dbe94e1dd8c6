"""`check_bijector` passes healthy bijectors of any kind and rank, and says what it refuses."""

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorflow_probability.substrates import jax as tfp

import flowvi as fv
from flowvi.testing import PROPERTIES, check_bijector, perturbed

pytestmark = pytest.mark.usefixtures("quick_compilation")

X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
TANH = distrax.Block(distrax.Tanh(), 1)

HEALTHY = {
    "rank_0": (distrax.Sigmoid(), X[:, 0], {}),
    "rank_1": (TANH, X, {"order": (2, 0, 1)}),
    "rank_3": (distrax.Block(distrax.ScalarAffine(1.0, 2.0), 3), X[:, None, None], {}),
    "one_event_without_a_batch": (TANH, X[0], {}),
    "own_batch_shape": (
        distrax.Block(distrax.ScalarAffine(jnp.arange(4.0)[:, None], jnp.full((4, 1), 2.0)), 1),
        np.stack([X, -X]),
        {"batch_shape": (4,)},
    ),
    "function": (jnp.exp, X, {}),
    "tfp": (
        tfp.bijectors.ScaleMatvecTriL(jnp.array([[1.0, 0.0], [3.0, 2.0]])),
        X[:, :2],
        {"order": (0, 1)},
    ),
    "more_outputs_than_inputs": (tfp.bijectors.SoftmaxCentered(), X, {}),
    "too_large_for_the_jacobian": (TANH, X, {"order": (0, 1, 2), "max_autodiff_size": 2}),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_bijectors_pass(name):
    bijector, x, options = HEALTHY[name]
    check_bijector(bijector, x, **options)


class Bent(distrax.Bijector):
    """The identity, bent by the functions it is given."""

    def __init__(self, forward=lambda x: x, inverse=lambda y: y):
        super().__init__(event_ndims_in=1)
        self._bend, self._unbend = forward, inverse

    def forward_and_log_det(self, x):
        return self._bend(x), jnp.zeros(x.shape[:-1], x.dtype)

    def inverse_and_log_det(self, y):
        return self._unbend(y), jnp.zeros(y.shape[:-1], y.dtype)


def nan_at_large(x):
    return jnp.where(x > 0.5, jnp.nan, x)


@pytest.mark.parametrize(
    ("bijector", "message"),
    [
        (Bent(nan_at_large), r"finite: forward\(x\) is nan at row \d, coordinate \d"),
        (Bent(lambda x: x[..., :2]), r"shape: inverse\(y\) has shape \(4, 2\), expected \(4, 3\)"),
        (Bent(lambda x: np.pi * np.ones(3) * x), "dtype: .* float64 with 64-bit types enabled"),
        (Bent(inverse=lambda y: y + 1), r"round_trip: .*error 1, allowed 0\.000"),
        (Bent(lambda x: x[::-1], lambda y: y[::-1]), "batch: each row alone"),
        (Bent(inverse=lambda y: y if bool(y[0, 0] < 9) else -y), "jit: raised Tracer"),
    ],
)
def test_a_complaint_says_what_where_and_by_how_much(bijector, message):
    with pytest.raises(AssertionError, match=message):
        check_bijector(bijector, X)


def test_a_wrong_order_names_both_coordinates():
    bijector, x, _ = HEALTHY["tfp"]
    message = r"output 1 \(position 0 of the order\) depends on input 0 .*derivative 3, allowed 0"
    with pytest.raises(AssertionError, match=message):
        check_bijector(bijector, x, order=(1, 0))
    with pytest.raises(AssertionError, match="depends on inputs from position 1 on"):
        check_bijector(bijector, x, order=(1, 0), properties=["triangular"], max_autodiff_size=1)


def test_chosen_properties_only():
    check_bijector(Bent(inverse=lambda y: y + 1), X, properties=["shape", "dtype", "finite"])
    assert set(PROPERTIES) >= {"round_trip", "log_det", "triangular", "batch", "jit", "dtype"}


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (np.ones((2, 3), int), {}, TypeError, "`x` must have dtype float32 or float64; got int"),
        (1.0, {}, ValueError, r"`x` must have at least 1 axes .*got shape \(\)"),
        (np.ones((0, 3)), {}, ValueError, r"`x` must hold at least one event; got shape \(0, 3\)"),
        (np.full((2, 3), np.nan), {}, ValueError, "`x` must be finite"),
        (X, {"order": (0, 0, 1)}, ValueError, "`order` must hold each of 0, ..., 2 once"),
        (X, {"batch_shape": (5,)}, ValueError, r"`x` must have a shape that ends in \(5, 3\)"),
        (
            X,
            {"properties": ["lgo_det"]},
            ValueError,
            "`properties` must be out of shape, .*got 'lgo_det'",
        ),
        (X, {"max_autodiff_size": 0}, ValueError, "`max_autodiff_size` must be a positive integer"),
    ],
)
def test_bad_input_is_refused(x, options, error, message):
    with pytest.raises(error, match=message):
        check_bijector(TANH, x, **options)


def test_an_order_needs_vectors():
    with pytest.raises(ValueError, match=r"`order` must be None for .*event_ndims_in==0"):
        check_bijector(distrax.Tanh(), X, order=(0, 1, 2))


def test_perturbed_leaves_fixed_leaves_and_integers_alone():
    params = {"w": jnp.zeros(3), "fixed": fv.Fixed(jnp.ones(2)), "index": jnp.arange(2)}
    result = perturbed(params, 0.3, 0)
    assert jax.tree.structure(result) == jax.tree.structure(params)
    assert (result["w"] != 0).all()
    assert (result["fixed"].value == 1).all()
    assert (result["index"] == params["index"]).all()
    assert (perturbed(params, 0.3, 0)["w"] == result["w"]).all()
