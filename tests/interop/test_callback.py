"""Log densities that are no functions of JAX."""

import ctypes
import shutil
import subprocess
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import flowvi as fv
from tests.tolerances import FLOAT64

SCALE = np.array([[2.0, 0.7, 0.0], [0.7, 1.0, 0.3], [0.0, 0.3, 0.5]])
MEAN = np.array([1.0, -2.0, 0.5])
NORMAL = scipy.stats.multivariate_normal(MEAN, SCALE)
PRECISION = np.linalg.inv(SCALE)


def by_scipy(u):
    return NORMAL.logpdf(u), -PRECISION @ (u - MEAN)


def test_values_and_gradients_are_those_of_the_function(x64):
    target = fv.Target.from_callback(by_scipy, 3)
    assert not target.twice_differentiable and target.expensive
    u = np.random.default_rng(0).normal(size=(2, 5, 3))

    @jax.jit
    def program(u):
        one = lambda u: target.at(u, None)  # noqa: E731
        return jax.vmap(jax.vmap(jax.value_and_grad(one)))(u)

    values, gradients = program(u)
    np.testing.assert_allclose(values, NORMAL.logpdf(u), rtol=FLOAT64)
    np.testing.assert_allclose(gradients, -(u - MEAN) @ PRECISION, rtol=FLOAT64)
    np.testing.assert_allclose(target(u), values, rtol=FLOAT64)
    assert isinstance(target(u[0, 0]).item(), float)


def test_named_parameters_have_their_jacobian(x64):
    def value_and_grad(x):  # an exponential rate and a normal mean
        return -x[0] - 0.5 * x[1:] @ x[1:], np.concatenate([[-1.0], -x[1:]])

    parameters = {"rate": ((), "positive"), "mean": ((2,), "real")}
    target = fv.Target.from_callback(value_and_grad, parameters=parameters)
    by_hand = fv.Target.from_named(lambda p: -p["rate"] - 0.5 * jnp.sum(p["mean"] ** 2), parameters)
    u = np.random.default_rng(0).normal(size=(4, 3))
    np.testing.assert_allclose(target(u), by_hand(u), rtol=FLOAT64)


def test_calls_run_at_once():
    at_once, most, lock = [0], [0], threading.Lock()

    def value_and_grad(u):
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.01)
        with lock:
            at_once[0] -= 1
        return -0.5 * u @ u, -u

    u = np.zeros((8, 2))
    fv.Target.from_callback(value_and_grad, 2, num_threads=4)(u)
    assert most[0] > 1
    most[0] = 0
    fv.Target.from_callback(value_and_grad, 2, num_threads=1)(u)
    assert most[0] == 1


C = """
double banana(const double *u, double *gradient) {
    double bend = u[1] - u[0] * u[0];
    gradient[0] = -u[0] + 4 * bend * u[0];
    gradient[1] = -2 * bend;
    return -0.5 * u[0] * u[0] - bend * bend;
}
"""


def compiled(folder):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    source, library = folder / "banana.c", folder / "banana.so"
    source.write_text(C)
    subprocess.run(
        [compiler, "-O2", "-shared", "-fPIC", str(source), "-o", str(library)], check=True
    )
    banana = ctypes.CDLL(str(library)).banana
    vector = np.ctypeslib.ndpointer(float, 1, flags="C_CONTIGUOUS")
    banana.restype, banana.argtypes = ctypes.c_double, [vector, vector]

    def value_and_grad(u):
        gradient = np.empty(2)
        return banana(u, gradient), gradient

    return value_and_grad


def test_compiled_code_of_c(tmp_path, x64):
    target = fv.Target.from_callback(compiled(tmp_path), 2)
    u = np.random.default_rng(0).normal(size=(7, 2))
    expected = -0.5 * u[:, 0] ** 2 - (u[:, 1] - u[:, 0] ** 2) ** 2
    np.testing.assert_allclose(target(u), expected, rtol=FLOAT64)


@pytest.mark.slow
@pytest.mark.compilations(90)
def test_a_posterior_of_compiled_code(tmp_path, x64):
    target = fv.Target.from_callback(compiled(tmp_path), 2)
    options = {"num_steps": 1_000, "num_samples": 64, "progress": False}
    posterior = fv.fit_posterior(target, key=jax.random.key(0), **options)
    assert posterior.diagnosis.khat < 0.7
    found = posterior.log_evidence(jax.random.key(1))
    assert abs(found.value - np.log(2 * np.pi / np.sqrt(2))) < 0.05


BAD = {
    "no function": (3, TypeError, "`value_and_grad` must be a function of a vector; got 3"),
    "value alone": (lambda u: 1.0, TypeError, r"must return a pair \(value, gradient\); got 1.0"),
    "gradient": (
        lambda u: (1.0, np.ones(3)),
        ValueError,
        r"a gradient of shape \(2,\); got shapes \(\) and \(3,\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_functions(name):
    function, error, match = BAD[name]
    with pytest.raises(error, match=match):
        fv.Target.from_callback(function, 2)


def test_bad_sizes():
    with pytest.raises(ValueError, match="`event_size` must be given, or else `parameters`"):
        fv.Target.from_callback(by_scipy)
    with pytest.raises(ValueError, match="`num_threads` must be a positive integer; got 0"):
        fv.Target.from_callback(by_scipy, 3, num_threads=0)
