import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowvi.training import StopReason, fit, fit_density, order, sources
from tests.training.helpers import Gauss, assert_trees_equal, quadratic, rows, start

KEY = jax.random.key(0)
ADAM = optax.adam(0.05)


class Loader:
    """Batches of rows in order, the last one ragged; it can be iterated again and again."""

    def __init__(self, x, batch_size):
        self.x, self.batch_size, self.epochs = np.asarray(x), batch_size, 0

    def __iter__(self):
        self.epochs += 1
        for i in range(0, len(self.x), self.batch_size):
            yield self.x[i : i + self.batch_size]


def seen(params, key, batch):
    """A loss whose metrics tell which rows there were."""
    del key
    metrics = {"first": batch[0, 0], "sum": batch.sum(), "size": jnp.float32(batch.shape[0])}
    return jnp.sum(params["mean"] ** 2) + 0 * batch.sum(), metrics


@pytest.fixture
def mapped(tmp_path):
    def make(x):
        path = tmp_path / "x.npy"
        np.save(path, np.asarray(x))
        return np.load(path, mmap_mode="r")

    return make


@pytest.mark.parametrize(("num_rows", "count", "place"), [(7, 20, 3), (1000, 10, 995), (5, 2, 0)])
def test_rows_one_by_one_are_those_of_the_epochs(num_rows, count, place):
    epochs = [np.asarray(order.epoch_order(KEY, e, num_rows)) for e in range(4 + count // num_rows)]
    found = order.rows_at(KEY, place, count, num_rows)
    np.testing.assert_array_equal(found, np.concatenate(epochs)[place : place + count])


def test_rows_of_a_memory_map_give_the_same_bits(mapped, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_BATCHES", 3)
    x = rows()
    options = {"key": KEY, "num_steps": 40, "batch_size": 25, "progress": False}
    here = fit(seen, start(), ADAM, data=x, **options)
    there = fit(seen, start(), ADAM, data=mapped(x), **options)
    assert_trees_equal(here.params, there.params)
    assert_trees_equal(here.history, there.history)


def test_memory_map_of_double_precision_is_cast(mapped):
    x = np.asarray(rows(), np.float64)
    result = fit(
        quadratic,
        start(),
        ADAM,
        key=KEY,
        num_steps=20,
        data=mapped(x),
        batch_size=8,
        progress=False,
    )
    assert result.params["mean"].dtype == jnp.float32


def test_density_of_a_memory_map(mapped):
    x = np.asarray(rows(2000))[:, :2]
    options = {"key": KEY, "num_steps": 300, "progress": False}
    here = fit_density(Gauss(), x, **options)
    there = fit_density(Gauss(), mapped(x), **options)
    score = lambda r: float(Gauss().log_prob(r.params, x).mean())  # noqa: E731
    # Units come from all rows there, and from those that are not held out here.
    assert abs(score(here) - score(there)) < 0.01
    assert there.best_step is not None


def test_subset_is_the_rest_of_a_shuffle():
    x = np.arange(50.0)[:, None]
    rest = sources.Subset(x, KEY, 10, 40)
    assert rest.shape == (40, 1)
    held_out = x[order.rows_at(KEY, 0, 10, 50)]
    everything = np.concatenate([held_out, np.asarray(rest)])
    np.testing.assert_array_equal(np.sort(everything, 0), x)


def test_iterable_is_used_whole_and_anew(monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_BATCHES", 2)
    x = np.asarray(rows(25))
    loader = Loader(x, 10)
    result = fit(seen, start(), ADAM, key=KEY, num_steps=7, data=loader, progress=False)
    np.testing.assert_array_equal(result.history["size"], [10, 10, 5, 10, 10, 5, 10])
    sums = [x[:10].sum(), x[10:20].sum(), x[20:].sum()]
    np.testing.assert_allclose(result.history["sum"], [*sums, *sums, sums[0]], rtol=1e-5)
    assert loader.epochs >= 3
    assert result.stop_reason is StopReason.MAX_STEPS


def test_iterator_ends_training():
    batches = iter(Loader(rows(25), 10))
    result = fit(seen, start(), ADAM, key=KEY, num_steps=100, data=batches, progress=False)
    assert result.stop_reason is StopReason.DATA
    assert result.num_steps == 3


def test_iterable_of_pytrees():
    class Pairs:
        def __iter__(self):
            for i in range(3):
                yield {"x": np.full((4, 2), float(i)), "y": [np.ones(4, np.int32)]}

    def loss_fn(params, key, batch):
        del key
        return jnp.mean((batch["x"] - params) ** 2) * batch["y"][0].mean()

    result = fit(loss_fn, jnp.zeros(2), ADAM, key=KEY, num_steps=9, data=Pairs(), progress=False)
    assert result.num_steps == 9


def test_threads_end_with_the_fit():
    import threading

    before = threading.active_count()
    fit(seen, start(), ADAM, key=KEY, num_steps=2, data=Loader(rows(30), 10), progress=False)
    assert threading.active_count() == before


def test_error_of_an_iterable_comes_through():
    def broken():
        yield np.ones((4, 3), np.float32)
        yield np.ones((4, 3), np.float32)
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        fit(seen, start(), ADAM, key=KEY, num_steps=9, data=broken(), progress=False)


# ------------------------------------------------------------------------------------- bad input


def run(data, **options):
    return fit(quadratic, start(), ADAM, key=KEY, num_steps=3, data=data, progress=False, **options)


def test_empty_iterable():
    with pytest.raises(ValueError, match="`data` must give at least one batch; got none"):
        run(iter([]))


def test_batch_size_of_an_iterable():
    with pytest.raises(ValueError, match="`batch_size` must be None where `data` is an iterable"):
        run(Loader(rows(), 10), batch_size=5)


def test_batches_of_another_structure():
    def batches():
        yield np.ones((4, 3), np.float32)
        yield {"x": np.ones((4, 3), np.float32)}

    with pytest.raises(ValueError, match="`batch 2 of data` must have the structure"):
        run(batches())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_named_by_row(value, mapped):
    x = np.asarray(rows()).copy()
    x[17, 1] = value
    for data in (x, jnp.asarray(x), mapped(x)):
        with pytest.raises(ValueError, match=rf"`data` must be finite; got {value} in row 17"):
            run(data, batch_size=5)
    with pytest.raises(ValueError, match=r"`data\['x'\]` must be finite"):
        run({"x": x})
    assert run(x, check_finite=False).num_bad_steps == 3


def test_density_names_row_and_column_of_a_memory_map(mapped, monkeypatch):
    monkeypatch.setattr(sources, "CHECK_SIZE", 40)
    x = np.asarray(rows(200))[:, :2].copy()
    x[117, 1] = np.inf
    with pytest.raises(ValueError, match="`x` must be finite; got inf in row 117, column 1"):
        fit_density(Gauss(), mapped(x), key=KEY)
