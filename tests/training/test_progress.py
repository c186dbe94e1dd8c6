import io
import sys

import jax
import optax
import pytest

from flowvi.training import fit, progress
from tests.training.helpers import quadratic, rows, start

ADAM = optax.adam(0.05)


def run(**options):
    return fit(
        quadratic,
        start(),
        ADAM,
        key=jax.random.key(0),
        num_steps=40,
        data=rows(),
        validation_data=rows(),
        validate_every=20,
        **options,
    )


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    run()
    last = stream.getvalue().split("\r")[-1]
    for part in ("100%", "40/40", "loss ", "validation ", "steps/s"):
        assert part in last
    assert "compiling" in stream.getvalue()
    assert last.endswith("\n")


def test_a_log_gets_lines(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    run()
    assert "\r" not in stream.getvalue()
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("step 40/40, loss ")
    for part in (", validation ", " steps/s, ", "0 s left"):
        assert part in line


def test_a_log_gets_more_lines_as_time_goes_by(monkeypatch):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(clock)))
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.Progress(100, True) as bar:
        bar.begin(1)
        for step in range(2, 12):
            bar.update(step, 1.5, None)
    # Every third look of 4 seconds is more than 10 seconds after the last line; and the end.
    lines = stream.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [f"step {step}/100" for step in (4, 7, 10, 11)]
    assert lines[0] == "step 4/100, loss 1.5, 0.25 steps/s, 384 s left"


def test_off(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    run(progress=False)
    assert stream.getvalue() == ""


def test_closed_after_an_error(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)

    def callback(look):
        raise RuntimeError("mine")

    # The error's traceback keeps the bar alive, so that it is not closed by being forgotten.
    with pytest.raises(RuntimeError, match="mine") as caught:
        run(callback=callback)
    assert caught.traceback
    assert stream.getvalue().endswith("\n")
