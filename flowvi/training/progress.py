"""What a running fit shows: a bar in a terminal or a notebook, a line now and then in a log."""

import math
import sys
import time
from typing import Any, TextIO

#: Seconds between two lines of a log.
LINE_SECONDS = 10.0


def display(num_steps: int, enabled: bool, unit: str = "step") -> "Display":
    """What shows steps, loss, validation loss, bad steps, rate and time left.

    Instead of steps the unit may be what else is done one after the other.

    A terminal and a notebook get a tqdm bar. Any other stream is a log, in which a bar would leave
    a heap of carriage returns: it gets a line every ten seconds and one at the end.
    """
    if not enabled:
        return Display()
    from tqdm import auto, std

    interactive = sys.stderr.isatty() or auto.notebook_tqdm is not std.tqdm
    return _Bar(num_steps, unit) if interactive else _Lines(num_steps, sys.stderr, unit)


class Display:
    """Shows nothing."""

    def begin(self, step: int) -> None:
        """Starts the clock, after compilation."""

    def update(self, step: int, loss: float, validation: float | None, num_bad: int = 0) -> None:
        """Shows where the fit stands."""
        text = f"loss {loss:.4g}"
        if validation is not None:
            text += f", validation {validation:.4g}"
        self._show(step, text + (f", {num_bad} bad" if num_bad else ""))

    def _show(self, step: int, text: str) -> None:
        pass

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Shows nothing more."""


class _Bar(Display):
    def __init__(self, num_steps: int, unit: str = "step"):
        from tqdm import auto  # imports IPython where there is one, so not for everybody

        # The loop calls a few times a second, so tqdm need not guess how many calls to leave out.
        self._bar: Any = auto.tqdm(
            total=num_steps, unit=f" {unit}s", dynamic_ncols=True, miniters=1, postfix="compiling"
        )

    def begin(self, step: int) -> None:
        self._bar.reset()
        self._bar.n = self._bar.initial = self._bar.last_print_n = step

    def _show(self, step: int, text: str) -> None:
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class _Lines(Display):
    def __init__(self, num_steps: int, stream: TextIO, unit: str = "step"):
        self._num_steps, self._stream, self._unit, self._line = num_steps, stream, unit, ""
        self.begin(0)

    def begin(self, step: int) -> None:
        self._first_step = step
        self._start = self._last = time.perf_counter()

    def _show(self, step: int, text: str) -> None:
        now = time.perf_counter()
        rate = (step - self._first_step) / max(now - self._start, 1e-9)
        left = (self._num_steps - step) / rate if rate > 0 else math.inf
        place = f"{self._unit} {step}/{self._num_steps}"
        self._line = f"{place}, {text}, {rate:.3g} {self._unit}s/s, {left:.0f} s left\n"
        if now - self._last >= LINE_SECONDS:
            self._last = now
            self.close()

    def close(self) -> None:
        self._stream.write(self._line)
        self._stream.flush()
        self._line = ""
