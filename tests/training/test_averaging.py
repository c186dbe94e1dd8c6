import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowvi.params import Fixed
from tests.training.helpers import quadratic, rows, run

SGD = optax.sgd(1.0)


def walk(params, key, batch):
    """A loss of slope -1: after t steps of SGD(1), params["t"] is t."""
    del key, batch
    return -params["t"]


def distance(params, key, batch):
    del key, batch
    return (params["t"] - 12.0) ** 2


def averages(num_steps, decay):
    """By the formula, in plain numpy."""
    average, result = 0.0, []
    for t in range(num_steps):
        now = min(decay, t / (t + 9))
        average = now * average + (1 - now) * (t + 1)
        result.append(average)
    return np.array(result)


walked = functools.partial(run, walk, {"t": np.zeros((), np.float32)}, SGD)


@pytest.mark.parametrize("decay", [0.5, 0.999])
def test_the_average_is_handed_back(decay):
    result = walked(num_steps=50, averaging=decay)
    np.testing.assert_allclose(result.params["t"], averages(50, decay)[-1], rtol=1e-5)
    assert result.last_params["t"] == 50


def test_the_average_is_validated():
    result = walked(averaging=0.8, validate=distance, validate_every=1)
    expected = averages(20, 0.8)
    np.testing.assert_allclose(result.history["validation"], (expected - 12) ** 2, rtol=1e-4)
    best = np.argmin((expected - 12) ** 2)
    assert result.best_step == best + 1
    np.testing.assert_allclose(result.params["t"], expected[best], rtol=1e-5)


def test_fixed_leaves_are_the_latest():
    def counting(params, key, batch):
        return walk(params, key, batch), {}, {**params, "seen": Fixed(params["seen"].value + 1)}

    start = {"t": np.zeros((), np.float32), "seen": Fixed(np.zeros((), np.float32))}
    result = run(counting, start, SGD, averaging=0.5)
    assert result.params["seen"].value == 20
    np.testing.assert_allclose(result.params["t"], averages(20, 0.5)[-1], rtol=1e-5)


def test_less_noise():
    # At a constant rate the last parameters wander about the optimum; their average does not.
    x, optimizer = rows(1000), optax.sgd(0.5)
    options = {"data": x, "batch_size": 5, "averaging": 0.99, "num_steps": 2000}
    result = run(quadratic, {"mean": np.zeros(3, np.float32)}, optimizer, **options)
    error = {
        name: float(np.abs(params["mean"] - x.mean(0)).max())
        for name, params in {"average": result.params, "last": result.last_params}.items()
    }
    assert error["average"] < error["last"] / 3


SCHEDULE_FREE = optax.contrib.schedule_free_adamw(0.1, warmup_steps=5)


@pytest.mark.parametrize(("chained", "averaging"), [(False, None), (True, 0.9)])
def test_a_schedule_free_optimizer_hands_back_what_it_evaluates_at(chained, averaging):
    optimizer = optax.chain(optax.identity(), SCHEDULE_FREE) if chained else SCHEDULE_FREE
    params = {"mean": np.zeros(3, np.float32), "extra": Fixed(np.ones(2, np.float32))}
    options = {"data": rows(), "averaging": averaging, "num_steps": 30}
    options |= {"validation_data": rows(), "validate_every": 10}
    result = run(quadratic, params, optimizer, **options)
    state = result.opt_state if averaging is None else result.opt_state.inner
    state = state[1] if chained else state
    last = {"mean": result.last_params["mean"], "extra": None}
    evaluated = jax.jit(optax.contrib.schedule_free_eval_params)(state, last)
    np.testing.assert_allclose(result.params["mean"], evaluated["mean"], rtol=1e-6)
    assert np.abs(result.params["mean"] - result.last_params["mean"]).max() > 1e-3
    np.testing.assert_array_equal(result.params["extra"].value, [1, 1])
    # The validation sees the same.
    loss = np.mean((rows() - np.asarray(result.params["mean"])) ** 2)
    assert result.best_step == 30
    np.testing.assert_allclose(result.history["validation"][-1], loss, rtol=1e-5)


def test_a_plain_optimizer_hands_back_the_last_parameters():
    result = walked()
    assert jnp.array_equal(result.params["t"], result.last_params["t"])
