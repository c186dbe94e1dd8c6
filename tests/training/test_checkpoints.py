import dataclasses
import errno
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flowvi import files
from flowvi.files import checkpoints, container
from flowvi.params import Fixed, PerRow
from flowvi.training import Plateau, StopReason
from tests.training.helpers import Loader, assert_same, compilations, rows, run, start

ADAM = optax.adam(0.05)


@dataclasses.dataclass(frozen=True)
class Noisy:
    """A loss with a metric and a Fixed leaf that moves."""

    power: int = 2

    def __call__(self, params, key, batch):
        noise = jax.random.normal(key, (3,))
        loss = jnp.mean(jnp.abs(batch - params["mean"] + noise) ** self.power)
        seen = Fixed(params["seen"].value + 1)
        return loss, {"first": params["mean"][0]}, {**params, "seen": seen}


NOISY = Noisy()
PARAMS = {**start(), "seen": Fixed(np.int32(0)), "key": Fixed(jax.random.key(5))}
VALIDATION = {"validation_data": rows(20), "validate_every": 7}


def noisy(directory=None, **options):
    every = {} if directory is None else {"checkpoint_every": 20}
    defaults = {"data": rows(), "batch_size": 25, "num_steps": 60, **VALIDATION, **every}
    settings = {**defaults, "checkpoint_dir": directory, **options}
    return run(settings.pop("loss_fn", NOISY), settings.pop("params", PARAMS),
               settings.pop("optimizer", ADAM), **settings)  # fmt: skip


def steps_in(directory):
    return sorted(int(path.stem.split("_")[1]) for path in directory.glob("step_*.flowvi"))


def stop_at(step):
    return lambda progress: progress.step >= step


@pytest.fixture
def every_step(monkeypatch):
    monkeypatch.setattr("flowvi.training.record.PACE_SECONDS", 0.0)


@pytest.fixture(scope="module")
def whole():
    return noisy()


@pytest.fixture
def done(tmp_path):
    """A directory with the checkpoints of 20 steps."""
    noisy(tmp_path, num_steps=20)
    return tmp_path


@pytest.fixture
def mapped(tmp_path):
    np.save(tmp_path / "x.npy", rows())
    return np.load(tmp_path / "x.npy", mmap_mode="r")


class TestResume:
    """A resumed run is a straight one, to the bit."""

    def check(self, directory, straight=None, **options):
        straight = noisy(**options) if straight is None else straight
        first = noisy(directory, **options, callback=stop_at(33))
        assert first.stop_reason is StopReason.CALLBACK
        assert first.num_steps == 33
        assert_same(straight, noisy(directory, resume=True, **options))
        assert steps_in(directory) == [33, 40, 60]
        # And one that is over comes back.
        assert_same(straight, noisy(directory, resume=True, **options))

    def test_with_validation(self, tmp_path, every_step, whole):
        self.check(tmp_path / "new" / "folder", whole)

    def test_with_a_schedule_free_optimizer(self, tmp_path, every_step):
        self.check(tmp_path, optimizer=optax.contrib.schedule_free_sgd(0.1))

    def test_with_a_table_and_averaging(self, tmp_path, every_step):
        params = {"table": PerRow({"z": rows()}), "m": np.ones(3, np.float32)}
        data = {"x": rows()[::-1], "row": np.arange(60)}
        options = {"loss_fn": distance, "params": params, "data": data, "averaging": 0.9}
        self.check(tmp_path, **options, validation_data=data)

    def test_with_an_iterable_and_without_validation(self, tmp_path, every_step, monkeypatch):
        monkeypatch.setattr("flowvi.training.sources.CHUNK_BYTES", 3 * 25 * 12)
        options = {"batch_size": None, "validation_data": None, "validate_every": None}
        self.check(tmp_path, data=Loader(rows(), 25), **options)

    def test_with_a_memory_map(self, tmp_path, every_step, mapped, monkeypatch):
        monkeypatch.setattr("flowvi.training.sources.CHUNK_BYTES", 3 * 25 * 12)
        self.check(tmp_path / "run", data=mapped)


def distance(params, key, batch):
    noise = 0.1 * jax.random.normal(key)
    square = (params["table"].take(batch["row"])["z"] * params["m"] - batch["x"] + noise) ** 2
    return jnp.mean(square)


def test_a_shorter_run_is_extended(tmp_path, whole):
    # At its end it validates, as the longer run does after six times seven steps.
    noisy(tmp_path, num_steps=42)
    assert_same(whole, noisy(tmp_path, resume=True))


def test_bad_steps_and_their_row_survive(tmp_path, every_step):
    x = np.ones((100, 3), np.float32)
    x[::3] = np.nan
    options = {"data": x, "check_finite": False, "batch_size": 1, "max_bad_steps": 100}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        straight = noisy(**options)
        noisy(tmp_path, **options, callback=stop_at(33))
        assert_same(straight, noisy(tmp_path, resume=True, **options))
    assert straight.num_bad_steps > 10


def test_patience_and_plateau_survive(tmp_path, every_step):
    options = {"patience": 4, "plateau": Plateau(window=10, patience=3), "num_steps": 300}
    straight = noisy(**options)
    assert straight.stop_reason in (StopReason.PATIENCE, StopReason.PLATEAU)
    noisy(tmp_path, **options, callback=stop_at(straight.num_steps // 2))
    for _ in range(2):
        assert_same(straight, noisy(tmp_path, resume=True, **options))


def test_a_result_of_a_run_that_was_over_before(tmp_path, whole):
    noisy(tmp_path)
    with compilations() as names:
        assert_same(whole, noisy(tmp_path, resume=True))
    assert not [name for name in names if "_run" in name]


# ------------------------------------------------------------------------------------ refusals


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


class Seeded(Loader):
    def __init__(self, seed):
        super().__init__(np.random.default_rng(seed).normal(size=(50, 3)).astype(np.float32), 25)


MOVED = rows()
MOVED[3, 1] += 1e-3

OTHERS = {
    "batch size": ({"batch_size": 20}, "batch_size is 25 there and 20 here"),
    "validation": ({"validate_every": 5}, "validate_every is 7 there and 5 here"),
    "averaging": ({"averaging": 0.9}, r"averaging is None there and 0.9 here"),
    "key": ({"key": jax.random.key(1)}, r"the key is \[0, 0\] there and \[0, 1\] here"),
    "loss": ({"loss_fn": Noisy(3)}, "loss_fn.power is 2 there and 3 here"),
    "more rows": ({"data": rows(70)}, "the digest of the data is "),
    "values": ({"data": MOVED}, "the digest of the data is "),
    "dtype": ({"data": cast(rows(), np.float16)}, "the digest of the data is "),
    "validation data": (
        {"validation_data": rows(20) + 1},
        "the digest of the data of the validation is ",
    ),
    "fixed": (
        {"params": {**PARAMS, "seen": Fixed(np.int32(1))}},
        "the digest of the Fixed leaves of the parameters is ",
    ),
    "fixed key": (
        {"params": {**PARAMS, "key": Fixed(jax.random.key(6))}},
        "the digest of the Fixed leaves of the parameters is ",
    ),
    "learning rate": (
        {"optimizer": optax.adam(0.06)},
        "the digest of the first update of the optimizer is ",
    ),
    "optimizer of one structure": (
        {"optimizer": optax.adamw(0.05)},
        "the digest of the first update of the optimizer is ",
    ),
    "optimizer": ({"optimizer": optax.sgd(0.05)}, "the optimizer's state.* and absent here"),
    "shape": (
        {"params": {**PARAMS, "more": np.zeros(2, np.float32)}},
        r"params\['more'\] is absent there and float32\[2\] here",
    ),
    "configuration": (
        {"configuration": {"the weather": "rain"}},
        "the weather is absent there and rain here",
    ),
}


@pytest.fixture(scope="module")
def twenty(tmp_path_factory):
    directory = tmp_path_factory.mktemp("twenty")
    noisy(directory, num_steps=20)
    return directory


@pytest.mark.parametrize("case", OTHERS)
def test_another_run_is_refused_by_name(twenty, case):
    options, message = OTHERS[case]
    rule = "`checkpoint_dir` must hold checkpoints of this very fit; in .*step_0000000020.flowvi'"
    with pytest.raises(ValueError, match=f"{rule} {message}") as caught:
        noisy(twenty, resume=True, **options)
    assert len(str(caught.value)) < 350
    assert steps_in(twenty) == [20]


def other(params, key, batch):
    return NOISY(params, key, batch)


def test_another_function_or_loader_is_refused_by_name(tmp_path):
    options = {"data": Seeded(0), "batch_size": None}
    noisy(tmp_path, num_steps=10, **options)
    with pytest.raises(ValueError, match=r"loss_fn is Noisy there and other here"):
        noisy(tmp_path, resume=True, **options, loss_fn=other)
    with pytest.raises(ValueError, match=r"the digest of the data is .* there and .* here"):
        noisy(tmp_path, resume=True, data=Seeded(1), batch_size=None)
    noisy(tmp_path, resume=True, num_steps=11, data=Seeded(0), batch_size=None)


def test_what_ends_a_run_may_differ(done):
    noisy(done, resume=True, patience=3, max_bad_steps=5, checkpoint_every=30, num_steps=30)
    assert steps_in(done) == [20, 30]


def test_other_files_are_refused(done):
    (path,) = done.glob("step_*.flowvi")
    files.save(path, start())
    with pytest.raises(ValueError, match=r"must hold checkpoints; .* is another file of flowvi"):
        noisy(done, resume=True)
    path.write_bytes(b"123")
    with (
        pytest.warns(RuntimeWarning, match="checkpoint of step 20 is damaged and left out"),
        pytest.raises(ValueError, match=r"must hold a checkpoint that is whole; all in .* damaged"),
    ):
        noisy(done, resume=True)


def test_a_used_directory_is_not_written_over(done):
    with pytest.raises(ValueError, match=r"must hold no checkpoints where `resume` is False; .*20"):
        noisy(done)
    # The refusal has left no lock.
    noisy(done, resume=True, num_steps=25)


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`checkpoint_dir` must be a directory that can be"):
        noisy(tmp_path / "file")


@pytest.mark.parametrize("options", [{"checkpoint_every": 5}, {"resume": True}])
def test_options_without_a_directory(options):
    with pytest.raises(ValueError, match="`checkpoint_dir` must be a directory where"):
        noisy(**options)


# ------------------------------------------------------------------------------------- accidents


@pytest.mark.parametrize("how", ["truncated", "empty", "changed"])
def test_damaged_checkpoints_are_left_out(tmp_path, whole, how):
    noisy(tmp_path)
    assert steps_in(tmp_path) == [20, 40, 60]
    for step in (40, 60):
        path = tmp_path / f"step_{step:010d}.flowvi"
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[-3] ^= 1
        path.write_bytes({"truncated": content[:700], "empty": b"", "changed": damaged}[how])
    with pytest.warns(RuntimeWarning, match="checkpoint of step .* is damaged and left") as caught:
        assert_same(whole, noisy(tmp_path, resume=True))
    assert len(caught) == 2
    assert steps_in(tmp_path) == [20, 40, 60]


def test_a_full_disk_is_warned_of(tmp_path, whole, monkeypatch):
    write = container.write

    def full(path, about, arrays):
        if about["checkpoint"] >= 40:
            pathlib.Path(f"{path}.part").write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, about, arrays)

    monkeypatch.setattr(container, "write", full)
    message = (
        "could not be written to .*, so training goes on without it, and older ones stay: .*space"
    )
    with pytest.warns(RuntimeWarning, match=message) as caught:
        result = noisy(tmp_path)
    assert len(caught) == 2
    assert_same(result, whole)
    assert steps_in(tmp_path) == [20]
    monkeypatch.undo()
    assert_same(whole, noisy(tmp_path, resume=True))


def test_two_fits_in_one_directory(tmp_path):
    caught = []

    def callback(progress):
        del progress
        if not caught:
            with pytest.raises(
                ValueError, match=r"must belong to one running fit; .* is locked by"
            ):
                noisy(tmp_path, resume=True)
            caught.append(1)

    noisy(tmp_path, num_steps=20, callback=callback)
    assert caught
    noisy(tmp_path, num_steps=21, resume=True)


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(60)
"""


def test_a_kill_leaves_no_lock(done):
    # What another process holds goes with it.
    holder = subprocess.Popen([sys.executable, "-c", HOLD, done / "lock"], stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(ValueError, match=f"{re.escape(str(done))}' is locked by another"):
            noisy(done, resume=True)
        holder.kill()
    noisy(done, resume=True, num_steps=21)


def test_three_fits_in_threads(tmp_path, whole):
    results = [None] * 3

    def work(index):
        results[index] = noisy(tmp_path / str(index))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, result in enumerate(results):
        assert_same(result, whole)
        assert steps_in(tmp_path / str(index)) == [20, 40, 60]


def test_an_exception_leaves_the_last_checkpoint_and_no_lock(tmp_path, every_step, whole):
    def callback(progress):
        if progress.step == 33:
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine") as caught:
        noisy(tmp_path, callback=callback)
    assert caught.value.result.num_steps == 33
    assert steps_in(tmp_path) == [20]
    assert_same(whole, noisy(tmp_path, resume=True))


def test_old_checkpoints_go(tmp_path):
    noisy(tmp_path, checkpoint_every=5)
    assert checkpoints.KEPT == 3
    assert steps_in(tmp_path) == [50, 55, 60]
    assert {path.name for path in tmp_path.iterdir()} - {"lock"} == {
        f"step_{step:010d}.flowvi" for step in (50, 55, 60)
    }
    assert [len(path.read_bytes()) < 20_000 for path in tmp_path.glob("step*")] == [True] * 3


SCRIPT = """
    import os, pathlib, sys, threading, time
    import jax, jax.numpy as jnp, optax
    import flowvi as fv

    where, number = pathlib.Path(sys.argv[1]), int(sys.argv[2])

    def watch():
        while not [path for path in where.glob("*.flowvi") if int(path.stem[5:]) > 400]:
            time.sleep(0.0005)
        os.kill(os.getpid(), number)

    def loss_fn(params, key, batch):
        return jnp.sum((params - jax.random.normal(key, (3,))) ** 2)

    if number:
        where.mkdir()
        threading.Thread(target=watch, daemon=True).start()
    result = fv.fit(loss_fn, jnp.zeros(3), optax.adam(0.1), key=jax.random.key(0),
                    num_steps=2000, progress=False, checkpoint_dir=where,
                    checkpoint_every=100, resume=True)
    print(result.params.tolist(), result.history["loss"].sum())
"""


@pytest.mark.slow
def test_a_kill_leaves_no_lock_and_loses_no_bit(tmp_path):
    # In a process of its own, which kills itself while a checkpoint is being written.
    def python(directory, number):
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", textwrap.dedent(SCRIPT), directory, str(number)],
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=False,
        )

    killed = python(tmp_path / "killed", int(signal.SIGKILL))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed, straight = python(tmp_path / "killed", 0), python(tmp_path / "straight", 0)
    assert straight.returncode == 0, straight.stderr
    assert resumed.stdout == straight.stdout
