"""All laws over the whole registry."""

import jax
import pytest

from flowvi.testing import LAWS, check_bijector
from tests.registry import CONDITIONS, REGISTRY

#: Laws of form rather than of numbers: there, one precision and one condition are enough.
FORM = {"shape", "methods", "batch", "jit", "triangular"}


def runs(case):
    """Precisions and conditions to try, and whether all laws are held, or those of numbers only."""
    if not case.has_params:
        return [("float64", "start", True), ("float32", "start", False)]
    return [
        (dtype, condition, (dtype, condition) == ("float64", "trained"))
        for dtype in ("float64", "float32")
        for condition in CONDITIONS
    ]


@pytest.mark.parametrize("name", REGISTRY)
def test_laws(name, quick_compilation):
    case = REGISTRY[name]
    # In one test, because precisions share the training, and conditions their compiled programs.
    for dtype, condition, whole in runs(case):
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
