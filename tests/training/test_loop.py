import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowvi.params import Fixed
from flowvi.training import StopReason, fit, record, stretch
from tests.training.helpers import (
    assert_trees_equal,
    compilations,
    quadratic,
    rows,
    start,
)

KEY = jax.random.key(0)
ADAM = optax.adam(0.05)


def test_learns_and_reports():
    x = rows()
    result = fit(quadratic, start(), ADAM, key=KEY, num_steps=300, data=x, progress=False)
    np.testing.assert_allclose(result.params["mean"], x.mean(0), atol=1e-3)
    assert result.stop_reason is StopReason.MAX_STEPS
    assert result.stop_reason == "max_steps"
    assert result.num_steps == 300
    assert result.num_bad_steps == 0
    assert result.best_step is None
    assert result.seconds > 0
    assert list(result.history) == ["loss"]
    assert result.history["loss"].shape == (300,)
    assert result.history["loss"][-1] < result.history["loss"][0]
    assert_trees_equal(result.params, result.last_params)
    assert "stop_reason='max_steps', num_steps=300" in repr(result)


def test_equals_a_plain_loop():
    x, params = rows(), start()
    opt_state = ADAM.init(params)
    losses = []
    for _ in range(5):
        loss, gradient = jax.value_and_grad(quadratic)(params, None, x)
        updates, opt_state = ADAM.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        losses.append(loss)
    result = fit(quadratic, start(), ADAM, key=KEY, num_steps=5, data=x, progress=False)
    np.testing.assert_allclose(result.params["mean"], params["mean"], rtol=1e-6)
    np.testing.assert_allclose(result.history["loss"], losses, rtol=1e-6)


def noisy(params, key, batch):
    loss = jnp.mean((batch - params["mean"] + jax.random.normal(key, (3,))) ** 2)
    return loss, {"first": params["mean"][0]}


@pytest.mark.parametrize("look_seconds", [0.0, 1e-3, 1e9])
def test_chunking_changes_no_bit(monkeypatch, look_seconds):
    looks = []

    def run(**options):
        return fit(
            noisy,
            start(),
            ADAM,
            key=KEY,
            num_steps=157,
            data=rows(),
            batch_size=25,
            validation_data=rows(20),
            validate_every=13,
            progress=False,
            **options,
        )

    whole = run()
    monkeypatch.setattr(record, "LOOK_SECONDS", look_seconds)
    cut = run(callback=lambda look: looks.append(look.step))
    if look_seconds == 0.0:
        assert looks == list(range(1, 158))
    if look_seconds == 1e9:
        assert looks == [1, 2, 157]
    assert_trees_equal(whole.params, cut.params)
    assert_trees_equal(whole.last_params, cut.last_params)
    assert_trees_equal(whole.history, cut.history)
    assert whole.best_step == cut.best_step


def test_more_steps_than_a_stretch_holds(monkeypatch):
    monkeypatch.setattr(record, "LOOK_SECONDS", 1e9)
    looks = []
    num_steps = 2 * stretch.CAPACITY + 10
    result = fit(
        quadratic,
        start(),
        ADAM,
        key=KEY,
        num_steps=num_steps,
        data=rows(),
        progress=False,
        callback=lambda look: looks.append(look.step),
    )
    assert np.diff(looks).max() == stretch.CAPACITY
    assert result.history["loss"].shape == (num_steps,)
    assert (result.history["loss"] > 0).all()


def test_key_is_its_own_in_each_step():
    def loss_fn(params, key, batch):
        assert batch is None
        return params**2, {"noise": jax.random.normal(key)}

    def noise(seed):
        result = fit(loss_fn, 1.0, ADAM, key=jax.random.key(seed), num_steps=20, progress=False)
        return result.history["noise"]

    assert len(np.unique(noise(0))) == 20
    np.testing.assert_array_equal(noise(0), noise(0))
    assert not np.isin(noise(0), noise(1)).any()


def test_raw_keys_work():
    result = fit(
        noisy,
        start(),
        ADAM,
        key=jax.random.PRNGKey(0),
        num_steps=3,
        data=rows(),
        batch_size=7,
        progress=False,
    )
    expected = fit(
        noisy, start(), ADAM, key=KEY, num_steps=3, data=rows(), batch_size=7, progress=False
    )
    assert_trees_equal(result.params, expected.params)


@pytest.mark.parametrize("form", [1, 2, 3])
def test_forms_of_a_loss(form):
    def loss_fn(params, key, batch):
        loss = quadratic(params, key, batch)
        # Only the Fixed leaf of what is handed back may count.
        new = {"mean": params["mean"] + 100.0, "count": Fixed(params["count"].value + 1)}
        return (loss, (loss, {"twice": 2 * loss}), (loss, {"twice": 2 * loss}, new))[form - 1]

    params = start() | {"count": Fixed(jnp.zeros((), jnp.int32))}
    result = fit(loss_fn, params, ADAM, key=KEY, num_steps=10, data=rows(), progress=False)
    assert int(result.params["count"].value) == (10 if form == 3 else 0)
    assert result.params["count"].value.dtype == jnp.int32
    plain = fit(quadratic, start(), ADAM, key=KEY, num_steps=10, data=rows(), progress=False)
    np.testing.assert_allclose(result.params["mean"], plain.params["mean"], rtol=1e-6)
    if form > 1:
        np.testing.assert_allclose(result.history["twice"], 2 * result.history["loss"], rtol=1e-6)


def test_no_gradient_flows_through_handed_back_leaves():
    def loss_fn(params, key, batch):
        del key, batch
        return params["w"] ** 2, {}, {"w": params["w"], "last": Fixed(params["w"])}

    params = {"w": jnp.ones(()), "last": Fixed(jnp.zeros(()))}
    result = fit(loss_fn, params, optax.sgd(0.25), key=KEY, num_steps=2, progress=False)
    np.testing.assert_allclose(result.params["w"], 0.25)
    np.testing.assert_allclose(result.params["last"].value, 0.5)


@pytest.mark.parametrize(
    "optimizer", [optax.adamw(0.1, weight_decay=0.5), optax.sgd(0.1, momentum=0.9)]
)
def test_fixed_leaves_stay(optimizer):
    def loss_fn(params, key, batch):
        del key, batch
        return jnp.sum((params["w"] * params["scale"].value["s"]) ** 2)

    params = {"w": jnp.ones(2), "scale": Fixed({"s": jnp.full(2, 3.0)})}
    result = fit(loss_fn, params, optimizer, key=KEY, num_steps=20, progress=False)
    np.testing.assert_array_equal(result.params["scale"].value["s"], [3.0, 3.0])
    assert (np.abs(result.params["w"]) < 1).all()


def test_optimizer_by_key():
    params = {"slow": jnp.ones(2), "fast": {"w": jnp.ones(2), "fixed": Fixed(jnp.ones(2))}}
    labels = {"slow": "slow", "fast": "fast"}
    optimizer = optax.multi_transform({"slow": optax.set_to_zero(), "fast": optax.sgd(0.1)}, labels)

    def loss_fn(params, key, batch):
        del key, batch
        return jnp.sum(params["slow"] ** 2) + jnp.sum(params["fast"]["w"] ** 2)

    result = fit(loss_fn, params, optimizer, key=KEY, num_steps=3, progress=False)
    np.testing.assert_array_equal(result.params["slow"], [1.0, 1.0])
    np.testing.assert_allclose(result.params["fast"]["w"], [0.512, 0.512], rtol=1e-6)


def test_optimizers_that_want_the_loss():
    # A line search needs `value`, `grad` and `value_fn`.
    search = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15))
    result = fit(quadratic, start(), search, key=KEY, num_steps=30, data=rows(), progress=False)
    np.testing.assert_allclose(result.params["mean"], rows().mean(0), atol=1e-3)


def test_callers_arrays_survive():
    x = rows()
    params = start() | {"alias": Fixed(x)}
    params["alias again"] = Fixed(x)
    key, held_out = jax.random.key(5), rows(10)
    options = {"data": x, "batch_size": 6, "validation_data": held_out, "validate_every": 2}
    result = fit(quadratic, params, ADAM, key=key, num_steps=5, progress=False, **options)
    for leaf in jax.tree.leaves((params, x, held_out, key)):
        assert not leaf.is_deleted()
    again = fit(quadratic, result.params, ADAM, key=key, num_steps=5, progress=False, **options)
    for leaf in jax.tree.leaves((result.params, result.last_params)):
        assert not leaf.is_deleted()
    np.testing.assert_array_equal(params["mean"], np.zeros(3))
    assert again.params["mean"].shape == (3,)


def test_params_of_numpy_and_python():
    result = fit(
        lambda params, key, batch: params["a"] ** 2 + jnp.sum(params["b"] ** 2),
        {"a": 1.0, "b": np.ones(2)},
        ADAM,
        key=KEY,
        num_steps=2,
        progress=False,
    )
    assert result.params["a"].dtype == result.params["b"].dtype == jnp.float32


def test_dtypes_are_kept(x64):
    params = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones(2, jnp.float64)}

    def loss_fn(params, key, batch):
        del key, batch
        return jnp.sum(params["a"] ** 2) + jnp.sum(params["b"] ** 2)

    result = fit(
        loss_fn,
        params,
        ADAM,
        key=KEY,
        num_steps=3,
        validate=loss_fn,
        validate_every=2,
        progress=False,
    )
    assert result.params["a"].dtype == jnp.float32
    assert result.params["b"].dtype == jnp.float64
    assert result.history["loss"].dtype == result.history["validation"].dtype == np.float64


@dataclasses.dataclass(frozen=True)
class Loss:
    power: int

    def __call__(self, params, key, batch):
        del key
        return jnp.mean(jnp.abs(batch - params["mean"]) ** self.power)


def test_second_call_compiles_nothing():
    def run(num_steps, power=2, progress=False):
        return fit(
            Loss(power),
            start(),
            ADAM,
            key=KEY,
            num_steps=num_steps,
            data=rows(),
            batch_size=8,
            validate=Loss(4),
            validation_data=rows(10),
            validate_every=max(num_steps // 3, 1),
            patience=num_steps,
            progress=progress,
        )

    with compilations() as names:
        run(50)
    assert sum("_run" in name for name in names) == 1
    with compilations() as names:
        run(50)
        # Nor do other numbers of steps, and an equal loss is the same loss.
        run(7)
        run(500, progress=True)
    assert names == []
    with compilations() as names:
        run(50, power=3)
    assert sum("_run" in name for name in names) == 1


def test_one_program_however_many_looks(monkeypatch):
    monkeypatch.setattr(record, "LOOK_SECONDS", 1e-3)

    def loss_fn(params, key, batch):
        return quadratic(params, key, batch)

    with compilations() as names:
        fit(
            loss_fn, start(), ADAM, key=KEY, num_steps=2000, data=rows(), batch_size=9,
            progress=False,
        )  # fmt: skip
    assert sum("_run" in name for name in names) == 1


def test_loss_is_traced_once():
    traced = []

    def loss_fn(params, key, batch):
        traced.append(1)
        return quadratic(params, key, batch)

    fit(loss_fn, start(), ADAM, key=KEY, num_steps=5, data=rows(), batch_size=9, progress=False)
    assert len(traced) == 1
