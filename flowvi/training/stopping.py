"""When training ends before its last step: a plateau of the loss, and Ctrl-C."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import numpy as np

from flowvi import checks

#: Whether the validations so far, of which it is given the history, leave no hope for the rest.
Hopeless = Callable[[dict[str, np.ndarray]], bool]

#: A number of validations or steps that is never reached.
NEVER = int(np.iinfo(np.int32).max)


@dataclasses.dataclass(frozen=True)
class Plateau:
    """A rule that ends training when a noisy loss no longer improves.

    Losses are averaged over windows of steps. The gain is the mean of `patience` windows minus that
    of the last `patience` windows, which come after them. Each mean is over many steps, so slow
    progress is seen through much noise, and neither a lucky window nor an unlucky one decides.

    - Without a tolerance training ends when the gain is not above zero.
    - With one it ends when the gain is surely below it: when it lies below the tolerance by two
      standard errors. A loss whose noise hides gains of that size goes on to its last step, which
      suits a step size that decays. The noise of a path gradient's ELBO vanishes with the gap that
      is left, so there the rule ends a fit that has nothing left to gain.

    Attributes:
        window: steps of a window.
        patience: windows on each side of the comparison.
        tolerance: a gain in units of the loss, or None.

    Raises:
        ValueError: if a number is not positive.

    Source: Prechelt, "Early Stopping - But When?", 1998.

    Example:
        >>> import flowvi as fv
        >>> fv.Plateau(window=200, patience=3)
        Plateau(window=200, patience=3, tolerance=None)
    """

    window: int = 500
    patience: int = 5
    tolerance: float | None = None

    def __post_init__(self) -> None:
        for name in ("window", "patience"):
            object.__setattr__(self, name, checks.positive_int(name, getattr(self, name)))
        if self.tolerance is not None:
            known = isinstance(self.tolerance, int | float) and not isinstance(self.tolerance, bool)
            rule = "`tolerance` must be a positive number or None"
            checks.require(known and 0 < self.tolerance < np.inf, rule, self.tolerance)


class PlateauWatch:
    """Applies a `Plateau` to losses as they come."""

    def __init__(self, rule: Plateau):
        self._rule = rule
        self._open = np.zeros(0)
        self._means: list[float] = []
        self._errors: list[float] = []  # squared standard errors of the means

    def add(self, losses: np.ndarray) -> None:
        """Takes in the losses of more steps; those that are not finite are left out."""
        known = np.concatenate([self._open, losses])
        whole = len(known) // self._rule.window * self._rule.window
        for window in known[:whole].reshape(-1, self._rule.window):
            window = window[np.isfinite(window)]
            if window.size:
                self._means.append(float(window.mean()))
                self._errors.append(float(window.var() / window.size))
        self._open = known[whole:]

    @property
    def is_over(self) -> bool:
        """Whether the loss has stopped improving."""
        count = self._rule.patience
        before, last = self._means[-2 * count : -count], self._means[-count:]
        if len(before) < count:
            return False
        gain = np.mean(before) - np.mean(last)
        if self._rule.tolerance is None:
            return bool(gain <= 0)
        error = np.sqrt(np.sum(self._errors[-2 * count :])) / count
        # A loss that seems to rise is no surer: noise that hides the tolerance never ends it.
        return bool(max(gain, 0) + 2 * error <= self._rule.tolerance)


@contextlib.contextmanager
def noted_interrupts() -> Iterator[list[int]]:
    """A list that gets the first Ctrl-C instead of its being raised; the second is, as usual.

    A step gives its buffers away while it runs, so an exception in the middle of it would lose what
    has been learned. Only the main thread gets signals, and a handler that is not Python's own was
    put there by somebody who wants it: in both cases this does nothing.
    """
    found: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if found:
            signal.default_int_handler(number, frame)
        found.append(number)

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield found
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
