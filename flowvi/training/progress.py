"""What a running fit shows: a bar in a terminal or a notebook, a line now and then in a log."""

import math
import sys
import time
from typing import Any, TextIO

#: Seconds between two lines of a log.
LINE_SECONDS = 10.0


class Display:
    """Shows steps, loss, validation loss, bad steps, rate and time left.

    A terminal and a notebook get a tqdm bar. Any other stream is a log, in which a bar would leave
    a heap of carriage returns: it gets a line every ten seconds and one at the end.

    Args:
        num_steps: steps in all.
        enabled: whether to show anything.
    """

    def __init__(self, num_steps: int, enabled: bool):
        self._view: _Bar | _Lines | None = None
        if enabled:
            self._view = _Bar(num_steps) if _is_interactive() else _Lines(num_steps, sys.stderr)

    def begin(self, step: int) -> None:
        """Starts the clock, after compilation."""
        if self._view is not None:
            self._view.begin(step)

    def update(
        self, step: int, loss: float, validation: float | None, num_bad_steps: int = 0
    ) -> None:
        """Shows where the fit stands."""
        if self._view is None:
            return
        text = f"loss {loss:.4g}"
        if validation is not None:
            text += f", validation {validation:.4g}"
        if num_bad_steps:
            text += f", {num_bad_steps} bad"
        self._view.update(step, text)

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *error: object) -> None:
        if self._view is not None:
            self._view.close()


def _is_interactive() -> bool:
    from tqdm import auto, std

    return sys.stderr.isatty() or auto.notebook_tqdm is not std.tqdm


class _Bar:
    def __init__(self, num_steps: int):
        from tqdm import auto  # imports IPython where there is one, so not for everybody

        # The loop calls a few times a second, so tqdm need not guess how many calls to leave out.
        self._bar: Any = auto.tqdm(
            total=num_steps, unit=" steps", dynamic_ncols=True, miniters=1, postfix="compiling"
        )

    def begin(self, step: int) -> None:
        self._bar.reset()
        self._bar.n = self._bar.initial = self._bar.last_print_n = step

    def update(self, step: int, text: str) -> None:
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        self._bar.close()


class _Lines:
    def __init__(self, num_steps: int, stream: TextIO):
        self._num_steps = num_steps
        self._stream = stream
        self._line: str | None = None
        self.begin(0)

    def begin(self, step: int) -> None:
        self._first_step = step
        self._start = self._last = time.perf_counter()

    def update(self, step: int, text: str) -> None:
        now = time.perf_counter()
        rate = (step - self._first_step) / max(now - self._start, 1e-9)
        left = (self._num_steps - step) / rate if rate > 0 else math.inf
        self._line = (
            f"step {step}/{self._num_steps}, {text}, {rate:.3g} steps/s, {left:.0f} s left\n"
        )
        if now - self._last >= LINE_SECONDS:
            self._last = now
            self.close()

    def close(self) -> None:
        if self._line is not None:
            self._stream.write(self._line)
            self._stream.flush()
            self._line = None
