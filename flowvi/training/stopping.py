"""When training ends before its last step.

Patience is kept on the device; a plateau of the loss and Ctrl-C are noticed on the host.
"""

import dataclasses
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flowvi import checks

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


@dataclasses.dataclass(frozen=True)
class Plateau:
    """A rule that ends training when a noisy loss no longer improves.

    Losses are averaged over windows of steps. Training ends when the mean of the last `patience`
    windows does not lie below that of as many windows before them. Each mean is over many steps, so
    slow progress is seen through much noise, and neither a lucky window nor an unlucky one decides.

    Attributes:
        window: steps of a window.
        patience: windows on each side of the comparison.

    Raises:
        ValueError, TypeError: if they are no positive integers.

    Example:
        >>> import flowvi as fv
        >>> fv.Plateau(window=200, patience=3)
        Plateau(window=200, patience=3)
    """

    window: int = 500
    patience: int = 5

    def __post_init__(self) -> None:
        for name in ("window", "patience"):
            object.__setattr__(self, name, checks.positive_int(name, getattr(self, name)))


class PlateauWatch:
    """Applies a `Plateau` to losses as they come."""

    def __init__(self, rule: Plateau):
        self._rule = rule
        self._open = np.zeros(0)
        self._means: list[float] = []

    def add(self, losses: np.ndarray) -> None:
        """Takes in the losses of more steps; those that are not finite are left out."""
        known = np.concatenate([self._open, losses])
        whole = len(known) // self._rule.window * self._rule.window
        for window in known[:whole].reshape(-1, self._rule.window):
            window = window[np.isfinite(window)]
            if window.size:
                self._means.append(float(window.mean()))
        self._open = known[whole:]

    @property
    def is_over(self) -> bool:
        """Whether the loss has stopped improving."""
        count = self._rule.patience
        before, last = self._means[-2 * count : -count], self._means[-count:]
        return len(before) == count and bool(np.mean(last) >= np.mean(before))


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
