"""When training ends before its last step: patience on the device, Ctrl-C on the host."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

#: A number of validations or steps that is never reached.
NEVER = int(np.iinfo(np.int32).max)


class Best(NamedTuple):
    """The best parameters so far, by validation loss.

    Attributes:
        params: the parameters.
        value: their validation loss; infinite before the first.
        step: how many steps they have seen; -1 before the first.
        waited: validations since then.
    """

    params: Any
    value: Any
    step: Any
    waited: Any


def no_best(params: Any) -> Best:
    """The state before the first validation. `params` are only a placeholder."""
    return Best(params, value=np.inf, step=np.int32(-1), waited=np.int32(0))


def judge(best: Best, params: Any, value: Array, step: Array) -> Best:
    """Takes a validation loss into account. One that is NaN is no improvement."""
    better = value < best.value
    return Best(
        params=jax.tree.map(lambda new, old: jnp.where(better, new, old), params, best.params),
        value=jnp.where(better, value, best.value),
        step=jnp.where(better, step, best.step),
        waited=jnp.where(better, 0, best.waited + 1),
    )


class Interrupts:
    """Notes the first Ctrl-C instead of raising it; the second is raised as usual.

    A step gives its buffers away while it runs, so an exception in the middle of it would lose what
    has been learned. Only the main thread gets signals, and a handler that is not Python's own was
    put there by somebody who wants it: in both cases this does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._installed = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            signal.default_int_handler(number, frame)
        self.requested = True

    def __enter__(self) -> "Interrupts":
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):
            signal.signal(signal.SIGINT, self._note)
            self._installed = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
