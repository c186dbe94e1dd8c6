"""Checkpoints of a running fit: files of a run's state, its history, and what is being fitted.

A checkpoint is written beside the running steps, and renamed when it is whole. One directory
belongs to one run at a time.
"""

import concurrent.futures
import contextlib
import os
import pathlib
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from flowvi.files import container
from flowvi.files.container import Arrays, Json, Path
from flowvi.files.objects import difference
from flowvi.params import PyTree, is_key, named_leaves, numbers

try:
    import fcntl
except ImportError:  # not on Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

Array = jax.Array
History = dict[str, np.ndarray]

#: Checkpoints that are kept: the last ones.
KEPT = 3

_NAME = re.compile(r"step_(\d+)\.flowvi")


class Checkpoints:
    """The checkpoints of one run in one directory, which is made if it is missing.

    There is one every so many steps; `configuration` says what is being fitted: see `difference`.

    Raises:
        ValueError: if the directory cannot be written, belongs to a run that goes on, or holds
            checkpoints and `resume` is False.
    """

    def __init__(self, directory: Path, every: int, resume: bool, configuration: dict[str, str]):
        self._directory = pathlib.Path(directory).expanduser().absolute()
        self._every, self._configuration = every, configuration
        self._saved: int | None = None
        shown = repr(str(self._directory))
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._directory / "lock", os.O_CREAT | os.O_RDWR, 0o666)
        except OSError as error:
            rule = "`checkpoint_dir` must be a directory that can be written"
            raise ValueError(f"{rule}; got {shown}: {error}.") from None
        try:
            if fcntl is not None:
                # The system frees it with the process, however that ends.
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            rule = f"`checkpoint_dir` must belong to one running fit; {shown} is locked by another"
            fix = "Perhaps give each fit a directory of its own?"
            raise ValueError(f"{rule}. {fix}") from None
        steps = self._steps()
        if steps and not resume:
            os.close(self._lock)
            rule = "`checkpoint_dir` must hold no checkpoints where `resume` is False"
            fix = "Perhaps pass `resume=True`, or another directory?"
            raise ValueError(f"{rule}; {shown} holds one of step {max(steps)}. {fix}")
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "flowvi-checkpoints")
        self._written: concurrent.futures.Future[None] | None = None

    def until(self, step: int) -> int:
        """The first step after `step` at which a checkpoint is due."""
        return (step // self._every + 1) * self._every

    def save(self, step: int, state: PyTree, history: History) -> None:
        """Copies a state and begins to write it; warns where that cannot be written."""
        if step == self._saved:
            return
        self._saved = step
        self._wait()
        leaves = named_leaves("state", jax.device_get(state))
        arrays = {name: np.array(numbers(leaf)) for name, leaf in leaves.items()}
        arrays |= {f"history[{name!r}]": values for name, values in history.items()}
        about: Json = {"checkpoint": step, "history": list(history)}
        about["configuration"] = dict(self._configuration)
        self._written = self._thread.submit(self._write, step, about, arrays)

    def _write(self, step: int, about: Json, arrays: Arrays) -> None:
        container.write(self._path(step), about, arrays)
        for old in self._steps()[:-KEPT]:
            self._path(old).unlink(missing_ok=True)

    def _wait(self) -> None:
        if self._written is None:
            return
        try:
            self._written.result()
        except OSError as error:
            what = f"A checkpoint could not be written to {str(self._directory)!r}"
            then = f"so training goes on without it, and older ones stay: {error}"
            warnings.warn(f"{what}, {then}", RuntimeWarning, stacklevel=4)
        self._written = None

    def restore(self, state: PyTree) -> tuple[PyTree, History] | None:
        """The state and history of the last checkpoint that is whole; None if there is none at all.

        The state has the structure, shapes and dtypes of that which is given.

        Raises:
            ValueError: if a checkpoint is that of another run, or none of them is whole.
        """
        reason = None
        for step in reversed(self._steps()):
            path = self._path(step)
            try:
                about, arrays = container.read(path)
            except (OSError, ValueError) as error:
                reason = error
                what = f"The checkpoint of step {step} is damaged and left out"
                warnings.warn(f"{what}: {error}", RuntimeWarning, stacklevel=4)
                continue
            saved = about.get("configuration") if isinstance(about, dict) else None
            rule = "`checkpoint_dir` must hold checkpoints"
            if not isinstance(saved, dict):
                raise ValueError(f"{rule}; {str(path)!r} is another file of flowvi.")
            if (different := difference(saved, self._configuration)) is not None:
                raise ValueError(f"{rule} of this very fit; in {str(path)!r} {different}.")
            for later in self._steps():
                if later > step:  # damaged, and in the way of new ones
                    self._path(later).unlink(missing_ok=True)
            self._saved = step
            history = {name: arrays[f"history[{name!r}]"] for name in about["history"]}
            return _restored(state, arrays), history
        if reason is not None:
            rule = "`checkpoint_dir` must hold a checkpoint that is whole"
            raise ValueError(f"{rule}; all in {str(self._directory)!r} are damaged: {reason}")
        return None

    def _path(self, step: int) -> pathlib.Path:
        return self._directory / f"step_{step:010d}.flowvi"

    def _steps(self) -> list[int]:
        found = map(_NAME.fullmatch, os.listdir(self._directory))
        return sorted(int(match[1]) for match in found if match)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, self._lock)
            stack.callback(self._thread.shutdown)
            self._wait()


def _restored(state: PyTree, arrays: Arrays) -> PyTree:
    """A state like `state` with these numbers, in buffers of its own."""

    def restored(path: tuple, like: Array) -> Array:
        saved = jnp.asarray(arrays[f"state{jax.tree_util.keystr(path)}"])
        if is_key(like):
            return jax.random.wrap_key_data(saved, impl=jax.random.key_impl(like))
        return jnp.array(saved, dtype=like.dtype, copy=True)

    return jax.tree_util.tree_map_with_path(restored, state)
