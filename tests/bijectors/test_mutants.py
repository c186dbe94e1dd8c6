"""Planted mistakes, each of which `check_bijector` must catch and name."""

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi import masked
from flowvi.masked import MaskedNetwork
from flowvi.testing import check_bijector, perturbed
from flowvi.transformers import Affine

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Without hidden layers, for a quick compilation: a mutant is one whatever it is made of.
NETWORK = MaskedNetwork(3, (), 2)
ORDER = (0, 1, 2)
X = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


def conditioner(network=NETWORK):
    return network.bind(perturbed(network.init(jax.random.key(1)), 0.7, 2))


class Healthy(fv.IAF):
    """An affine layer, for the mutants to be compared with."""

    def __init__(self, network=NETWORK):
        super().__init__(conditioner(network), Affine())


def caught(bijector, name, properties=None):
    properties = [name] if properties is None else properties
    with pytest.raises(AssertionError, match=rf"breaks \d+ of \d+ properties:[\s\S]*\n  {name}: "):
        check_bijector(bijector, X, order=ORDER, properties=properties)


@pytest.mark.compilations(60)
def test_the_healthy_one_passes():
    check_bijector(Healthy(), X, order=ORDER)


def test_sign_error_in_the_log_det():
    class Mutant(Healthy):
        def forward_and_log_det(self, x):
            y, log_det = super().forward_and_log_det(x)
            return y, -log_det

    caught(Mutant(), "log_det")


def test_one_dimension_missing_from_the_log_det():
    class Mutant(Healthy):
        def forward_and_log_det(self, x):
            y, log_det = self._scalar_bijector(x).forward_and_log_det(x)
            return y, log_det[..., :-1].sum(-1)

    caught(Mutant(), "log_det")


@pytest.mark.parametrize(("shift", "name"), [(0, "log_det"), (1, "triangular")])
def test_a_mask_off_by_one(monkeypatch, shift, name):
    def off_by_one(network, params):
        first, (_, b) = original(network, params)
        degrees = np.asarray(network.degrees[1])[:, None]
        columns = np.repeat(network.degrees[-1], network.num_params)
        # "<=" in the place of "<": a parameter sees its own coordinate, or even the next one.
        return [first, (jnp.where(degrees <= columns + shift, params["layers"][1]["w"], 0), b)]

    original = masked.weights
    monkeypatch.setattr(masked, "weights", off_by_one)
    # A description of its own: programs are cached by it.
    bijector = Healthy(MaskedNetwork(3, (9 + shift,), 2))
    caught(bijector, name, properties=["log_det", "triangular"])


def test_an_inverse_stopped_one_step_early():
    class Mutant(Healthy):
        def inverse_and_log_det(self, y):
            x = jnp.zeros_like(y)
            for _ in range(y.shape[-1] - 1):
                x, log_det = self._scalar_bijector(x).inverse_and_log_det(y)
            return x, log_det.sum(-1)

    caught(Mutant(), "round_trip")


def test_a_log_det_of_the_wrong_dtype():
    class Mutant(Healthy):
        def forward_and_log_det(self, x):
            y, log_det = super().forward_and_log_det(x)
            return y, log_det.astype(jnp.float16)

    caught(Mutant(), "dtype")


def test_an_inverse_right_only_for_batch_size_one():
    class Mutant(Healthy):
        def inverse_and_log_det(self, y):
            x, log_det = super().inverse_and_log_det(y)
            rows = x.reshape(-1, x.shape[-1])
            # A sum over the wrong axis does nothing to one row.
            return (x + (rows.sum(0) - rows[:1].sum(0)) * 1e-2), log_det

    caught(Mutant(), "batch")


@pytest.mark.parametrize("what", ["x", "log_det"])
def test_an_inverse_that_stops_gradients(what):
    class Mutant(Healthy):
        def inverse_and_log_det(self, y):
            x, log_det = super().inverse_and_log_det(y)
            if what == "x":
                return jax.lax.stop_gradient(x), log_det
            return x, jax.lax.stop_gradient(log_det)

    caught(Mutant(), "inverse_jacobian")


def test_an_inverse_whose_parameters_stop_gradients():
    class Mutant(Healthy):
        def inverse_and_log_det(self, y):
            x, _ = super().inverse_and_log_det(y)
            scalar = self._scalar_bijector(jax.lax.stop_gradient(x))
            x, log_det = scalar.inverse_and_log_det(y)
            return x, log_det.sum(-1)

    caught(Mutant(), "inverse_jacobian")


def test_a_false_claim_of_a_constant_jacobian():
    class Mutant(Healthy):
        @property
        def is_constant_jacobian(self):
            return True

    caught(Mutant(), "constant_jacobian")


@pytest.mark.parametrize("num_rows", [1, 4])
def test_a_false_claim_of_a_constant_log_det(num_rows):
    bijector = distrax.Block(distrax.Lambda(jnp.sinh, is_constant_jacobian=True), 1)
    with pytest.raises(AssertionError, match="is_constant_log_det` is True: the derivative of the"):
        check_bijector(bijector, X[:num_rows], properties=["constant_jacobian"])


def test_a_false_claim_of_a_constant_jacobian_of_constant_determinant():
    class Shear(distrax.Bijector):
        """y_1 = x_1 + x_0^2: its log-determinant is zero at all rows."""

        def __init__(self):
            super().__init__(event_ndims_in=1, is_constant_jacobian=True)

        def forward_and_log_det(self, x):
            return x.at[..., 1].add(x[..., 0] ** 2), jnp.zeros(x.shape[:-1])

        def inverse_and_log_det(self, y):
            return y.at[..., 1].add(-(y[..., 0] ** 2)), jnp.zeros(y.shape[:-1])

    with pytest.raises(AssertionError, match="is_constant_jacobian` is True: the derivative of f"):
        check_bijector(Shear(), X)
