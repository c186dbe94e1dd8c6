"""Checkpoints of a running fit, by Orbax.

A checkpoint holds all of a run's state, its history, and a fingerprint of what is being fitted.
Orbax writes it beside the running steps and renames it when it is whole; a digest of the arrays
tells whether it is still whole when it is read.
"""

import contextlib
import hashlib
import pathlib
import tempfile
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowvi.training.fingerprint import Fingerprint, difference
from flowvi.training.result import History

#: Checkpoints that are kept: the last ones.
KEPT = 3

FORMAT = "flowvi.fit 1"


class Checkpoints:
    """The checkpoints of one run in one directory.

    Args:
        directory: where they are; made if it is missing.
        every: steps between two of them.
        resume: whether to go on from those that are there.
        fingerprint: what the run looks like.

    Raises:
        ImportError: if Orbax is not installed.
        ValueError: if the directory cannot be written, or holds checkpoints and `resume` is False.
    """

    def __init__(self, directory: Any, every: int, resume: bool, fingerprint: Fingerprint):
        self._directory = _writable(directory)
        self._every = every
        self._fingerprint = fingerprint
        self._saved: int | None = None
        with _quiet():
            ocp = _orbax()
            self._args = ocp.args
            self._manager = ocp.CheckpointManager(
                self._directory,
                item_names=("state", "history", "about"),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=KEPT, enable_async_checkpointing=True
                ),
            )
        steps = self._manager.all_steps()
        if steps and not resume:
            self._manager.close()
            raise ValueError(
                "`checkpoint_dir` must hold no checkpoints where `resume` is False; "
                f"{str(self._directory)!r} holds one of step {max(steps)}. Perhaps pass "
                "`resume=True`, or another directory?"
            )

    def until(self, step: int) -> int:
        """The first step after `step` at which a checkpoint is due."""
        return (step // self._every + 1) * self._every

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due at a step."""
        return step % self._every == 0

    def save(self, step: int, state: Any, history: History) -> None:
        """Takes a copy of the state and begins to write it."""
        if step == self._saved:
            return
        self._saved = step
        # Copies: the loop gives the state's buffers away to the next stretch of steps.
        leaves = [np.array(leaf, copy=True) for leaf in jax.device_get(_plain(state))]
        about = {
            "format": FORMAT,
            "fingerprint": self._fingerprint,
            "digest": _digest(leaves, history),
            "history": {name: [str(v.dtype), v.size] for name, v in history.items()},
        }
        args = self._args
        with _quiet():
            self._manager.save(
                step,
                args=args.Composite(
                    state=args.StandardSave(_named(leaves)),
                    history=args.StandardSave({k: v for k, v in history.items() if v.size}),
                    about=args.JsonSave(about),
                ),
            )

    def restore(self, state: Any) -> tuple[Any, History] | None:
        """The state and history of the last checkpoint that is whole; None if there is none at all.

        Args:
            state: a state of the same structure, shapes and dtypes.

        Raises:
            ValueError: if a checkpoint is that of another run, or none of them is whole.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        reason = ""
        for step in steps:
            try:
                result = self._read(step, state)
            except _Foreign as error:
                raise ValueError(
                    f"`checkpoint_dir` must hold checkpoints of this very fit; in "
                    f"{str(self._directory / str(step))!r} {error}."
                ) from None
            # Whatever a damaged file makes a reader say.
            except Exception as error:
                reason = " ".join(str(error).split())[:200]
                warnings.warn(
                    f"The checkpoint of step {step} in {str(self._directory)!r} is damaged and "
                    f"left out: {reason}",
                    RuntimeWarning,
                    stacklevel=4,
                )
                continue
            # Later ones are damaged, and would be in the way of new ones.
            for later in steps[: steps.index(step)]:
                self._manager.delete(later)
            self._saved = step
            return result
        if steps:
            raise ValueError(
                f"`checkpoint_dir` must hold a checkpoint that is whole; all {len(steps)} in "
                f"{str(self._directory)!r} are damaged: {reason}"
            )
        return None

    def _read(self, step: int, state: Any) -> tuple[Any, History]:
        args = self._args
        with _quiet():
            if not (self._directory / str(step) / "about").exists():
                raise _Foreign("are files of another program")
            about = self._manager.restore(step, args=args.Composite(about=args.JsonRestore()))
            about = about["about"]
            if not isinstance(about, dict) or about.get("format") != FORMAT:
                raise _Foreign(f"the format is not {FORMAT!r}")
            different = difference(about["fingerprint"], self._fingerprint)
            if different is not None:
                raise _Foreign(different)
            plain = _plain(state)
            shapes = _named([np.empty(leaf.shape, leaf.dtype) for leaf in plain])
            sizes = {name: (np.dtype(t), n) for name, (t, n) in about["history"].items()}
            saved = self._manager.restore(
                step,
                args=args.Composite(
                    state=args.StandardRestore(shapes),
                    history=args.StandardRestore(
                        {name: np.empty(n, t) for name, (t, n) in sizes.items() if n}
                    ),
                ),
            )
        named = {name: np.asarray(leaf) for name, leaf in saved["state"].items()}
        leaves = [named.get(name, empty) for name, empty in _all_named(plain).items()]
        history = {
            name: np.asarray(saved["history"][name]) if n else np.empty(0, t)
            for name, (t, n) in sizes.items()
        }
        if _digest(leaves, history) != about["digest"]:
            raise ValueError("its numbers are not those that were written")
        return _unplain(state, leaves), history

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with _quiet():
            self._manager.wait_until_finished()
            self._manager.close()


class _Foreign(Exception):  # noqa: N818 (a finding, which the caller turns into an error)
    """A checkpoint of something else."""


def _orbax() -> Any:
    try:
        import orbax.checkpoint as ocp
    except ImportError:
        raise ImportError(
            "Checkpoints need Orbax. Install it with `pip install orbax-checkpoint`."
        ) from None
    return ocp


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # Of no use to anybody who fits a model.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


def _writable(directory: Any) -> pathlib.Path:
    path = pathlib.Path(directory).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(
            f"`checkpoint_dir` must be a directory that can be written; got {str(path)!r}: {error}."
        ) from None
    return path


def _plain(state: Any) -> list[Any]:
    """The leaves of a state, keys as numbers."""
    return [jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in jax.tree.leaves(state)]


def _unplain(state: Any, leaves: list[np.ndarray]) -> Any:
    """A state like `state` with these plain leaves, in buffers of its own."""
    old, structure = jax.tree.flatten(state)
    new = [
        jax.random.wrap_key_data(jnp.asarray(leaf), impl=jax.random.key_impl(like))
        if _is_key(like)
        else jnp.array(leaf, dtype=like.dtype, copy=True)
        for like, leaf in zip(old, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, new)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _all_named(leaves: list[Any]) -> dict[str, Any]:
    return {f"leaf_{index:05d}": leaf for index, leaf in enumerate(leaves)}


def _named(leaves: list[Any]) -> dict[str, Any]:
    # Orbax has no place for arrays without numbers.
    return {name: leaf for name, leaf in _all_named(leaves).items() if leaf.size}


def _digest(leaves: list[np.ndarray], history: History) -> str:
    result = hashlib.sha256()
    for leaf in [*leaves, *(history[name] for name in sorted(history))]:
        result.update(f"{leaf.dtype}{leaf.shape}".encode())
        result.update(np.ascontiguousarray(leaf).tobytes())
    return result.hexdigest()
