"""All laws over the whole registry."""

import itertools

import jax
import pytest

from flowvi.testing import LAWS, check_bijector
from tests.registry import CONDITIONS, REGISTRY

#: Laws of form rather than of numbers: there, one precision and one condition are enough.
FORM = {"methods", "batch", "jit", "triangular"}


def conditions(case):
    return CONDITIONS if case.has_params else CONDITIONS[:1]


@pytest.mark.parametrize("name", REGISTRY)
def test_laws(name, quick_compilation):
    case = REGISTRY[name]
    # In one test, because precisions share the training, and conditions their compiled programs.
    for dtype, condition in itertools.product(["float64", "float32"], conditions(case)):
        whole = dtype == "float64" and condition == conditions(case)[-1]
        with jax.enable_x64(dtype == "float64"):
            sample = case.make(condition, dtype)
            try:
                check_bijector(
                    sample.bijector,
                    sample.x,
                    order=sample.order,
                    batch_shape=sample.batch_shape,
                    laws=[law for law in LAWS if whole or law not in FORM],
                )
            except AssertionError as error:
                raise AssertionError(f"{name}, parameters {condition}, {dtype}: {error}") from error
