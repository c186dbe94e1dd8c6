import io
import sys

import pytest

from flowvi.training import progress
from tests.training.helpers import rows, run


def shown(**options):
    defaults = {"validation_data": rows(), "validate_every": 20, "progress": True}
    return run(**{"num_steps": 40, "data": rows(), **defaults, **options})


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def stderr(monkeypatch):
    """Puts a terminal in the place of standard error, which pytest sets anew after fixtures."""

    def make(stream):
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return make


def test_a_terminal_gets_a_bar(stderr):
    terminal = stderr(Terminal())
    shown()
    last = terminal.getvalue().split("\r")[-1]
    for part in ("100%", "40/40", "loss ", "validation ", "steps/s"):
        assert part in last
    assert "bad" not in last
    assert "compiling" in terminal.getvalue()
    assert last.endswith("\n")


def test_a_log_gets_lines(stderr):
    log = stderr(io.StringIO())
    shown()
    assert "\r" not in log.getvalue()
    (line,) = log.getvalue().splitlines()
    assert line.startswith("step 40/40, loss ")
    for part in (", validation ", " steps/s, ", "0 s left"):
        assert part in line


def test_bad_steps_are_counted_where_all_see_them(stderr):
    terminal = stderr(Terminal())
    x = rows()
    x[:5] = float("nan")
    options = {"validation_data": None, "validate_every": None, "check_finite": False}
    with pytest.warns(RuntimeWarning, match="5 of 60 steps were skipped"):
        shown(data=x, batch_size=1, num_steps=60, **options)
    assert ", 5 bad" in terminal.getvalue().split("\r")[-1]


def test_a_log_gets_more_lines_as_time_goes_by(monkeypatch, stderr):
    log = stderr(io.StringIO())
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(clock)))
    with progress.display(100, True) as display:
        display.begin(1)
        for step in range(2, 12):
            display.update(step, 1.5, None)
    # Every third update of 4 seconds is more than 10 seconds after the last line; and the end.
    lines = log.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [f"step {step}/100" for step in (4, 7, 10, 11)]
    assert lines[0] == "step 4/100, loss 1.5, 0.25 steps/s, 384 s left"


def test_off(stderr):
    terminal = stderr(Terminal())
    shown(progress=False)
    assert terminal.getvalue() == ""


def test_closed_after_an_error(stderr):
    terminal = stderr(Terminal())

    def callback(seen):
        raise RuntimeError("mine")

    # The error's traceback keeps the bar alive, so that it is not closed by being forgotten.
    with pytest.raises(RuntimeError, match="mine") as caught:
        shown(callback=callback)
    assert caught.traceback
    assert terminal.getvalue().endswith("\n")
