import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowvi.params import Fixed
from flowvi.training import StopReason, fit, program
from tests.training.helpers import (
    ADAM,
    assert_same,
    assert_trees_equal,
    compilations,
    noisy,
    quadratic,
    rows,
    run,
    start,
)

PACE = "flowvi.training.record.PACE_SECONDS"


def test_learns_and_reports():
    x = rows()
    result = run(num_steps=300, data=x)
    np.testing.assert_allclose(result.params["mean"], x.mean(0), atol=1e-3)
    assert result.stop_reason is StopReason.MAX_STEPS
    assert result.stop_reason == "max_steps"
    assert (result.num_steps, result.num_bad_steps, result.best_step) == (300, 0, None)
    assert result.seconds > 0
    assert list(result.history) == ["loss"]
    assert result.history["loss"].shape == (300,)
    assert result.history["loss"][-1] < result.history["loss"][0]
    assert_trees_equal(result.params, result.last_params)
    assert int(result.opt_state[0].count) == 300
    assert repr(result).startswith("FitResult(stop_reason='max_steps', num_steps=300, loss=")
    assert len(repr(result)) < 120
    assert_same(pickle.loads(pickle.dumps(result)), result)


def test_equals_a_plain_loop():
    x = rows()

    @jax.jit
    def step(params, opt_state):
        loss, gradient = jax.value_and_grad(quadratic)(params, None, x)
        updates, opt_state = ADAM.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    params, losses = start(), []
    opt_state = jax.jit(ADAM.init)(params)
    for _ in range(5):
        params, opt_state, loss = step(params, opt_state)
        losses.append(loss)
    result = run(num_steps=5, data=x)
    np.testing.assert_allclose(result.params["mean"], params["mean"], rtol=1e-6)
    np.testing.assert_allclose(result.history["loss"], losses, rtol=1e-6)
    np.testing.assert_allclose(result.opt_state[0].mu["mean"], opt_state[0].mu["mean"], rtol=1e-5)


CHUNKED = {
    "num_steps": 157,
    "data": rows(),
    "batch_size": 25,
    "averaging": 0.9,
    "validation_data": rows(20),
    "validate_every": 13,
}


@pytest.fixture(scope="module")
def whole():
    return run(noisy, **CHUNKED)


@pytest.mark.parametrize("checkpoint_every", [None, 11])
@pytest.mark.parametrize("seconds", [0.0, 1e-3, 1e9])
def test_chunks_change_no_bit(monkeypatch, tmp_path, whole, seconds, checkpoint_every):
    seen = []
    monkeypatch.setattr(PACE, seconds)
    options = {"callback": lambda progress: seen.append(progress.step)}
    if checkpoint_every:
        options |= {"checkpoint_dir": tmp_path, "checkpoint_every": checkpoint_every}
    assert_same(whole, run(noisy, **CHUNKED, **options))
    if seconds == 0.0:
        assert seen == list(range(1, 158))
    if seconds == 1e9:
        assert seen == [1, 2, 157]


def test_more_steps_than_a_chunk_holds(monkeypatch):
    monkeypatch.setattr(PACE, 1e9)
    for num_steps, options in ((2 * program.CAPACITY + 10, {}), (4200, {"batch_size": 25})):
        result = run(num_steps=num_steps, data=rows(), **options)
        assert result.num_steps == num_steps
        assert result.history["loss"].shape == (num_steps,)
        assert (result.history["loss"] > 0).all()


def test_key_is_its_own_in_each_step():
    def loss_fn(params, key, batch):
        assert batch is None
        return params**2, {"noise": jax.random.normal(key)}

    noise = [run(loss_fn, 1.0, key=jax.random.key(seed)).history["noise"] for seed in (0, 0, 1)]
    assert len(np.unique(noise[0])) == 20
    np.testing.assert_array_equal(noise[0], noise[1])
    assert not np.isin(noise[0], noise[2]).any()


def test_raw_keys_work(whole):
    result = run(noisy, **CHUNKED, key=jax.random.PRNGKey(0))
    np.testing.assert_array_equal(result.history["first"], whole.history["first"])
    # Another program, which may round otherwise.
    np.testing.assert_allclose(result.params["mean"], whole.params["mean"], rtol=1e-5)


@pytest.mark.parametrize("form", [1, 2, 3])
def test_forms_of_a_loss(form):
    def loss_fn(params, key, batch):
        loss = quadratic(params, key, batch)
        # Only the Fixed leaf of what is handed back may count.
        new = {"mean": params["mean"] + 100.0, "count": Fixed(params["count"].value + 1)}
        return (loss, (loss, {"twice": 2 * loss}), (loss, {"twice": 2 * loss}, new))[form - 1]

    params = start() | {"count": Fixed(np.zeros((), np.int32))}
    result = run(loss_fn, params, num_steps=10, data=rows())
    assert int(result.params["count"].value) == (10 if form == 3 else 0)
    assert result.params["count"].value.dtype == jnp.int32
    expected = run(num_steps=10, data=rows()).params["mean"]
    np.testing.assert_allclose(result.params["mean"], expected, rtol=1e-6)
    if form > 1:
        np.testing.assert_allclose(result.history["twice"], 2 * result.history["loss"], rtol=1e-6)


def test_no_gradient_flows_through_handed_back_leaves():
    def loss_fn(params, key, batch):
        del key, batch
        return params["w"] ** 2, {}, {"w": params["w"], "last": Fixed(params["w"])}

    params = {"w": np.float32(1), "last": Fixed(np.float32(0))}
    result = run(loss_fn, params, optax.sgd(0.25), num_steps=2)
    np.testing.assert_allclose(result.params["w"], 0.25)
    np.testing.assert_allclose(result.params["last"].value, 0.5)


def test_optimizers_leave_fixed_leaves_alone_and_may_differ_by_key():
    params = {
        "slow": np.ones(2, np.float32),
        "fast": {"w": np.ones(2, np.float32), "fixed": Fixed({"s": np.full(2, 3, np.float32)})},
        "decays": np.ones(2, np.float32),
    }
    optimizer = optax.multi_transform(
        {
            "slow": optax.set_to_zero(),
            "fast": optax.sgd(0.1),
            "decays": optax.adamw(0.1, weight_decay=0.5),
        },
        {"slow": "slow", "fast": "fast", "decays": "decays"},
    )

    def loss_fn(params, key, batch):
        del key, batch
        fast = jnp.sum(params["fast"]["w"] ** 2 * params["fast"]["fixed"].value["s"] / 3)
        return jnp.sum(params["slow"] ** 2) + fast + 0 * jnp.sum(params["decays"])

    result = run(loss_fn, params, optimizer, num_steps=3).params
    np.testing.assert_array_equal(result["slow"], [1.0, 1.0])
    np.testing.assert_allclose(result["fast"]["w"], [0.512, 0.512], rtol=1e-6)
    np.testing.assert_allclose(result["decays"], [0.95**3] * 2, rtol=1e-6)
    np.testing.assert_array_equal(result["fast"]["fixed"].value["s"], [3.0, 3.0])


def test_optimizers_that_want_the_loss():
    # A line search needs `value`, `grad` and `value_fn`.
    search = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15))
    result = run(optimizer=search, num_steps=30, data=rows())
    np.testing.assert_allclose(result.params["mean"], rows().mean(0), atol=1e-3)


def test_callers_arrays_survive():
    x, key = jnp.asarray(rows()), jax.random.key(5)
    params = {"mean": jnp.zeros(3), "alias": Fixed(x), "alias again": Fixed(x)}
    options = {"data": x, "batch_size": 6, "validation_data": x, "validate_every": 2}
    result = run(params=params, key=key, num_steps=5, **options)
    again = run(params=result.params, key=key, num_steps=5, **options)
    for leaf in jax.tree.leaves((params, x, key, result.params, result.last_params)):
        assert not leaf.is_deleted()
    np.testing.assert_array_equal(params["mean"], np.zeros(3))
    assert again.params["mean"].shape == (3,)


def test_params_of_numpy_and_python_and_their_dtypes(x64):
    params = {"a": np.ones(2, np.float32), "b": np.ones(2), "c": 1.0}

    def loss_fn(params, key, batch):
        del key, batch
        return sum(jnp.sum(each**2) for each in params.values())

    result = run(loss_fn, params, num_steps=3, validate=loss_fn, validate_every=2)
    assert [str(result.params[name].dtype) for name in "abc"] == ["float32", "float64", "float64"]
    assert result.history["loss"].dtype == result.history["validation"].dtype == np.float64


@dataclasses.dataclass(frozen=True)
class Loss:
    power: int
    traced: list = dataclasses.field(default_factory=list, compare=False)

    def __call__(self, params, key, batch):
        del key
        self.traced.append(1)
        return jnp.mean(jnp.abs(batch - params["mean"]) ** self.power)


def test_a_second_call_compiles_nothing_and_a_loss_is_traced_once(monkeypatch, capsys):
    def again(num_steps, power=2, progress=False):
        loss = Loss(power)
        run(
            loss,
            num_steps=num_steps,
            data=rows(),
            batch_size=8,
            validate=Loss(4),
            validation_data=rows(10),
            validate_every=max(num_steps // 3, 1),
            patience=num_steps,
            progress=progress,
        )
        return len(loss.traced)

    with compilations() as names:
        assert again(50) == 1
    assert names.count("Compiling jit(_run)") == 1
    monkeypatch.setattr(PACE, 1e-3)
    with compilations() as names:
        # Nor do other numbers of steps and of chunks, and an equal loss is the same loss.
        assert [again(50), again(7), again(500, progress=True)] == [0, 0, 0]
    assert names == []
    with compilations() as names:
        again(50, power=3)
    assert names.count("Compiling jit(_run)") == 1


def test_keys_are_used_once():
    def noisy(params, key, batch):
        return jnp.mean((batch + jax.random.normal(key, batch.shape) - params["mean"]) ** 2)

    with jax.debug_key_reuse(True):
        result = fit(
            noisy,
            {"mean": jnp.zeros(3)},
            optax.sgd(0.1),
            key=jax.random.key(0),
            num_steps=20,
            data=np.ones((50, 3), np.float32),
            batch_size=10,
            validation_data=np.ones((5, 3), np.float32),
            validate_every=5,
            progress=False,
        )
    assert len(result.history["validation"]) == 4
