"""What a fit hands back, and what it shows and raises on the way."""

import dataclasses
import enum

import jax
import jax.numpy as jnp
import numpy as np

from flowvi import files
from flowvi.params import PyTree

History = dict[str, np.ndarray]


class StopReason(enum.StrEnum):
    """Why a fit ended. Each is also its plain string: `result.stop_reason == "patience"`."""

    MAX_STEPS = "max_steps"
    """All the steps that were asked for are done."""
    PATIENCE = "patience"
    """The validation loss did not reach a new best for `patience` validations in a row."""
    PLATEAU = "plateau"
    """The loss itself stopped improving, by the rule that was given."""
    HOPELESS = "hopeless"
    """The validations left no hope for the rest of the steps, by the rule that was given."""
    DATA = "data"
    """The iterator of batches came to its end."""
    CALLBACK = "callback"
    """The callback returned True."""
    INTERRUPTED = "interrupted"
    """Ctrl-C, or a callback that raised KeyboardInterrupt."""
    ERROR = "error"
    """An exception, which carries this result as its `result`."""


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class FitResult:
    """What was learned.

    Attributes:
        params: the parameters with the lowest validation loss; without validation, the last ones.
        history: numpy arrays. `"loss"` and every metric of the loss hold one entry a step, bad
            steps included. With validation, `"validation"` holds its losses,
            `"validation_<name>"` each of its metrics, and `"validation_step"` how many steps had
            been done at each.
        stop_reason: why training ended.
        num_steps: steps done, bad ones included.
        num_bad_steps: steps that were skipped: a loss, a gradient or a result was not finite.
        best_step: how many steps `params` have seen; None without validation.
        seconds: wall time, compilation included.
        last_params: the parameters after the last step; None in a result from a file.
        opt_state: the optimizer's state after the last step; None in a result from a file.

    Example:
        >>> import jax, jax.numpy as jnp, flowvi as fv
        >>> import optax
        >>> result = fv.fit(
        ...     lambda params, key, batch: params**2,
        ...     jnp.ones(()),
        ...     optax.sgd(0.1),
        ...     key=jax.random.key(0),
        ...     num_steps=10,
        ...     progress=False,
        ... )
        >>> result.num_steps, str(result.stop_reason.value)
        (10, 'max_steps')
    """

    params: PyTree
    history: History
    stop_reason: StopReason
    num_steps: int
    num_bad_steps: int
    best_step: int | None
    seconds: float
    last_params: PyTree = dataclasses.field(default=None, metadata={"file": False})
    opt_state: PyTree = dataclasses.field(default=None, metadata={"file": False})

    @classmethod
    def untrained(cls, params: PyTree, seconds: float = 0.0) -> "FitResult":
        """The result of no steps."""
        history = {"loss": np.empty(0)}
        return cls(params, history, StopReason.MAX_STEPS, 0, 0, None, seconds)

    def __repr__(self) -> str:
        return f"FitResult({self.summary()})"

    def summary(self) -> str:
        """The numbers that tell how the fit went, in one line."""
        parts = [f"stop_reason={self.stop_reason.value!r}", f"num_steps={self.num_steps}"]
        if self.num_bad_steps:
            parts.append(f"num_bad_steps={self.num_bad_steps}")
        if self.history["loss"].size:
            parts.append(f"loss={self.history['loss'][-1]:.6g}")
        if self.best_step is not None:
            best = np.nanmin(self.history["validation"])
            parts += [f"best_step={self.best_step}", f"validation={best:.6g}"]
        return ", ".join([*parts, f"seconds={self.seconds:.3g}"])


@dataclasses.dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class Fitted:
    """What every fit hands back: the thing itself, and how it was fitted.

    Attributes:
        result: how it was fitted.
    """

    result: FitResult

    @property
    def params(self) -> PyTree:
        """The parameters that were learned."""
        return self.result.params

    @property
    def history(self) -> History:
        """Losses and metrics; see `FitResult`."""
        return self.result.history

    @property
    def stop_reason(self) -> StopReason:
        """Why training ended."""
        return self.result.stop_reason

    @property
    def num_steps(self) -> int:
        """Steps done, bad ones included."""
        return self.result.num_steps

    @property
    def num_bad_steps(self) -> int:
        """Steps that were skipped."""
        return self.result.num_bad_steps

    @property
    def seconds(self) -> float:
        """Wall time of training, compilation included."""
        return self.result.seconds

    def save(self, path: files.Path) -> None:
        """Writes all of this to one file, from which `flowvi.load` makes it again.

        Raises:
            ValueError: if a parameter is NaN.
            OSError: if the file cannot be written.
        """
        files.save(path, self)


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Progress:
    """What a callback sees of a running fit, a few times a second.

    Attributes:
        step: steps done.
        num_steps: steps asked for.
        num_bad_steps: steps that were skipped.
        loss: mean loss of the latest steps, bad ones left out.
        metrics: the metrics of the latest step.
        validation: the latest validation loss; None before the first.
        best_step: the step of the lowest validation loss; None before the first.
        steps_per_second: the rate since the last call, compilation included.
        running: the running parameters, which the next steps take away; see `params`.
    """

    step: int
    num_steps: int
    num_bad_steps: int
    loss: float
    metrics: dict[str, float]
    validation: float | None
    best_step: int | None
    steps_per_second: float
    running: PyTree

    @property
    def params(self) -> PyTree:
        """A copy of the current parameters, to be taken while the callback runs."""
        return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), self.running)


class TrainingDiverged(RuntimeError):  # noqa: N818 (an event in the reader's words)
    """Too many bad steps in a row: a loss, a gradient or a result was not finite in each of them.

    Attributes:
        params: the last good parameters, from before the first bad step of the row.
        step: the first bad step of the row; the first step of a fit is 0.
        culprit: what was not finite.
        history: as in `FitResult`.
        result: what was learned up to there; its `params` are the best ones where some were
            validated before.
    """

    result: FitResult

    def __init__(self, message: str, *, params: PyTree, step: int, culprit: str, history: History):
        super().__init__(message)
        self.params, self.step, self.culprit, self.history = params, step, culprit, history
