"""The host's copy of a run, and what it makes of it."""

import time
from typing import Any

import numpy as np

from flowvi.training.result import History, StopReason, TrainingDiverged
from flowvi.training.stopping import NEVER, Plateau, PlateauWatch
from flowvi.training.stretch import CAPACITY, Limits

#: Seconds between two looks of the host.
LOOK_SECONDS = 0.25

#: Steps over which the loss is averaged to be shown, where a stretch has fewer.
SMOOTHING = 20


class Pace:
    """How many steps to do before the next look."""

    def __init__(self) -> None:
        self.compiling = True
        self.steps = 1
        self._looked = time.perf_counter()

    def learn(self, steps: int, seconds: float) -> None:
        """Takes into account how long a stretch took."""
        # The first stretch is one step and compiles; its time says nothing about steps.
        if not self.compiling:
            self.steps = int(np.clip(LOOK_SECONDS * steps / seconds, 1, CAPACITY))
        self.compiling = False

    def wants_look(self) -> bool:
        """Whether it is time to show something. A stretch may also end for other reasons."""
        now = time.perf_counter()
        if now - self._looked < LOOK_SECONDS / 2:
            return False
        self._looked = now
        return True


class Record:
    """What the host knows of a run.

    Args:
        names: "loss" and the names of the metrics.
        validation_names: "validation" and the names of a validation's metrics, if there are any.
        limits: of the run.
        plateau: the rule by which a plateau of the loss ends the run, if any.

    Attributes:
        step: steps done.
        faults: the count of bad steps.
        waited: validations since the best.
        best_step: steps that the best parameters have seen; None before the first validation.
        loss: the mean loss of the latest stretch, but of at least the last 20 steps, bad ones left
            out; NaN if there was no other.
        validation: the latest validation loss; None before the first.
    """

    def __init__(
        self,
        names: list[str],
        limits: Limits,
        plateau: Plateau | None = None,
        validation_names: tuple[str, ...] = (),
    ):
        self._limits = limits
        self._plateau = plateau
        self._watch = None if plateau is None else PlateauWatch(plateau)
        self._parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        self._validation: dict[str, list[np.ndarray]] = {
            name: [np.zeros(0)] for name in validation_names
        }
        self._validation_step: list[np.ndarray] = [np.zeros(0, np.int64)]
        self.step = 0
        self.faults: Any = None
        self.waited = 0
        self.best_step: int | None = None
        self.loss = float("nan")
        self.validation: float | None = None

    def resume(self, signs: Any, history: History) -> None:
        """Takes over an earlier run's history."""
        for name in self._parts:
            self._parts[name] = [history[name]]
        for name in self._validation:
            self._validation[name] = [history[name]]
            self._validation_step = [history["validation_step"]]
        if self._validation and len(history["validation"]):
            self.validation = float(history["validation"][-1])
        if self._watch is not None:
            self._watch.add(history["loss"])
        self._see(signs)
        self.loss = self._recent_loss(SMOOTHING)

    def _see(self, signs: Any) -> None:
        step, self.faults, best = signs
        self.step = int(step)
        if best is not None:
            self.waited = int(best.waited)
            self.best_step = None if best.step < 0 else int(best.step)

    def add(self, signs: Any, history: dict[str, np.ndarray]) -> int:
        """Takes in a stretch; returns its number of steps."""
        first = self.step
        self._see(signs)
        steps = self.step - first
        for name, parts in self._parts.items():
            # A copy, so that the rest of the buffer is not kept.
            parts.append(history[name][:steps].copy())
        self.loss = self._recent_loss(max(steps, SMOOTHING))
        if self._watch is not None:
            self._watch.add(self._parts["loss"][-1])
        if self._validation:
            self._add_validations(first, history)
        return steps

    @property
    def boundary(self) -> int:
        """The next step at which the record has to decide something."""
        if self._plateau is None:
            return NEVER
        return (self.step // self._plateau.window + 1) * self._plateau.window

    @property
    def reason(self) -> StopReason | None:
        """Why the run is over; None if it is not."""
        if self.waited >= self._limits.patience:
            return StopReason.PATIENCE
        if self.step >= self._limits.num_steps:
            return StopReason.MAX_STEPS
        if self._watch is not None and self._watch.is_over:
            return StopReason.PLATEAU
        return None

    def _recent_loss(self, num_steps: int) -> float:
        # As many parts as are sure to hold so many steps.
        losses = np.concatenate(self._parts["loss"][-num_steps:])[-num_steps:]
        losses = losses[np.isfinite(losses)]
        return float(np.mean(losses, dtype=np.float64)) if losses.size else float("nan")

    def _add_validations(self, first: int, history: dict[str, np.ndarray]) -> None:
        steps = np.arange(first + 1, self.step + 1)
        due = (steps % self._limits.validate_every == 0) | (steps == self._limits.num_steps)
        if self.diverged:
            due &= steps < self.step  # it ended before it would have validated
        self._validation_step.append(steps[due])
        for name, parts in self._validation.items():
            parts.append(history[name][: len(steps)][due])
        if due.any():
            self.validation = float(self._validation["validation"][-1][-1])

    @property
    def diverged(self) -> bool:
        """Whether there were too many bad steps in a row."""
        return bool(self.faults.in_row >= self._limits.max_bad_steps)

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the latest step."""
        return {name: float(parts[-1][-1]) for name, parts in self._parts.items() if name != "loss"}

    def history(self) -> History:
        """All of it, as numpy arrays."""
        history = {name: np.concatenate(parts) for name, parts in self._parts.items()}
        for name, parts in self._validation.items():
            history[name] = np.concatenate(parts, dtype=parts[-1].dtype)
            history["validation_step"] = np.concatenate(self._validation_step)
        return history

    def error(self, suspects: list[str], params: Any) -> TrainingDiverged:
        """The error that ends a run with too many bad steps in a row.

        Args:
            suspects: what the entries of `Faults.suspects` stand for.
            params: the last good parameters.
        """
        history = self.history()
        in_row = int(self.faults.in_row)
        step = self.step - in_row
        values = {name: history[name][step] for name in self._parts}
        # A metric that is not finite says which part of the loss it was.
        broken = [name for name in values if name != "loss" and not np.isfinite(values[name])]
        if np.isfinite(values["loss"]):
            culprit, got = "what the optimizer made of it", "not finite"
            if self.faults.suspects.any():
                culprit = suspects[int(np.argmax(self.faults.suspects))]
        elif broken:
            culprit, got = f"the metric {broken[0]!r}", str(values[broken[0]])
        else:
            culprit, got = "the loss", str(values["loss"])
        start = (
            " That is the very first step, so look at the starting parameters and the data."
            if step == 0
            else ""
        )
        message = (
            f"Training ended after {in_row} bad steps in a row: at step {step}, {culprit} was "
            f"{got}.{start} What usually helps: a smaller learning rate, "
            "`optax.clip_by_global_norm` before the optimizer, a look at the data for outliers, "
            "and at the loss for logarithms, quotients and square roots near zero. This error's "
            "`params` are the last good ones."
        )
        return TrainingDiverged(message, params=params, step=step, culprit=culprit, history=history)
