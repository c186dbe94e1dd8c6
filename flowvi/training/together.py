"""Functions that fit, run side by side: their fits of one program become one program.

A function that fits is not made of JAX: it checks, splits data, and looks at what came out. So each
has a thread of its own, of which one works at a time, until it comes to the steps of a fit. When
all are there, or over, runs of one program and of the same shapes are trained together.
"""

import contextvars
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import jax

from flowvi.training import sources
from flowvi.training.run import Run, train

R = TypeVar("R")

#: The member whose function works in this thread.
_MEMBER: contextvars.ContextVar["_Member[Any] | None"] = contextvars.ContextVar(
    "member", default=None
)


def done(run: Run) -> None:
    """Does the steps of a run; together with those of others, where it has company."""
    member = _MEMBER.get()
    if member is None:
        train([run])
    else:
        member.wait_for(run)


def together(functions: Sequence[Callable[[], R]]) -> list[R]:
    """What functions return, whose fits are done together where they are alike.

    The first exception of a function is raised, and ends the others.
    """
    members = [_Member(function) for function in functions]
    try:
        for member in members:
            member.go_on()
        while waiting := [member for member in members if member.run is not None]:
            groups: dict[object, list[Run]] = {}
            for member in waiting:
                if member.run is not None:
                    groups.setdefault(_kind(member.run), []).append(member.run)
            for runs in groups.values():
                train(runs)
            for member in waiting:
                member.go_on()
    finally:
        for member in members:
            member.end()
    return [member.result for member in members]


class _Ended(BaseException):
    """Unwinds a function that nobody waits for any more."""


class _Member(Generic[R]):
    """A function in a thread, which works while the one who asked it to go on waits."""

    result: R

    def __init__(self, function: Callable[[], R]):
        self.run: Run | None = None
        self._function, self._is_over = function, False
        self._error: BaseException | None = None
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._is_cancelled = False
        # JAX keeps the precision of numbers by thread.
        doubles = jax.config.read("jax_enable_x64")
        self._thread = threading.Thread(
            target=contextvars.copy_context().run, args=(self._work, doubles), daemon=True
        )
        self._thread.start()

    def _work(self, doubles: bool) -> None:
        self._turn.acquire()
        try:
            if not self._is_cancelled:
                _MEMBER.set(self)
                with jax.enable_x64(doubles):
                    self.result = self._function()
        except BaseException as error:  # it is raised where the function was asked to go on
            self._error = error
        self.run, self._is_over = None, True
        self._back.release()

    def go_on(self) -> None:
        """Lets the function work up to its next fit, or to its end."""
        self.run = None
        self._turn.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error

    def wait_for(self, run: Run) -> None:
        """Waits in the function's thread until a run is over."""
        self.run = run
        self._back.release()
        self._turn.acquire()
        if self._is_cancelled:
            raise _Ended

    def end(self) -> None:
        """Ends the thread."""
        self._is_cancelled = True
        if not self._is_over:
            self._turn.release()
        self._thread.join()


def _kind(run: Run) -> object:
    """What runs must have in common to be done together; a run's own where it cannot be."""
    is_alone = run.mesh is not None or run.checkpoints is not None
    chunk = None if is_alone or isinstance(run.source, sources.Batches) else run.look_ahead()
    if chunk is None:
        return id(run)
    trees = (run.state, run.best, run.validation_data, chunk.data, chunk.rows)
    leaves, structure = jax.tree.flatten(trees)
    return run.own, structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
