import dataclasses
import gc
import pathlib
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi.compiling import KEPT, compiled


@dataclasses.dataclass(frozen=True)
class Power:
    exponent: int


@pytest.fixture
def traced():
    """The objects and shapes for which `power` was traced."""
    return []


@pytest.fixture
def power(traced):
    @compiled(static_argnums=(2,))
    def power(owner, x, count):
        traced.append((owner.exponent, x.shape, count))
        return jnp.broadcast_to(x**owner.exponent, (count, *x.shape))

    return power


def test_equal_objects_share_a_program_and_shapes_do_not(power, traced):
    for _ in range(2):
        np.testing.assert_array_equal(power(Power(2), jnp.arange(3.0), 2), [[0, 1, 4]] * 2)
    power(Power(2), jnp.arange(4.0), 2)
    power(Power(2), jnp.arange(3.0), 1)
    assert traced == [(2, (3,), 2), (2, (4,), 2), (2, (3,), 1)]


def test_several_objects():
    @compiled(2)
    def both(first, second, x):
        return x**first.exponent + second.exponent

    assert both(Power(2), Power(5), 3.0) == 14
    assert both(Power(2), Power(6), 3.0) == 15


def test_the_last_objects_are_kept(power, traced):
    for exponent in range(KEPT + 1):
        power(Power(exponent), jnp.ones(1), 1)
    power(Power(1), jnp.ones(1), 1)
    assert len(traced) == KEPT + 1
    power(Power(0), jnp.ones(1), 1)
    assert len(traced) == KEPT + 2


@pytest.mark.slow
def test_programs_and_objects_are_freed(power):
    def live():
        gc.collect()
        return len(jax.local_devices()[0].client.live_executables())

    first = Power(0)
    kept = weakref.ref(first)
    power(first, jnp.ones(1), 1)
    before = live()
    for exponent in range(1, 2 * KEPT):
        power(Power(exponent), jnp.ones(1), 1)
    del first
    assert live() - before < KEPT
    assert kept() is None


def test_no_other_function_keeps_programs_of_objects():
    """Static arguments of `jax.jit` stay for good; those of `testing/trial.py` are names."""
    package = pathlib.Path(fv.__file__).parent
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if re.search(r"jax\.jit[(,][^)]*static_arg", path.read_text())
    }
    assert found == {"compiling.py", "testing/trial.py"}
