"""What a fit hands back, and what it shows and raises on the way."""

import dataclasses
import enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

History = dict[str, np.ndarray]


class StopReason(enum.StrEnum):
    """Why a fit ended. Each is also its plain string: `result.stop_reason == "patience"`."""

    MAX_STEPS = "max_steps"
    """All the steps that were asked for are done."""
    PATIENCE = "patience"
    """The validation loss did not reach a new best for `patience` validations in a row."""
    PLATEAU = "plateau"
    """The loss itself stopped improving, by the rule that was given."""
    DATA = "data"
    """The iterator of batches came to its end."""
    CALLBACK = "callback"
    """The callback returned True."""
    INTERRUPTED = "interrupted"
    """Ctrl-C, or a callback that raised KeyboardInterrupt."""


@dataclasses.dataclass(frozen=True, repr=False)
class FitResult:
    """What was learned.

    Attributes:
        params: the parameters with the lowest validation loss; without validation, the last ones.
        last_params: the parameters after the last step.
        history: numpy arrays. `"loss"` and every metric of the loss hold one entry a step, bad
            steps included. With validation, `"validation"` holds its losses,
            `"validation_<name>"` each of its metrics, and `"validation_step"` how many steps had
            been done at each.
        stop_reason: why training ended.
        num_steps: steps done, bad ones included.
        num_bad_steps: steps that were skipped: a loss, a gradient or a result was not finite.
        best_step: how many steps `params` have seen; None without validation.
        seconds: wall time, compilation included.
    """

    params: Any
    last_params: Any
    history: History
    stop_reason: StopReason
    num_steps: int
    num_bad_steps: int
    best_step: int | None
    seconds: float

    def __repr__(self) -> str:
        parts = [
            f"stop_reason={self.stop_reason.value!r}",
            f"num_steps={self.num_steps}",
            f"num_bad_steps={self.num_bad_steps}",
            f"loss={self.history['loss'][-1]:.6g}",
        ]
        if self.best_step is not None:
            parts += [
                f"best_step={self.best_step}",
                f"validation={np.nanmin(self.history['validation']):.6g}",
            ]
        return f"FitResult({', '.join(parts)}, seconds={self.seconds:.3g})"


class Look:
    """What a callback sees when the host looks at a running fit, a few times a second.

    Attributes:
        step: steps done.
        num_steps: steps asked for.
        loss: mean loss of the steps since the last look, bad ones left out.
        metrics: the metrics of the latest step.
        validation: the latest validation loss; None before the first.
        best_step: the step of the lowest validation loss; None before the first.
        steps_per_second: the rate since the last look, compilation included.
    """

    def __init__(
        self,
        *,
        step: int,
        num_steps: int,
        loss: float,
        metrics: dict[str, float],
        validation: float | None,
        best_step: int | None,
        steps_per_second: float,
        params: Any,
    ):
        self.step = step
        self.num_steps = num_steps
        self.loss = loss
        self.metrics = metrics
        self.validation = validation
        self.best_step = best_step
        self.steps_per_second = steps_per_second
        self._params = params

    @property
    def params(self) -> Any:
        """A copy of the current parameters, to be taken while the callback runs."""
        # The loop gives its own buffers away to the next stretch of steps.
        return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), self._params)


class TrainingDiverged(RuntimeError):  # noqa: N818 (an event in the reader's words)
    """Too many bad steps in a row: a loss, a gradient or a result was not finite in each of them.

    Attributes:
        params: the last good parameters, from before the first bad step of the row.
        step: the first bad step of the row; the first step of a fit is 0.
        culprit: what was not finite there: a metric, the loss, or a leaf of the parameters.
        history: as in `FitResult`.
    """

    def __init__(self, message: str, *, params: Any, step: int, culprit: str, history: History):
        super().__init__(message)
        self.params = params
        self.step = step
        self.culprit = culprit
        self.history = history
