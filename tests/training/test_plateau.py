import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flowvi as fv
from flowvi.training import StopReason, fit, record
from flowvi.training.stopping import Plateau, PlateauWatch

KEY = jax.random.key(0)


def noisy(params, key, batch):
    del batch
    return jnp.sum(params**2) + jax.random.normal(key)


def test_stops_when_the_loss_stops_improving():
    result = fit(
        noisy,
        5 * jnp.ones(3),
        optax.sgd(0.005),
        key=KEY,
        num_steps=20_000,
        plateau=fv.Plateau(window=100, patience=4),
        progress=False,
    )
    assert result.stop_reason is StopReason.PLATEAU
    assert result.num_steps % 100 == 0
    # The mean falls as exp(-step / 50); the noise of a window's mean is 0.1.
    assert 400 <= result.num_steps < 5000
    assert float(jnp.abs(result.params).max()) < 0.5


@pytest.mark.parametrize("look_seconds", [0.0, 1e9])
def test_looks_do_not_change_where_it_stops(monkeypatch, look_seconds):
    def run():
        return fit(
            noisy,
            jnp.ones(3),
            optax.sgd(0.01),
            key=KEY,
            num_steps=9000,
            plateau=Plateau(70, 3),
            progress=False,
        )

    whole = run()
    monkeypatch.setattr(record, "LOOK_SECONDS", look_seconds)
    assert run().num_steps == whole.num_steps


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
    rule = Plateau(100, 3, tolerance=0.01)
    rng = np.random.default_rng(0)

    def windows(noise, gain_per_window, count=60):
        watch = PlateauWatch(rule)
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


def test_bad_input():
    with pytest.raises(ValueError, match="`window` must be a positive integer; got 0"):
        Plateau(window=0)
    with pytest.raises(ValueError, match="`tolerance` must be a positive number or None; got 0"):
        Plateau(tolerance=0)
    with pytest.raises(TypeError, match=r"`plateau` must be an `fv.Plateau\(...\)` or None; got 5"):
        fit(noisy, jnp.ones(3), optax.sgd(0.1), key=KEY, num_steps=3, plateau=5)
