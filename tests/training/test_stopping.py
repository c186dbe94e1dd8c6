"""Why training ends, what a callback sees, and what comes back then."""

import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowvi.training import Plateau, StopReason
from flowvi.training.stopping import PlateauWatch
from tests.training.helpers import quadratic, rows, run, start


@pytest.fixture(autouse=True)
def heeds_ctrl_c():
    """A process started in the background ignores Ctrl-C, and so would the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def every_step(monkeypatch):
    monkeypatch.setattr("flowvi.training.record.PACE_SECONDS", 0.0)


SGD = optax.sgd(1.0)


def walk(params, key, batch):
    """A loss of slope -1: after t steps of SGD(1), params["t"] is t."""
    del key, batch
    return -params["t"], {"t": params["t"]}


def bowl(params, key, batch):
    """Its least value is at t = 12."""
    del key, batch
    return (params["t"] - 12.0) ** 2


def walked(**options):
    return run(walk, {"t": np.zeros((), np.float32)}, SGD, **options)


def test_a_hopeless_run_ends():
    def is_hopeless(history):
        assert history["validation_step"].tolist() == list(range(5, 5 * len(seen) + 6, 5))
        seen.append(history["validation"][-1])
        return seen[-1] < 10

    seen = []
    result = walked(validate=bowl, validate_every=5, is_hopeless=is_hopeless)
    assert (seen, result.num_steps) == ([49.0, 4.0], 10)
    assert result.stop_reason is StopReason.HOPELESS
    with pytest.raises(ValueError, match="positive integer where `is_hopeless` is given"):
        walked(is_hopeless=is_hopeless)


def test_best_parameters():
    result = walked(validate=bowl, validate_every=5)
    np.testing.assert_array_equal(result.history["validation_step"], [5, 10, 15, 20])
    np.testing.assert_array_equal(result.history["validation"], [49.0, 4.0, 9.0, 64.0])
    assert result.best_step == 10
    assert result.params["t"] == 10
    assert result.last_params["t"] == 20
    assert result.stop_reason is StopReason.MAX_STEPS
    assert "best_step=10, validation=4" in repr(result)


def test_the_last_step_is_validated():
    result = walked(num_steps=12, validate=bowl, validate_every=5)
    np.testing.assert_array_equal(result.history["validation_step"], [5, 10, 12])
    assert result.best_step == 12


@pytest.mark.parametrize(("patience", "stop"), [(1, 15), (2, 20), (100, 30)])
def test_patience(patience, stop):
    result = walked(num_steps=30, validate=bowl, validate_every=5, patience=patience)
    assert result.num_steps == stop
    assert result.stop_reason == ("max_steps" if stop == 30 else "patience")
    assert result.params["t"] == 10
    assert len(result.history["loss"]) == stop
    assert result.history["validation_step"][-1] == stop


def test_validation_of_nan_is_no_improvement():
    def validate(params, key, batch):
        del key
        return jnp.where(params["t"] > batch[0], jnp.nan, bowl(params, None, None))

    options = {"validate": validate, "validate_every": 5}
    result = walked(validation_data=np.array([6.0]), patience=2, **options)
    assert result.num_steps == 15
    assert result.best_step == 5
    message = "validation loss was NaN in all 4 validations, so the result has the last parameters"
    with pytest.warns(RuntimeWarning, match=message):
        result = walked(validation_data=np.array([-1.0]), **options)
    assert result.best_step is None
    assert result.params["t"] == 20


def test_validation_sees_its_data_and_one_key():
    def validate(params, key, batch):
        del params
        return batch["offset"] + jax.random.uniform(key), {"twice": 2 * batch["offset"]}

    data = {"offset": 5.0}
    result = walked(num_steps=4, validate=validate, validate_every=1, validation_data=data)
    assert len(np.unique(result.history["validation"])) == 1
    assert 5 < result.history["validation"][0] < 6
    np.testing.assert_array_equal(result.history["validation_twice"], [10.0] * 4)


def test_loss_validates_by_default():
    held_out = rows(10)
    options = {"data": rows(), "validation_data": held_out, "validate_every": 1}
    result = run(quadratic, start(), optax.sgd(0.0), num_steps=1, **options)
    np.testing.assert_allclose(result.history["validation"], [np.mean(held_out**2)], rtol=1e-6)


def test_callback_sees_and_stops(every_step):
    seen, taken = [], []

    def callback(progress):
        seen.append(progress)
        taken.append(progress.params)
        return progress.step == 7

    result = walked(callback=callback, validate=bowl, validate_every=5)
    assert result.stop_reason == "callback"
    assert (result.num_steps, result.last_params["t"], result.params["t"]) == (7, 7, 5)
    last = seen[-1]
    assert (last.step, last.num_steps, last.best_step, last.num_bad_steps) == (7, 20, 5, 0)
    assert last.validation == 49.0
    assert last.loss == pytest.approx(-3.0)
    assert last.metrics == {"t": 6.0}
    assert last.steps_per_second > 0
    assert seen[0].validation is None
    # What was taken survives the steps that follow.
    assert [float(params["t"]) for params in taken] == list(range(1, 8))


def interrupts(progress):
    if progress.step == 3:
        raise KeyboardInterrupt


def test_an_interrupting_callback(every_step):
    with pytest.warns(RuntimeWarning, match="Interrupted after 3 of 20 steps: .* is returned"):
        result = walked(callback=interrupts)
    assert result.stop_reason is StopReason.INTERRUPTED
    assert (result.num_steps, result.params["t"]) == (3, 3)


def test_ctrl_c_returns_what_was_learned(every_step):
    def callback(progress):
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.warns(RuntimeWarning, match="Interrupted after 4 of 20 steps") as caught:
        result = walked(callback=callback)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    assert result.stop_reason is StopReason.INTERRUPTED
    # The signal came after step 3, and the end of the next chunk obeys it.
    assert result.num_steps == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_does_not_wait():
    def callback(progress):
        del progress
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    with pytest.warns(RuntimeWarning, match="Interrupted after"):
        assert walked(callback=callback).stop_reason == "interrupted"


def test_handlers_of_others_are_left_alone():
    seen = []
    old = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        result = walked(callback=lambda progress: signal.raise_signal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, old)
    assert seen
    assert result.stop_reason == "max_steps"


def test_fits_in_another_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(walked(num_steps=5)))
    thread.start()
    thread.join()
    assert results[0].num_steps == 5


def test_an_error_of_a_callback_carries_the_result(every_step):
    def callback(progress):
        if progress.step == 3:
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        walked(callback=callback, validate=bowl, validate_every=2)
    result = caught.value.result
    assert (result.stop_reason, result.num_steps) == (StopReason.ERROR, 3)
    assert (result.params["t"], result.last_params["t"]) == (2, 3)
    assert caught.value.__notes__ == [
        "What fit had learned in 3 steps is this exception's `result`."
    ]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --------------------------------------------------------------------------------------- plateau


def hill(params, key, batch):
    del batch
    return jnp.sum(params**2) + jax.random.normal(key)


def test_stops_when_the_loss_stops_improving(monkeypatch):
    ends = set()
    for seconds in (0.25, 0.0, 1e9):
        monkeypatch.setattr("flowvi.training.record.PACE_SECONDS", seconds)
        options = {"num_steps": 20_000, "plateau": Plateau(window=100, patience=4)}
        result = run(hill, np.full(3, 5, np.float32), SLOW, **options)
        ends.add(result.num_steps)
        assert result.stop_reason is StopReason.PLATEAU
    # Chunks do not change where it stops.
    (end,) = ends
    assert end % 100 == 0
    # The mean falls as exp(-step / 50); the noise of a window's mean is 0.1.
    assert 400 <= end < 5000
    assert np.abs(result.params).max() < 0.5


SLOW = optax.sgd(0.005)


def test_slow_progress_adds_up():
    watch, rng = PlateauWatch(Plateau(100, 5)), np.random.default_rng(0)
    # Half a standard error a window.
    for window in range(60):
        watch.add(-0.05 * window + rng.normal(size=100))
        assert not watch.is_over, window


def test_ends_soon_where_there_is_no_progress():
    ends = []
    for seed in range(50):
        watch, rng = PlateauWatch(Plateau(100, 5)), np.random.default_rng(seed)
        while not watch.is_over:
            watch.add(rng.normal(size=100))
        ends.append(len(watch._means))
    assert min(ends) == 10
    assert np.median(ends) <= 15


def test_a_tolerance_ends_only_what_is_surely_over():
    rng = np.random.default_rng(0)

    def windows(noise, gain_per_window, count=60):
        watch = PlateauWatch(Plateau(100, 3, tolerance=0.01))
        for window in range(count):
            watch.add(-gain_per_window * window + noise * rng.normal(size=100))
            if watch.is_over:
                return window + 1
        return None

    assert windows(noise=0.0, gain_per_window=0.0) == 6
    assert windows(noise=0.01, gain_per_window=0.001) == 6
    # A gain of 3 windows: 0.012.
    assert windows(noise=0.0, gain_per_window=0.004) is None
    # Two standard errors of the gain: 2 sqrt(2 / 300) = 0.16, more than the tolerance.
    assert windows(noise=1.0, gain_per_window=0.0) is None


def test_parts_and_numbers_that_are_not_finite():
    losses = np.random.default_rng(0).normal(size=1000)
    losses[::7] = np.nan
    whole, cut = PlateauWatch(Plateau(50, 3)), PlateauWatch(Plateau(50, 3))
    whole.add(losses)
    for part in np.array_split(losses, 37):
        cut.add(part)
    assert whole._means == cut._means
    assert len(whole._means) == 20
    assert np.isfinite(whole._means).all()
