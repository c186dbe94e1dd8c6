import threading

import jax.numpy as jnp
import numpy as np
import pytest

from flowvi import supports
from flowvi.training import StopReason, sources
from tests.training.helpers import Loader, assert_same, compilations, rows, run


def seen(params, key, batch):
    """A loss whose metrics tell which rows there were."""
    del key
    metrics = {"first": batch[0, 0], "sum": batch.sum(), "size": jnp.float32(batch.shape[0])}
    return jnp.sum((params["mean"] - batch.mean(0)) ** 2), metrics


@pytest.fixture
def mapped(tmp_path):
    def make(x):
        np.save(tmp_path / "x.npy", np.asarray(x))
        return np.load(tmp_path / "x.npy", mmap_mode="r")

    return make


@pytest.mark.parametrize("num_batches", [3, None])
def test_rows_of_a_memory_map_come_in_the_order_of_arrays(mapped, monkeypatch, num_batches):
    x = rows()
    here = run(seen, num_steps=40, data=x, batch_size=25)
    if num_batches is not None:
        monkeypatch.setattr(sources, "CHUNK_BYTES", num_batches * 25 * 12)
    there = run(seen, num_steps=40, data=mapped(x), batch_size=25)
    np.testing.assert_array_equal(here.history["first"], there.history["first"])
    np.testing.assert_allclose(here.history["sum"], there.history["sum"], rtol=1e-6)
    np.testing.assert_allclose(here.params["mean"], there.params["mean"], rtol=1e-6)


def test_chunks_of_a_memory_map_change_no_bit(mapped, monkeypatch):
    results = []
    for num_batches in (2, 3, 256):
        monkeypatch.setattr(sources, "CHUNK_BYTES", num_batches * 25 * 12)
        results.append(run(seen, num_steps=40, data=mapped(rows()), batch_size=25))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_a_memory_map_of_double_precision_is_cast_and_all_of_it_is_one_batch(mapped):
    x = mapped(rows().astype(np.float64))
    result = run(num_steps=3, data=x, batch_size=8)
    assert result.params["mean"].dtype == jnp.float32
    assert_same(run(num_steps=3, data=x), run(num_steps=3, data=rows()))


def test_an_iterable_is_used_whole_and_anew(monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_BYTES", 2 * 10 * 12)
    x, loader = rows(25), Loader(rows(25), 10)
    result = run(seen, num_steps=7, data=loader)
    np.testing.assert_array_equal(result.history["size"], [10, 10, 5, 10, 10, 5, 10])
    sums = [x[:10].sum(), x[10:20].sum(), x[20:].sum()]
    np.testing.assert_allclose(result.history["sum"], [*sums, *sums, sums[0]], rtol=1e-5)
    assert loader.epochs >= 3
    assert result.stop_reason is StopReason.MAX_STEPS


def test_an_iterator_ends_training():
    result = run(seen, num_steps=100, data=iter(Loader(rows(25), 10)))
    assert result.stop_reason is StopReason.DATA
    assert result.num_steps == 3


def test_an_iterable_of_pytrees():
    class Pairs:
        def __iter__(self):
            for i in range(3):
                yield {"x": np.full((4, 3), float(i)), "y": [np.ones(4, np.int32)]}

    def loss_fn(params, key, batch):
        del key
        return jnp.mean((batch["x"] - params["mean"]) ** 2) * batch["y"][0].mean()

    assert run(loss_fn, num_steps=9, data=Pairs()).num_steps == 9


def test_lists_are_data():
    # A list is a pytree of its rows' arrays, not an array.
    with pytest.raises(ValueError, match=r"`data\[0\]` must have a leading axis of rows"):
        run(data=[1.0, 2.0])


def ragged(count):
    class Ragged:
        def __iter__(self):
            return (np.ones((i + 1, 3), np.float32) for i in range(count))

    return Ragged()


@pytest.mark.parametrize("count", [3, 4])
def test_the_fourth_shape_of_batches_is_warned_of(count):
    if count == 3:  # without a word, which would be an error
        run(num_steps=7, data=ragged(3))
        return
    with pytest.warns(RuntimeWarning, match="Batches of 4 different shapes .* compiled anew"):
        run(num_steps=9, data=ragged(4))
    with compilations() as names, pytest.warns(RuntimeWarning, match="4 different shapes"):
        run(num_steps=9, data=ragged(4))
    assert not names


def test_threads_end_with_the_fit(mapped):
    before = threading.active_count()
    run(num_steps=2, data=Loader(rows(30), 10))
    run(num_steps=2, data=rows(), batch_size=10)
    run(num_steps=2, data=mapped(rows()), batch_size=10)
    assert threading.active_count() == before


def test_an_error_of_an_iterable_carries_the_result():
    def broken():
        for _ in range(300):  # more than a chunk
            yield rows(4)
        raise RuntimeError("the disk is gone")

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="the disk is gone") as caught:
        run(num_steps=1000, data=broken())
    result = caught.value.result
    assert result.stop_reason == "error"
    assert result.num_steps == len(result.history["loss"]) == 256
    np.testing.assert_allclose(result.params["mean"], rows(4).mean(0), atol=0.3)
    assert any("256 steps is this exception's `result`" in note for note in caught.value.__notes__)
    assert threading.active_count() == before


# ------------------------------------------------------------------------------------- bad input


def test_bad_iterables():
    with pytest.raises(ValueError, match="`data` must give at least one batch; got none"):
        run(data=iter([]))
    with pytest.raises(ValueError, match="`batch_size` must be None where `data` is an iterable"):
        run(data=Loader(rows(), 10), batch_size=5)
    with pytest.raises(ValueError, match="`batch 2 of data` must have the structure"):
        run(data=iter([np.ones((4, 3), np.float32), {"x": np.ones((4, 3), np.float32)}]))
    with pytest.raises(ValueError, match=r"`batch 2 of data` must have no masked entries"):
        run(data=iter([rows(4), np.ma.masked_less(rows(4), 1)]))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_named_by_row(value, mapped, monkeypatch):
    monkeypatch.setattr(supports, "CHUNK_SIZE", 40)
    x = rows()
    x[17, 1] = value
    for data in (x, jnp.asarray(x), mapped(x)):
        with pytest.raises(ValueError, match=rf"`data` must be finite; got {value} in row 17"):
            run(data=data, batch_size=5)
    with pytest.raises(ValueError, match=r"`data\['x'\]` must be finite"):
        run(data={"x": x})
    with pytest.warns(RuntimeWarning, match="3 of 3 steps were skipped"):
        assert run(data=x, check_finite=False, num_steps=3).num_bad_steps == 3


def test_masked_rows_are_named():
    x = np.ma.masked_array(rows(), np.arange(180).reshape(60, 3) == 50)
    for data, where in ((x, "data"), ({"x": x}, r"data\['x'\]")):
        with pytest.raises(
            ValueError, match=rf"`{where}` must have no masked entries; .* in row 16"
        ):
            run(data=data, batch_size=5)
    with pytest.raises(
        ValueError, match=r"`validation_data` must have no masked entries; .* row 16"
    ):
        run(data=rows(), validation_data=x, validate_every=5)
    # A masked array without a mask is an array.
    assert run(data=np.ma.masked_array(rows()), batch_size=5).num_bad_steps == 0
