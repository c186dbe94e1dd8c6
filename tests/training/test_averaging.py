import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowvi.params import Fixed
from flowvi.training import fit

KEY = jax.random.key(0)
SGD = optax.sgd(1.0)


def walk(params, key, batch):
    """A loss of slope -1: after t steps of SGD(1), params["t"] is t."""
    del key, batch
    return -params["t"]


def broken_walk(params, key, batch):
    """The same, whose fourth step is bad until a counter has gone by."""
    del key, batch
    seen = params["seen"].value
    loss = jnp.where(seen == 3, jnp.nan, 1.0) * -params["t"]
    return loss, {}, {**params, "seen": Fixed(seen + 1)}


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


def walked(**options):
    return fit(walk, {"t": jnp.zeros(())}, SGD, key=KEY, progress=False, **options)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_the_average_is_handed_back(decay):
    result = walked(num_steps=50, averaging=decay)
    np.testing.assert_allclose(result.params["t"], averages(50, decay)[-1], rtol=1e-5)
    assert result.last_params["t"] == 50


def test_the_average_is_validated():
    result = walked(num_steps=20, averaging=0.8, validate=distance, validate_every=1)
    expected = averages(20, 0.8)
    np.testing.assert_allclose(result.history["validation"], (expected - 12) ** 2, rtol=1e-4)
    best = np.argmin((expected - 12) ** 2)
    assert result.best_step == best + 1
    np.testing.assert_allclose(result.params["t"], expected[best], rtol=1e-5)


def test_bad_steps_leave_no_trace_and_fixed_leaves_are_the_latest():
    def run(loss_fn, num_steps, params):
        return fit(
            loss_fn, params, SGD, key=KEY, num_steps=num_steps, averaging=0.5, progress=False
        )

    good = run(walk, 3, {"t": jnp.zeros(())})
    start = {"t": jnp.zeros(()), "seen": Fixed(jnp.zeros(()))}
    result = run(broken_walk, 7, start)
    # A bad step takes over no Fixed leaves either, so the counter stands still from there on.
    assert result.num_bad_steps == 4
    assert result.params["seen"].value == 3
    np.testing.assert_array_equal(result.params["t"], good.params["t"])


def test_less_noise():
    # At a constant rate the last parameters wander about the optimum; their average does not.
    x = jax.random.normal(jax.random.key(1), (1000, 3))

    def loss_fn(params, key, batch):
        del key
        return jnp.mean((batch - params["mean"]) ** 2)

    result = fit(
        loss_fn,
        {"mean": jnp.zeros(3)},
        optax.sgd(0.5),
        key=KEY,
        num_steps=2000,
        data=x,
        batch_size=5,
        averaging=0.99,
        progress=False,
    )
    error = {
        name: float(jnp.abs(params["mean"] - x.mean(0)).max())
        for name, params in {"average": result.params, "last": result.last_params}.items()
    }
    assert error["average"] < error["last"] / 3


@pytest.mark.parametrize("decay", [0.0, 1.0, -1, float("nan")])
def test_a_decay_between_0_and_1(decay):
    with pytest.raises(ValueError, match=r"`averaging` must lie between 0 and 1; got"):
        walked(num_steps=1, averaging=decay)


@pytest.mark.parametrize("decay", ["0.9", True])
def test_a_decay_is_a_number(decay):
    with pytest.raises(TypeError, match=r"`averaging` must be a number between 0 and 1 or None"):
        walked(num_steps=1, averaging=decay)
