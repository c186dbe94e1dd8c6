"""Planted mistakes, each of which `check_bijector` must catch and name."""

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
X = jax.random.normal(jax.random.key(0), (4, 3))


def conditioner(network=NETWORK):
    return network.bind(perturbed(network.init(jax.random.key(1)), 0.7, 2))


class Healthy(fv.IAF):
    """An affine layer, for the mutants to be compared with."""

    def __init__(self, network=NETWORK):
        super().__init__(conditioner(network), Affine())


def caught(bijector, law, **options):
    with pytest.raises(AssertionError, match=rf"breaks \d+ of \d+ laws:[\s\S]*\n  {law}: "):
        check_bijector(bijector, X, order=ORDER, **options)


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


@pytest.mark.parametrize(("shift", "law"), [(0, "log_det"), (1, "triangular")])
def test_a_mask_off_by_one(monkeypatch, shift, law):
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
    caught(bijector, law, laws=["log_det", "triangular"])


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
