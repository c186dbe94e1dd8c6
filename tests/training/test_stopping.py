import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowvi.training import StopReason, fit, record
from tests.training.helpers import quadratic, rows, start


@pytest.fixture(autouse=True)
def heeds_ctrl_c():
    """A process started in the background ignores Ctrl-C, and so would the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


KEY = jax.random.key(0)
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
    return fit(walk, {"t": jnp.zeros(())}, SGD, key=KEY, progress=False, **options)


def test_best_parameters():
    result = walked(num_steps=20, validate=bowl, validate_every=5)
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
        del key, batch
        return jnp.where(params["t"] > 6, jnp.nan, bowl(params, None, None))

    result = walked(num_steps=20, validate=validate, validate_every=5, patience=2)
    assert result.num_steps == 15
    assert result.best_step == 5

    def always(params, key, batch):
        del key, batch
        return params["t"] * jnp.nan

    result = walked(num_steps=20, validate=always, validate_every=5)
    assert result.best_step is None
    assert result.params["t"] == 20


def test_validation_sees_its_data_and_one_key():
    def validate(params, key, batch):
        del params
        return batch["offset"] + jax.random.uniform(key), {"ignored": 1.0}

    result = walked(
        num_steps=4, validate=validate, validate_every=1, validation_data={"offset": 5.0}
    )
    assert len(np.unique(result.history["validation"])) == 1
    assert 5 < result.history["validation"][0] < 6


def test_loss_validates_by_default():
    held_out = rows(10)
    result = fit(
        quadratic,
        start(),
        optax.sgd(0.0),
        key=KEY,
        num_steps=1,
        data=rows(),
        validation_data=held_out,
        validate_every=1,
        progress=False,
    )
    np.testing.assert_allclose(
        result.history["validation"], [quadratic(start(), None, held_out)], rtol=1e-6
    )


def test_callback_sees_and_stops(monkeypatch):
    monkeypatch.setattr(record, "LOOK_SECONDS", 0.0)
    looks = []

    def callback(look):
        looks.append(look)
        assert look.params["t"] == look.step
        return look.step == 7

    result = walked(num_steps=20, callback=callback, validate=bowl, validate_every=5)
    assert result.stop_reason == "callback"
    assert result.num_steps == 7
    assert result.last_params["t"] == 7
    assert result.params["t"] == 5
    last = looks[-1]
    assert (last.step, last.num_steps, last.best_step) == (7, 20, 5)
    assert last.validation == 49.0
    assert last.loss == pytest.approx(-3.0)
    assert last.metrics == {"t": 6.0}
    assert last.steps_per_second > 0
    assert looks[0].validation is None


def test_parameters_taken_in_a_callback_survive(monkeypatch):
    monkeypatch.setattr(record, "LOOK_SECONDS", 0.0)
    taken = []
    walked(num_steps=4, callback=lambda look: taken.append(look.params))
    assert [float(params["t"]) for params in taken] == [1.0, 2.0, 3.0, 4.0]


def test_an_interrupting_callback(monkeypatch):
    monkeypatch.setattr(record, "LOOK_SECONDS", 0.0)

    def callback(look):
        if look.step == 3:
            raise KeyboardInterrupt

    result = walked(num_steps=20, callback=callback)
    assert result.stop_reason is StopReason.INTERRUPTED
    assert result.num_steps == 3
    assert result.params["t"] == 3


def test_ctrl_c_returns_what_was_learned(monkeypatch):
    monkeypatch.setattr(record, "LOOK_SECONDS", 0.0)

    def callback(look):
        if look.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    result = walked(num_steps=20, callback=callback)
    assert result.stop_reason is StopReason.INTERRUPTED
    # The signal came during the look after step 3, and the next look obeys it.
    assert result.num_steps == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_does_not_wait():
    def callback(look):
        del look
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    assert walked(num_steps=20, callback=callback).stop_reason == "interrupted"


def test_handlers_of_others_are_left_alone():
    seen = []
    old = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        result = walked(num_steps=5, callback=lambda look: signal.raise_signal(signal.SIGINT))
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


def test_errors_of_a_callback_pass_through():
    def callback(look):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        walked(num_steps=5, callback=callback)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
