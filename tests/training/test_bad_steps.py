"""Steps whose loss, gradient or result is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowvi.params import Fixed
from flowvi.training import TrainingDiverged, fit, stretch
from flowvi.training.order import epoch_order
from tests.training.helpers import assert_trees_equal, compilations

KEY = jax.random.key(0)
SGD = optax.sgd(1.0)
ADAM = optax.adam(0.1)


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
    return loss + batch["loss"][0], {"other": 1.0}


def plant(num_steps, gradient=1.0, loss=0.0, where=5, **options):
    """Trains on one of 64 rows a step; those at `where` have another gradient or loss."""
    data = {"gradient": np.ones(64), "loss": np.zeros(64)}
    data["gradient"][where], data["loss"][where] = gradient, loss
    return fit(
        planted,
        {"a": jnp.ones(2), "b": {"w": jnp.ones(3)}},
        ADAM,
        key=KEY,
        num_steps=num_steps,
        data=data,
        batch_size=1,
        check_finite=False,
        progress=False,
        **options,
    )


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("gradient", np.nan),
        ("gradient", np.inf),
        # Adam would keep its square, infinity, for good.
        ("gradient", 1e30),
        ("loss", np.nan),
        ("loss", np.inf),
    ],
)
def test_a_bad_step_is_skipped_and_counted(kind, value):
    # Every row once: the bad one comes somewhere among the first 64 steps.
    result = plant(64, **{kind: value})
    assert result.num_bad_steps == 1
    assert result.stop_reason == "max_steps"
    # It moved neither the parameters nor the optimizer's state: 64 steps with a bad one among
    # them end where 63 good ones do.
    good = plant(63)
    assert good.num_bad_steps == 0
    assert_trees_equal(result.params, good.params)
    assert len(result.history["loss"]) == 64
    assert (~np.isfinite(result.history["loss"])).sum() == (kind == "loss")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "hides",
    [
        optax.chain(optax.zero_nans(), optax.clip(1.0)),
        optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
        optax.sgd(0.0),
    ],
    ids=["clip", "collects", "stands"],
)
def test_an_optimizer_that_hides_a_bad_gradient_does_not_hide_the_step(hides, value):
    def loss_fn(params, key, batch):
        del key
        return square(params["w"], batch[0])

    data = np.ones(30)
    data[5] = value
    result = fit(
        loss_fn,
        {"w": jnp.ones(2)},
        hides,
        key=KEY,
        num_steps=30,
        data=data,
        batch_size=1,
        check_finite=False,
        progress=False,
    )
    assert result.num_bad_steps == 1
    assert np.isfinite(result.params["w"]).all()


def test_steps_are_looked_at_only_where_something_is_wrong():
    stretch.build.cache_clear()
    with compilations() as names:
        plant(64)
    assert names.count("Compiling jit(_run)") == 1
    with compilations() as names:
        plant(64, gradient=np.nan)
    # The second program, and nothing else anew.
    assert names.count("Compiling jit(_run)") == 1


def test_parameters_that_an_update_breaks():
    """Loss and gradient are finite, and what the optimizer makes of them is not."""
    with pytest.raises(TrainingDiverged, match="what the optimizer made of it was not") as caught:
        fit(
            lambda params, key, batch: jnp.sum(params["w"]),
            {"w": jnp.ones(2)},
            optax.sgd(np.inf),
            key=KEY,
            num_steps=100,
            progress=False,
        )
    assert caught.value.step == 0
    np.testing.assert_array_equal(caught.value.params["w"], [1, 1])


def test_bad_steps_take_no_fixed_leaves():
    def loss_fn(params, key, batch):
        del key
        new = params | {"count": Fixed(params["count"].value + 1)}
        return params["w"] ** 2 + batch[0], {}, new

    params = {"w": jnp.ones(()), "count": Fixed(jnp.zeros(()))}
    data = np.zeros(10)
    data[3] = np.nan
    result = fit(
        loss_fn,
        params,
        SGD,
        key=KEY,
        num_steps=10,
        data=data,
        batch_size=1,
        check_finite=False,
        progress=False,
    )
    assert result.params["count"].value == 9
    assert result.num_bad_steps == 1


def diverging(culprit):
    """A loss of which `culprit` is NaN from step 7 on."""

    def loss_fn(params, key, batch):
        del key, batch
        count = params["count"].value
        nan = jnp.where(count >= 7, jnp.nan, 0.0)
        wrong = {name: nan if name == culprit else 0.0 for name in CULPRITS}
        loss = jnp.sum(params["a"] ** 2) + square(params["b"]["w"], 1.0 + wrong["gradient"])
        metrics = {"fine": 1.0, "part": wrong["part"]}
        # Infinity may be meant; NaN is not.
        new = params | {"count": Fixed(count + 1), "stat": Fixed(wrong["stat"] + jnp.inf)}
        return loss + wrong["loss"] + wrong["part"], metrics, new

    return loss_fn


CULPRITS = {
    "loss": "the loss",
    "part": "the metric 'part'",
    "gradient": "the gradient of `params['b']['w']`",
    "stat": "the new value of the Fixed leaf `params['stat'].value`",
}


@pytest.mark.parametrize("culprit", CULPRITS)
def test_divergence_names_step_and_culprit(culprit):
    params = {
        "a": jnp.ones(2),
        "b": {"w": jnp.ones(3)},
        "count": Fixed(jnp.zeros((), jnp.int32)),
        "stat": Fixed(jnp.zeros(())),
    }
    with pytest.raises(
        TrainingDiverged, match="after 10 bad steps in a row: at step 7, "
    ) as caught:
        fit(
            diverging(culprit),
            params,
            optax.sgd(0.1),
            key=KEY,
            num_steps=50,
            validate=lambda params, key, batch: params["a"][0],
            validate_every=2,
            progress=False,
        )
    error = caught.value
    assert error.culprit == CULPRITS[culprit]
    assert f"{error.culprit} was " in str(error)
    assert "learning rate" in str(error)
    assert "very first step" not in str(error)
    assert error.step == 7
    assert len(error.history["loss"]) == 17
    # The tenth bad step is the end: there is no validation after step 17, nor one at 18.
    np.testing.assert_array_equal(error.history["validation_step"], np.arange(2, 17, 2))
    assert int(error.params["count"].value) == 7
    np.testing.assert_allclose(error.params["a"], 0.8**7, rtol=1e-5)


def sqrt_loss(params, key, batch):
    """Its gradient at 0 is infinite, and its value is not."""
    del key, batch
    return jnp.sum(params["a"] ** 2) + jnp.sqrt(params["b"])


def test_divergence_at_the_start():
    params = {"a": jnp.ones(2), "b": jnp.zeros(())}
    with pytest.raises(
        TrainingDiverged, match=r"params\['b'\]` was not finite.*very first"
    ) as caught:
        fit(sqrt_loss, params, SGD, key=KEY, num_steps=50, max_bad_steps=3, progress=False)
    assert caught.value.step == 0
    assert len(caught.value.history["loss"]) == 3
    assert_trees_equal(caught.value.params, params)


def test_divergence_names_the_first_bad_step_of_the_row():
    # Nothing but the key differs between the steps of a row; it decides which gradient is broken.
    def loss_fn(params, key, batch):
        del batch
        heads = jax.random.bernoulli(key)
        factors = jnp.where(heads, jnp.array([1.0, jnp.nan]), jnp.array([jnp.nan, 1.0]))
        loss = square(params["a"], factors[0]) + square(params["b"], factors[1])
        return loss, {"heads": heads}

    named = set()
    for seed in range(6):
        with pytest.raises(TrainingDiverged, match="at step 0, ") as caught:
            fit(
                loss_fn,
                {"a": jnp.ones(1), "b": jnp.ones(1)},
                SGD,
                key=jax.random.key(seed),
                num_steps=20,
                progress=False,
            )
        heads = caught.value.history["heads"]
        assert len(np.unique(heads)) == 2
        leaf = "b" if heads[0] else "a"
        assert caught.value.culprit == f"the gradient of `params['{leaf}']`"
        named.add(leaf)
    assert named == {"a", "b"}


def test_good_steps_between_bad_ones_start_the_count_anew():
    # Half of the rows are bad, in random order: 32 in all, never 16 in a row.
    result = plant(64, loss=np.nan, where=slice(0, 64, 2), max_bad_steps=16)
    assert result.num_bad_steps == 32


@pytest.mark.parametrize("longest", [1, 5, 64])
def test_bad_steps_anywhere_are_as_if_they_had_never_been(monkeypatch, longest):
    # Runs of steps are taken back where one of them is bad; nothing of that may show.
    monkeypatch.setattr("flowvi.training.stretch.LONGEST_RUN", longest)
    monkeypatch.setattr("flowvi.training.stretch.AHEAD", 2 * longest)
    bad = np.zeros(150, bool)
    bad[[0, 3, 4, 5, 40, 63, 64, 65, 66, 90, 149]] = True
    values = np.where(bad, np.nan, np.arange(150.0))

    def loss_fn(params, key, batch):
        del key
        return jnp.sum(params["t"] * batch), {"batch": jnp.sum(batch)}

    stretch.build.cache_clear()
    result = fit(
        loss_fn,
        {"t": jnp.zeros(2)},
        optax.sgd(0.5, momentum=0.5),
        key=KEY,
        num_steps=450,  # three epochs
        data=values[:, None],
        batch_size=1,
        check_finite=False,
        validate=lambda params, key, batch: -params["t"][0],
        validate_every=7,
        progress=False,
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
    assert result.num_steps == 450
    seen = result.history["validation_step"]
    np.testing.assert_array_equal(seen, [*range(7, 450, 7), 450])
    np.testing.assert_allclose(result.history["validation"], -np.array(path)[seen - 1], rtol=1e-5)


@pytest.mark.parametrize("bad", [None, 0, 30])
def test_a_stretch_with_a_bad_step_leaves_everything_as_it_was(bad):
    # 40 steps, each with one of 60 rows, and a validation after every 13.
    def loss_fn(params, key, batch):
        del key
        return jnp.sum(params["t"] * batch["x"])

    program = stretch.Program(loss_fn, ADAM, lambda params, key, batch: jnp.sum(params["t"]), 1, 60)
    compiled = stretch.build(program)
    state, trusted = compiled.begin({"t": jnp.zeros(2)}, KEY)
    assert trusted
    # As after a bad step, and three validations in vain.
    state = state._replace(
        faults=state.faults._replace(in_row=jnp.int32(1)),
        best=state.best._replace(value=jnp.float32(-1e9), waited=jnp.int32(3)),
    )
    before = jax.device_get(state)
    x = np.ones(60)
    if bad is not None:
        x[epoch_order(state.keys[1], 0, 60)[bad]] = np.inf
    limits = stretch.Limits(40, 0, 100, 13, 100, 10)
    after, history, suspects = compiled.run(state, {"x": x}, None, np.asarray(limits, np.int32))
    after = jax.device_get(after)
    if bad is None:
        assert (suspects, after.step, after.faults.in_row, after.best.waited) == (0, 40, 0, 6)
        assert np.isfinite(history["loss"][:40]).all()
        return
    assert suspects == bad + 1
    order = after.order._replace(rows=before.order.rows)
    assert order.filled == order.epoch  # so that all of its rows are made anew
    assert_trees_equal(after._replace(order=order, keys=None), before._replace(keys=None))
