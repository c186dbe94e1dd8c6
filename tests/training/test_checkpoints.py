import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowvi.params import Fixed
from flowvi.training import Plateau, StopReason, fit, fit_density, sources
from tests.training.helpers import Gauss, assert_trees_equal, rows, start
from tests.training.test_sources import Loader

pytest.importorskip("orbax.checkpoint", reason="checkpoints need Orbax, an extra")

KEY = jax.random.key(0)
ADAM = optax.adam(0.05)


def noisy(params, key, batch):
    """With a metric and a Fixed leaf that moves."""
    noise = jax.random.normal(key, (3,))
    loss = jnp.mean((batch - params["mean"] + noise) ** 2)
    seen = Fixed(params["seen"].value + 1)
    return loss, {"first": params["mean"][0]}, {**params, "seen": seen}


def params():
    return {**start(), "seen": Fixed(jnp.zeros((), jnp.int32)), "key": Fixed(jax.random.key(5))}


def run(directory=None, num_steps=60, **options):
    return fit(
        noisy,
        params(),
        ADAM,
        key=KEY,
        num_steps=num_steps,
        progress=False,
        checkpoint_dir=directory,
        **{
            "data": rows(),
            "batch_size": 25,
            "validation_data": rows(20),
            "validate_every": 7,
            **({} if directory is None else {"checkpoint_every": 20}),
            **options,
        },
    )


def assert_same(first, second):
    plain = lambda tree: jax.tree.map(  # noqa: E731
        lambda a: jax.random.key_data(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a,
        tree,
    )
    assert_trees_equal(plain(first.params), plain(second.params))
    assert_trees_equal(plain(first.last_params), plain(second.last_params))
    assert_trees_equal(first.history, second.history)
    assert first.best_step == second.best_step
    assert first.num_steps == second.num_steps
    assert first.stop_reason == second.stop_reason


def steps_in(directory):
    return sorted(int(path.name) for path in pathlib.Path(directory).iterdir())


def stop_at(step):
    return lambda look: look.step >= step


@pytest.mark.parametrize("averaging", [None, 0.9])
def test_resumes_to_the_same_bits(tmp_path, monkeypatch, averaging):
    monkeypatch.setattr("flowvi.training.record.LOOK_SECONDS", 0.0)
    whole = run(averaging=averaging)
    first = run(tmp_path, averaging=averaging, callback=stop_at(33))
    assert first.stop_reason is StopReason.CALLBACK
    assert first.num_steps < 60
    second = run(tmp_path, averaging=averaging, resume=True)
    assert_same(whole, second)
    assert steps_in(tmp_path) == sorted({20, first.num_steps, 40, 60})[-3:]


def test_resumes_a_shorter_run_and_one_that_is_over(tmp_path):
    # At its end it validates, as the longer run does after six times seven steps.
    run(tmp_path, num_steps=42)
    assert_same(run(), run(tmp_path, resume=True))
    assert_same(run(), run(tmp_path, resume=True))


def test_begins_where_there_is_nothing(tmp_path):
    assert_same(run(), run(tmp_path / "new" / "folder", resume=True))


def test_patience_and_plateau_survive(tmp_path, monkeypatch):
    monkeypatch.setattr("flowvi.training.record.LOOK_SECONDS", 0.0)
    options = {"patience": 4, "plateau": Plateau(window=10, patience=3), "num_steps": 500}
    whole = run(**options)
    assert whole.stop_reason in (StopReason.PATIENCE, StopReason.PLATEAU)
    run(tmp_path, **options, callback=stop_at(whole.num_steps // 2))
    assert_same(whole, run(tmp_path, resume=True, **options))
    assert_same(whole, run(tmp_path, resume=True, **options))


@pytest.mark.parametrize("kind", ["memory map", "iterable"])
def test_other_sources_resume_too(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("flowvi.training.record.LOOK_SECONDS", 0.0)
    monkeypatch.setattr(sources, "CHUNK_BATCHES", 3)
    np.save(tmp_path / "x.npy", np.asarray(rows()))
    options = {"data": np.load(tmp_path / "x.npy", mmap_mode="r")}
    if kind == "iterable":
        options = {"data": Loader(rows(), 25), "batch_size": None}
    whole = run(**options)
    run(tmp_path / "run", **options, callback=stop_at(33))
    assert_same(whole, run(tmp_path / "run", resume=True, **options))


def test_density_resumes(tmp_path):
    x = rows(300)[:, :2]
    options = {"key": KEY, "progress": False, "patience": None}
    whole = fit_density(Gauss(), x, num_steps=60, **options)
    again = {"checkpoint_dir": tmp_path, "checkpoint_every": 25}
    fit_density(Gauss(), x, num_steps=60, **options, **again)
    assert_same(whole, fit_density(Gauss(), x, num_steps=60, resume=True, **options, **again))


# Orbax leaves coroutines behind where it cannot read a file.
orbax_leaves_coroutines = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore:coroutine .* was never awaited:RuntimeWarning",
)


def damage(path, how):
    if how == "removed":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])


@orbax_leaves_coroutines
@pytest.mark.parametrize("how", ["truncated", "removed"])
def test_damaged_checkpoints_are_left_out(tmp_path, how):
    whole = run()
    run(tmp_path)
    assert steps_in(tmp_path) == [20, 40, 60]
    files = [p for p in (tmp_path / "60").rglob("*") if p.is_file() and p.stat().st_size]
    for path in files:
        damage(path, how)
    with pytest.warns(RuntimeWarning, match="checkpoint of step 60 .* is damaged and left out"):
        assert_same(whole, run(tmp_path, resume=True))
    assert steps_in(tmp_path) == [20, 40, 60]


@orbax_leaves_coroutines
def test_any_one_damaged_file_is_noticed_or_harmless(tmp_path):
    whole = run()
    run(tmp_path)
    files = [p for p in (tmp_path / "60").rglob("*") if p.is_file() and p.stat().st_size]
    for index, path in enumerate(files):
        copy = tmp_path.with_name(f"{tmp_path.name}_{index}")
        shutil.copytree(tmp_path, copy)
        damage(copy / path.relative_to(tmp_path), "truncated")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            assert_same(whole, run(copy, resume=True))


@orbax_leaves_coroutines
def test_all_damaged(tmp_path):
    run(tmp_path, num_steps=20)
    for path in [p for p in (tmp_path / "20").rglob("*") if p.is_file() and p.stat().st_size]:
        damage(path, "truncated")
    with (
        pytest.warns(RuntimeWarning, match="damaged"),
        pytest.raises(ValueError, match="must hold a checkpoint that is whole; all 1 in"),
    ):
        run(tmp_path, resume=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 20}, "batch_size is 25 there and 20 here"),
        ({"data": rows(70)}, "the number of rows is 60 there and 70 here"),
        ({"validate_every": 5}, "validate_every is 7 there and 5 here"),
    ],
)
def test_another_run_is_refused_by_name(tmp_path, options, message):
    run(tmp_path, num_steps=20)
    with pytest.raises(
        ValueError, match=f"`checkpoint_dir` must hold .* this very fit; .*{message}"
    ):
        run(tmp_path, resume=True, **options)


def test_another_model_key_or_optimizer_is_refused_by_name(tmp_path):
    def other(params, optimizer=ADAM, key=KEY):
        def loss_fn(params, key, batch):
            del key, batch
            return jnp.sum(params["mean"] ** 2)

        fit(
            loss_fn,
            params,
            optimizer,
            key=key,
            num_steps=20,
            progress=False,
            checkpoint_dir=tmp_path,
            resume=True,
        )

    other({"mean": jnp.ones(3)})
    with pytest.raises(
        ValueError, match=r"params\['mean'\] is float32\[3\] there and float32\[4\]"
    ):
        other({"mean": jnp.ones(4)})
    with pytest.raises(ValueError, match=r"the optimizer's state.* there and absent here"):
        other({"mean": jnp.ones(3)}, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"key is \[0, 0\] there and \[0, 1\] here"):
        other({"mean": jnp.ones(3)}, key=jax.random.key(1))


def test_files_of_another_program_are_refused(tmp_path):
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "weights.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match="`checkpoint_dir` must hold checkpoints of this very fit"):
        run(tmp_path, resume=True)


def test_a_used_directory_is_not_written_over(tmp_path):
    run(tmp_path, num_steps=20)
    with pytest.raises(ValueError, match=r"must hold no checkpoints where `resume` is False; .*20"):
        run(tmp_path)


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`checkpoint_dir` must be a directory that can be"):
        run(tmp_path / "file")


@pytest.mark.parametrize("options", [{"checkpoint_every": 5}, {"resume": True}])
def test_options_without_a_directory(options):
    with pytest.raises(ValueError, match="`checkpoint_dir` must be a directory where"):
        run(**options)


def test_kill_in_the_middle(tmp_path):
    # In a process of its own, which kills itself while a checkpoint is being written.
    script = """
        import os, pathlib, sys, threading, time
        import jax, jax.numpy as jnp, optax
        import flowvi as fv

        where, kill = pathlib.Path(sys.argv[1]), sys.argv[2] == "kill"

        def watch():
            while not (steps := [p for p in where.glob("*") if int(p.name.split(".")[0]) > 400]):
                time.sleep(0.0005)
            os.kill(os.getpid(), 9)

        def loss_fn(params, key, batch):
            return jnp.sum((params - jax.random.normal(key, (3,))) ** 2)

        if kill:
            where.mkdir()
            threading.Thread(target=watch, daemon=True).start()
        result = fv.fit(loss_fn, jnp.zeros(3), optax.adam(0.1), key=jax.random.key(0),
                        num_steps=2000, progress=False, checkpoint_dir=where,
                        checkpoint_every=100, resume=True)
        print(result.params.tolist(), result.history["loss"].sum())
    """

    def python(directory, mode):
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), directory, mode],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=False,
        )

    killed = python(tmp_path / "killed", "kill")
    assert killed.returncode == -9, killed.stderr
    resumed, whole = python(tmp_path / "killed", "go"), python(tmp_path / "whole", "go")
    assert whole.returncode == 0, whole.stderr
    assert resumed.stdout == whole.stdout
