"""Steps whose loss, gradient or result is not finite."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowvi.params import Fixed
from flowvi.training import TrainingDiverged
from tests.training.helpers import assert_trees_equal, run

ADAM = optax.adam(0.1)
SGD = optax.sgd(0.1)


@jax.custom_jvp
def square(w, factor):
    """The sum of squares, whose gradient is `factor` times what it should be."""
    del factor
    return jnp.sum(w**2)


@square.defjvp
def square_jvp(primals, tangents):
    w, factor = primals
    return square(w, factor), 2 * factor * jnp.sum(w * tangents[0])


def planted(params, key, batch):
    del key
    loss = jnp.sum(params["a"] ** 2) + square(params["b"]["w"], batch["gradient"][0])
    new = Fixed(params["seen"].value + batch["fixed"][0])
    return loss + batch["loss"][0], {"other": 1.0}, {**params, "seen": new}


def first():
    ones = np.ones(3, np.float32)
    return {"a": ones[:2], "b": {"w": ones}, "seen": Fixed(np.zeros((), np.float32))}


def plant(num_steps=64, where=5, optimizer=ADAM, **values):
    """Trains on one of 64 rows a step; those at `where` have other values."""
    options = {name: values.pop(name) for name in ("max_bad_steps", "averaging") if name in values}
    data = {name: np.full(64, name != "loss", np.float32) for name in ("gradient", "loss", "fixed")}
    for name, value in values.items():
        data[name][where] = value
    options |= {"data": data, "batch_size": 1, "check_finite": False}
    return run(planted, first(), optimizer, num_steps=num_steps, **options)


@pytest.fixture(scope="module")
def good():
    return plant(63)


BAD = [
    ("gradient", np.nan),
    ("gradient", np.inf),
    # Adam would keep its square, infinity, for good.
    ("gradient", 1e30),
    ("loss", np.nan),
    ("loss", np.inf),
    ("fixed", np.nan),
]


@pytest.mark.parametrize(("kind", "value"), BAD)
def test_a_bad_step_is_skipped_and_counted(kind, value, good):
    # Every row once: the bad one comes somewhere among the first 64 steps.
    result = plant(**{kind: value})
    assert (result.num_bad_steps, good.num_bad_steps) == (1, 0)
    assert result.stop_reason == "max_steps"
    # It moved neither the parameters, nor the `Fixed` leaves, nor the optimizer's state: 64 steps
    # with a bad one among them end where 63 good ones do.
    assert_trees_equal(result.params, good.params)
    assert_trees_equal(result.opt_state, good.opt_state)
    assert result.params["seen"].value == 63
    assert len(result.history["loss"]) == 64
    assert (~np.isfinite(result.history["loss"])).sum() == (kind == "loss")


HIDING = {
    "clip": optax.chain(optax.zero_nans(), optax.clip(1.0), optax.sgd(0.1)),
    "norm": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    "sign": optax.chain(optax.scale_by_sign(), optax.sgd(0.1)),
    "collects": optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
    "stands": optax.sgd(0.0),
}


@pytest.mark.parametrize("name", HIDING)
def test_an_optimizer_that_hides_a_bad_gradient_does_not_hide_the_step(name):
    whole = plant(63, optimizer=HIDING[name])
    for value in (np.nan, np.inf):
        result = plant(optimizer=HIDING[name], gradient=value)
        assert result.num_bad_steps == 1
        assert_trees_equal(result.params, whole.params)
        assert_trees_equal(result.opt_state, whole.opt_state)


def test_a_bad_step_leaves_the_average_alone():
    result, whole = plant(averaging=0.5, loss=np.nan), plant(63, averaging=0.5)
    assert_trees_equal(result.params, whole.params)


def test_many_bad_steps_are_warned_of():
    plant(loss=np.nan)  # one in 64, without a word
    message = "2 of 64 steps were skipped, because the loss, its gradient or what the optimizer"
    with pytest.warns(RuntimeWarning, match=message) as caught:
        result = plant(loss=np.nan, where=[5, 6])
    assert result.num_bad_steps == 2
    assert "num_bad_steps=2" in repr(result)
    assert len(caught) == 1 and caught[0].filename.endswith("helpers.py")  # the caller of fit


def test_good_steps_between_bad_ones_start_the_count_anew():
    # Half of the rows are bad, in random order: 32 in all, never 16 in a row.
    with pytest.warns(RuntimeWarning, match="32 of 64 steps"):
        assert plant(loss=np.nan, where=slice(0, 64, 2), max_bad_steps=16).num_bad_steps == 32


def test_parameters_that_an_update_breaks():
    """Loss and gradient are finite, and what the optimizer makes of them is not."""
    with pytest.raises(TrainingDiverged, match="what the optimizer made of the parameters was not"):
        plant(optimizer=optax.sgd(np.inf))


CULPRITS = {
    "loss": "the loss was nan",
    "part": "the metric 'part' was nan",
    "gradient": r"the gradient of `params['b']['w']` was not finite",
    "stat": "the new value of the Fixed leaf `params['stat'].value` was not finite",
}


def diverging(params, key, batch):
    """A loss of which a culprit is NaN from step 7 on."""
    del key
    count = params["count"].value
    wrong = {name: jnp.where(count >= 7, batch[name], 0.0) for name in CULPRITS}
    loss = jnp.sum(params["a"] ** 2) + square(params["b"]["w"], 1.0 + wrong["gradient"])
    # Infinity may be meant; NaN is not.
    new = params | {"count": Fixed(count + 1), "stat": Fixed(wrong["stat"] + jnp.inf)}
    return loss + wrong["loss"] + wrong["part"], {"fine": 1.0, "part": wrong["part"]}, new


def never(params, key, batch):
    del key, batch
    return params["a"][0]


@pytest.mark.parametrize("culprit", CULPRITS)
def test_divergence_names_step_and_culprit(culprit):
    zero = np.zeros((), np.float32)
    params = first() | {"count": Fixed(np.int32(0)), "stat": Fixed(zero)}
    data = {name: np.full(1, np.nan if name == culprit else 0, np.float32) for name in CULPRITS}

    with pytest.raises(
        TrainingDiverged, match="after 10 bad steps in a row: from step 7 on, "
    ) as caught:
        run(
            scalars,
            params,
            SGD,
            num_steps=50,
            data=data,
            check_finite=False,
            validate=never,
            validate_every=2,
        )
    error = caught.value
    assert error.culprit == CULPRITS[culprit]
    assert f"{error.culprit}. What usually helps: a smaller learning rate" in str(error)
    assert error.step == 7
    assert len(error.history["loss"]) == 17
    # The tenth bad step is the end: there is no validation after step 17, nor one at 18.
    np.testing.assert_array_equal(error.history["validation_step"], np.arange(2, 17, 2))
    assert int(error.params["count"].value) == 7
    np.testing.assert_allclose(error.params["a"], 0.8**7, rtol=1e-5)
    assert error.result.num_steps == 17 and error.result.num_bad_steps == 10


def scalars(params, key, batch):
    return diverging(params, key, {name: leaf[0] for name, leaf in batch.items()})


def sqrt_loss(params, key, batch):
    """Its gradient at 0 is infinite, and its value is not."""
    del key, batch
    return jnp.sum(params["a"] ** 2) + jnp.sqrt(params["b"])


def test_divergence_at_the_start():
    params = {"a": np.ones(2, np.float32), "b": np.zeros((), np.float32)}
    with pytest.raises(
        TrainingDiverged, match=r"params\['b'\]` was not finite.*very first"
    ) as caught:
        run(sqrt_loss, params, SGD, num_steps=50, max_bad_steps=3)
    assert caught.value.step == 0
    assert len(caught.value.history["loss"]) == 3
    assert_trees_equal(jax.tree.map(np.asarray, caught.value.params), params)


def test_nan_from_some_step_on_in_batches(tmp_path):
    """The culprit is looked for with the batch of the bad step, whatever batches come from."""
    good, bad = np.ones((1, 1), np.float32), np.full((1, 1), np.nan, np.float32)

    def loss_fn(params, key, batch):
        del key
        return jnp.mean((params["a"] - batch) ** 2)

    class Batches:
        def __iter__(self):
            return iter([good] * 5 + [bad] * 20)

    def diverges(step, **options):
        params = {"a": np.zeros((), np.float32)}
        with pytest.raises(
            TrainingDiverged, match=f"from step {step} on, the loss was nan"
        ) as caught:
            run(loss_fn, params, SGD, num_steps=25, check_finite=False, max_bad_steps=4, **options)
        np.testing.assert_allclose(caught.value.params["a"], 1 - 0.8**step, rtol=1e-5)

    diverges(5, data=Batches())
    # With a checkpoint from before.
    diverges(5, data=Batches(), checkpoint_dir=tmp_path, checkpoint_every=2)
    diverges(0, data=np.repeat(bad, 30, 0), batch_size=1)


def walk(params, key, batch):
    del key
    return jnp.sum(params["t"] * batch), {"batch": jnp.sum(batch)}


def minus(params, key, batch):
    del key, batch
    return -params["t"][0]


@pytest.mark.parametrize("seconds", [0.0, 0.25])
def test_bad_steps_anywhere_are_as_if_they_had_never_been(monkeypatch, seconds):
    monkeypatch.setattr("flowvi.training.record.PACE_SECONDS", seconds)
    bad = np.zeros(150, bool)
    bad[[0, 3, 4, 5, 40, 63, 64, 65, 66, 90, 149]] = True
    values = np.where(bad, np.nan, np.arange(150.0)).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        result = run(
            walk,
            {"t": np.zeros(2, np.float32)},
            optax.sgd(0.5, momentum=0.5),
            num_steps=450,  # three epochs
            data=values[:, None],
            batch_size=1,
            check_finite=False,
            validate=minus,
            validate_every=7,
        )
    order = result.history["batch"]
    assert sorted(order[np.isfinite(order)]) == sorted(np.tile(values[~bad], 3))
    t, trace, path = 0.0, 0.0, []
    for value in order:
        if np.isfinite(value):
            trace = value + 0.5 * trace
            t -= 0.5 * trace
        path.append(t)
    np.testing.assert_allclose(result.last_params["t"], [t, t], rtol=1e-5)
    assert result.num_bad_steps == 3 * bad.sum()
    seen = result.history["validation_step"]
    np.testing.assert_array_equal(seen, [*range(7, 450, 7), 450])
    np.testing.assert_allclose(result.history["validation"], -np.array(path)[seen - 1], rtol=1e-5)
