"""The host's account of a run: its history, and when it is over."""

import time

import numpy as np

from flowvi.training.result import History, StopReason
from flowvi.training.stopping import NEVER, Hopeless, Plateau, PlateauWatch

#: Seconds between two looks at a running fit.
PACE_SECONDS = 0.25

#: Steps over which the loss is averaged to be shown, where a chunk has fewer.
SMOOTHING = 20

#: The part of the steps that may be bad without a warning.
MANY_BAD = 0.02


class Pace:
    """How many steps to do before the host looks again."""

    def __init__(self) -> None:
        self.compiling = True
        self.steps = 1
        self._shown = time.perf_counter()

    def learn(self, steps: int, seconds: float) -> None:
        """Takes into account how long some steps took."""
        # The first chunk is one step and compiles; its time says nothing about steps.
        if not self.compiling:
            self.steps = int(np.clip(PACE_SECONDS * steps / seconds, 1, NEVER))
        self.compiling = False

    def is_due(self) -> bool:
        """Whether it is time to show something. A chunk may also end for other reasons."""
        now = time.perf_counter()
        if now - self._shown < PACE_SECONDS / 2:
            return False
        self._shown = now
        return True


class Record:
    """What the host knows of a run, and its decision when to stop.

    `names` are "loss" and those of the metrics, `validation_names` "validation" and those of its
    metrics, if there are any. The best parameters have seen `best_step` steps. `loss` is the mean
    of the latest chunk, but of at least the last 20 steps, bad ones left out; NaN without any.
    """

    def __init__(
        self,
        names: list[str],
        validation_names: list[str],
        num_steps: int,
        validate_every: int = NEVER,
        patience: int = NEVER,
        plateau: Plateau | None = None,
        is_hopeless: Hopeless | None = None,
    ):
        self._num_steps, self._every, self._patience = num_steps, validate_every, patience
        self._plateau, self._is_hopeless = plateau, is_hopeless
        self._watch = None if plateau is None else PlateauWatch(plateau)
        self._parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        self._validation: dict[str, list[float]] = {name: [] for name in validation_names}
        self._validation_step: list[int] = []
        self._dtypes: dict[str, np.dtype] = {}
        self.step = 0
        self.num_bad_steps = 0
        self.best_step: int | None = None
        self._best, self._hopeless = np.inf, False
        self.loss = float("nan")

    def resume(self, step: int, num_bad_steps: int, history: History) -> None:
        """Takes over an earlier run's history."""
        self.add(step, num_bad_steps, history)
        for index, validated in enumerate(history.get("validation_step", ())):
            values = {name: history[name][index] for name in self._validation}
            self.validated(int(validated), values)

    def add(self, step: int, num_bad_steps: int, history: History) -> None:
        """Takes in the steps of a chunk."""
        steps = step - self.step
        self.step, self.num_bad_steps = step, num_bad_steps
        for name, parts in self._parts.items():
            # A copy, so that the rest of the buffer is not kept.
            parts.append(history[name][:steps].copy())
        losses = self._parts["loss"]
        # As many parts as are sure to hold so many steps.
        count = max(steps, SMOOTHING)
        known = np.concatenate(losses[-count:])[-count:]
        known = known[np.isfinite(known)]
        self.loss = float(np.mean(known, dtype=np.float64)) if known.size else float("nan")
        if self._watch is not None:
            self._watch.add(losses[-1])

    @property
    def validation_due(self) -> bool:
        """Whether the parameters at this step are to be validated."""
        if not self._validation or not self.step:
            return False
        return self.step % self._every == 0 or self.step == self._num_steps

    def validated(self, step: int, values: dict[str, np.ndarray]) -> bool:
        """Takes in a validation; returns whether it is the best so far. NaN never is."""
        for name, value in values.items():
            self._dtypes[name] = np.asarray(value).dtype
            self._validation[name].append(float(value))
        self._validation_step.append(step)
        if self._is_hopeless is not None:
            self._hopeless = self._is_hopeless(self._validations())
        better = bool(values["validation"] < self._best)
        if better:
            self._best, self.best_step = float(values["validation"]), step
        return better

    @property
    def validation(self) -> float | None:
        """The latest validation loss; None before the first."""
        losses = self._validation.get("validation")
        return losses[-1] if losses else None

    @property
    def boundary(self) -> int:
        """The next step at which there is something to do or to decide."""
        ends = [self._num_steps]
        if self._validation:
            ends.append((self.step // self._every + 1) * self._every)
        if self._plateau is not None:
            ends.append((self.step // self._plateau.window + 1) * self._plateau.window)
        return min(ends)

    @property
    def reason(self) -> StopReason | None:
        """Why the run is over; None if it is not."""
        since_best = sum(step > (self.best_step or 0) for step in self._validation_step)
        if since_best >= self._patience:
            return StopReason.PATIENCE
        if self.step >= self._num_steps:
            return StopReason.MAX_STEPS
        if self._hopeless:
            return StopReason.HOPELESS
        if self._watch is not None and self._watch.is_over:
            return StopReason.PLATEAU
        return None

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the latest step."""
        return {name: float(parts[-1][-1]) for name, parts in self._parts.items() if name != "loss"}

    def history(self) -> History:
        """All of it, as numpy arrays."""
        none = [np.zeros(0, np.float32)]
        history = {name: np.concatenate(parts or none) for name, parts in self._parts.items()}
        return history | self._validations()

    def _validations(self) -> History:
        found = {
            name: np.asarray(values, self._dtypes.get(name, np.float32))
            for name, values in self._validation.items()
        }
        if self._validation:
            found["validation_step"] = np.asarray(self._validation_step, np.int64)
        return found

    def concerns(self) -> list[str]:
        """What the reader of a result should know and may not see in it."""
        found = []
        if self.num_bad_steps > MANY_BAD * self.step:
            share = f"{self.num_bad_steps} of {self.step} steps were skipped"
            why = "because the loss, its gradient or what the optimizer made of them was not finite"
            found.append(f"{share}, {why}.")
        losses = self._validation.get("validation")
        if losses and np.isnan(losses).all():
            what = f"The validation loss was NaN in all {len(losses)} validations"
            result = "the result has the last parameters rather than the best ones"
            found.append(f"{what}, so {result}.")
        return found
