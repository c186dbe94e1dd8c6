"""Runs in progress: what each knows, and the loop that does their steps.

Runs of one program may be done together, as one compiled program; a run alone is a group of one.
"""

import contextlib
import dataclasses
import operator
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flowvi import devices
from flowvi.files import Checkpoints
from flowvi.params import PyTree
from flowvi.training import program, sources
from flowvi.training.progress import Display, display
from flowvi.training.record import Pace, Record
from flowvi.training.result import FitResult, Progress, StopReason, TrainingDiverged
from flowvi.training.step import culprit
from flowvi.training.stopping import NEVER, noted_interrupts

Array = jax.Array

REASONS = list(StopReason)


@dataclasses.dataclass(eq=False)
class Run:
    """A run in progress: the state after the last step, and the best parameters by validation.

    `keys` are those of the steps, of the shuffles and of validations; `every` so many steps there
    is a checkpoint; `learned` is what the result holds, once the run is over.
    """

    own: program.Program
    source: sources.Source
    record: Record
    keys: list[Array]
    validation_data: PyTree
    started: float
    num_steps: int
    max_bad: int
    state: program.State
    mesh: Mesh | None = None
    progress: bool = False
    callback: Callable[[Progress], bool | None] | None = None
    checkpoints: Checkpoints | None = None
    every: int = NEVER
    best: PyTree = None
    learned: PyTree = None
    bad_in_row: int = 0
    reason: StopReason | None = None
    error: TrainingDiverged | None = None
    chunk: sources.Chunk | None = None

    def restore(self) -> None:
        """Goes on from the last checkpoint, if there is one."""
        compiled = program.build(self.own)
        if compiled.validate is not None:
            # Parameters that hold the place of the best ones in a checkpoint.
            params, opt_state = self.state[:2]
            self.best = compiled.judge(params, opt_state, self.keys[2], self.validation_data)[1]
        like = devices.home((self.state, self.best))
        with devices.outside():
            saved = None if self.checkpoints is None else self.checkpoints.restore(like)
        if not devices.agreed(saved is not None):
            return
        state, history = devices.from_first(*(saved or (like, {})))
        self.state, self.best = devices.arranged(state)
        step, num_bad, self.bad_in_row = map(int, jax.device_get(self.state[2:]))
        self.record.resume(step, num_bad, history)

    @property
    def is_open(self) -> bool:
        """Whether there are steps to do."""
        return self.reason is None and self.error is None

    def look_ahead(self) -> sources.Chunk | None:
        """Gets the chunk of the next step; without one the run is over."""
        if self.is_open and (chunk := self.source.at(self.record.step)) is not None:
            self.chunk = chunk
        elif self.is_open:
            self.reason = StopReason.DATA
        return self.chunk

    def end(self, chosen: int) -> int:
        """The step up to which to go next, which is not behind the one that is chosen."""
        step = self.record.step
        if not self.is_open or self.chunk is None:
            return step
        due = (step // self.every + 1) * self.every
        ends = [chosen, self.chunk.end, self.record.boundary, step + program.CAPACITY, due]
        return devices.agreed(min(ends))

    def call(self, steps_per_second: float) -> StopReason | None:
        """Calls back; returns whether that ends the run."""
        running = devices.home(self.state.params)
        if self.callback is None or not devices.is_first():
            return None
        names = ("step", "num_bad_steps", "loss", "metrics", "validation", "best_step")
        seen = Progress(
            **{name: getattr(self.record, name) for name in names},
            num_steps=self.num_steps,
            steps_per_second=steps_per_second,
            running=running,
        )
        try:
            with devices.outside():
                return StopReason.CALLBACK if self.callback(seen) else None
        except KeyboardInterrupt:
            return StopReason.INTERRUPTED

    def result(self, reason: StopReason) -> FitResult:
        """What has been learned."""
        record, state = self.record, self.state
        return FitResult(
            params=devices.home(self.learned),
            history=record.history(),
            stop_reason=reason,
            num_steps=record.step,
            num_bad_steps=record.num_bad_steps,
            best_step=record.best_step,
            seconds=time.perf_counter() - self.started,
            last_params=devices.home(state.params),
            opt_state=devices.home(state.opt_state),
        )

    @contextlib.contextmanager
    def carried_by_exceptions(self) -> Iterator[None]:
        """Hands what has been learned so far to an exception that ends the run."""
        try:
            yield
        except BaseException as error:
            # An exception in the middle of a step finds its buffers given away.
            if self.learned is not None:
                error.result = self.result(StopReason.ERROR)  # type: ignore[attr-defined]
                if not isinstance(error, TrainingDiverged):
                    what = f"What fit had learned in {self.record.step} steps"
                    error.add_note(f"{what} is this exception's `result`.")
            raise

    def diverged(self) -> TrainingDiverged:
        """The error that ends a run with too many bad steps in a row."""
        record, params, chunk = self.record, self.state.params, self.chunk
        last = record.step - 1
        batch = None if chunk is None else chunk.data
        if chunk is not None and chunk.rows is not None:
            rows = chunk.rows[last - chunk.first]
            batch = jax.tree.map(lambda leaf: leaf[rows], batch)
        elif chunk is not None and self.source.batched:
            batch = jax.tree.map(lambda leaf: leaf[last - chunk.first], batch)
        # The parameters are as they were, so the last bad step can be looked at closely.
        key = jax.random.fold_in(self.keys[0], last)
        cause = culprit(program.build(self.own).loss_fn, params, key, batch)
        first = record.step - self.bad_in_row
        start = "That is the very first step, so look at the starting parameters and the data. "
        message = (
            f"Training ended after {self.bad_in_row} bad steps in a row: from step {first} on, "
            f"{cause}. {'' if first else start}What usually helps: a smaller learning rate, "
            "`optax.clip_by_global_norm` before the optimizer, a look at the data for outliers, "
            "and at the loss for logarithms, quotients and square roots near zero. This error's "
            "`params` are the last good ones."
        )
        return TrainingDiverged(
            message,
            params=devices.home(params),
            step=first,
            culprit=cause,
            history=record.history(),
        )


class Group:
    """Runs of one program whose steps are done together.

    States and best parameters of several are stacked along a first axis.
    """

    def __init__(self, runs: Sequence[Run]):
        self.runs, self._alone = runs, len(runs) == 1
        self._chunks: list[sources.Chunk | None] = []
        self.state = self._together([run.state for run in runs])
        self.best = self._together([run.best for run in runs])
        self._step_key, _, self._key = (
            self._together([run.keys[i] for run in runs]) for i in range(3)
        )
        self._validation_data = self._together([run.validation_data for run in runs])
        own = runs[0].own
        compiled = program.build(own) if self._alone else program.build_together(own)
        self._run, self._judge = compiled.run, compiled.judge

    def _together(self, trees: list[PyTree]) -> PyTree:
        return trees[0] if self._alone else _stacked(trees)

    def of(self, tree: PyTree, index: int) -> PyTree:
        """The part of one run."""
        return tree if self._alone else jax.tree.map(lambda leaf: leaf[index], tree)

    def advance(self, chosen: int) -> int:
        """Does steps of those runs that are open, up to one of them; returns how many at most."""
        chunks = [run.chunk for run in self.runs]
        if not self._chunks or any(map(operator.is_not, chunks, self._chunks)):
            self._chunks = chunks
            self._data = self._together([chunk.data for chunk in chunks if chunk])
            self._rows = self._together([chunk.rows for chunk in chunks if chunk])
        before = [run.record.step for run in self.runs]
        most = program.CAPACITY if self._alone else program.TOGETHER
        ends = [min(run.end(chosen), run.record.step + most) for run in self.runs]
        firsts = [run.chunk.first if run.chunk else 0 for run in self.runs]
        numbers = list(zip(firsts, ends, [run.max_bad for run in self.runs], strict=True))
        columns = np.asarray(numbers[0] if self._alone else np.transpose(numbers), np.int32)
        self.state, history = self._run(
            self.state, self._step_key, self._data, self._rows, *columns
        )
        # The one transfer of the chunk; it waits for the steps to be done.
        counts, history = jax.device_get((self.state[2:], history))
        for index, run in enumerate(self.runs):
            if run.is_open:
                step, num_bad, run.bad_in_row = (int(each) for each in self.of(counts, index))
                run.record.add(step, num_bad, self.of(history, index))
        return max(run.record.step - old for run, old in zip(self.runs, before, strict=True))

    def validate(self) -> None:
        """Validates the parameters where that is due, and keeps them where they are the best."""
        due = [run.is_open and run.record.validation_due for run in self.runs]
        if not any(due):
            return
        values, judged = self._judge(
            self.state.params, self.state.opt_state, self._key, self._validation_data
        )
        values = jax.device_get(values)
        better = [
            is_due and run.record.validated(run.record.step, self.of(values, index))
            for index, (run, is_due) in enumerate(zip(self.runs, due, strict=True))
        ]
        if all(better) or self.best is None:
            self.best = judged
        elif any(better):
            self.best = _chosen(np.asarray(better), judged, self.best)

    def hand_out(self) -> None:
        """Gives each run what is its own, unless a step that did not end has taken it."""
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state)):
            return
        judged = None
        if any(run.record.best_step is None for run in self.runs):
            judged = self._judge(
                self.state.params, self.state.opt_state, self._key, self._validation_data
            )[1]
        for index, run in enumerate(self.runs):
            run.state = self.of(self.state, index)
            run.learned = self.of(judged if run.record.best_step is None else self.best, index)


@jax.jit
def _stacked(trees: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@jax.jit
def _chosen(which: Array, new: PyTree, old: PyTree) -> PyTree:
    place = lambda leaf: which.reshape(-1, *[1] * (leaf.ndim - 1))  # noqa: E731
    return jax.tree.map(lambda a, b: jnp.where(place(a), a, b), new, old)


def train(runs: Sequence[Run]) -> None:
    """Does the steps of runs until each of them is over: by a reason, or an error of its own."""
    first = runs[0]
    with (
        noted_interrupts() as interrupts,
        devices.over(first.mesh),
        devices.lost_named(),
        display(first.num_steps, first.progress and devices.is_first()) as shown,
    ):
        group = Group(runs)
        for run in runs:
            run.reason = run.record.reason
        try:
            _loop(group, interrupts, shown)
        except devices.LOST:
            raise
        except BaseException:
            group.hand_out()
            raise
        group.hand_out()


def _loop(group: Group, interrupts: list[int], shown: Display) -> None:
    pace = Pace()
    while True:
        begun = time.perf_counter()
        for run in group.runs:
            run.look_ahead()
        going = [run for run in group.runs if run.is_open]
        if not going:
            return
        chosen = max(run.record.step for run in going) + pace.steps
        steps = group.advance(chosen)
        seconds = time.perf_counter() - begun
        if pace.compiling:
            shown.begin(going[0].record.step)
        pace.learn(steps, seconds)
        for index, run in enumerate(group.runs):
            if run.is_open and run.bad_in_row >= run.max_bad:
                run.state = group.of(group.state, index)
                run.error = run.diverged()
        group.validate()
        is_due, record = pace.is_due(), going[0].record
        reached = any(run.record.step == chosen for run in going)
        reasons = [_reason(run, interrupts) for run in group.runs]
        if is_due or reached or any(reasons):
            shown.update(record.step, record.loss, record.validation, record.num_bad_steps)
        for index, (run, reason) in enumerate(zip(group.runs, reasons, strict=True)):
            if not run.is_open:
                continue
            asked = devices.agreed(bool(reason or run.record.step == chosen or is_due))
            if asked and run.callback is not None:
                run.state = group.of(group.state, index)
                reason = run.call(steps / seconds) or reason
            number = devices.agreed(-1 if reason is None else REASONS.index(reason))
            run.reason = None if number < 0 else REASONS[number]
            if run.every < NEVER and (run.reason or run.record.step % run.every == 0):
                state = devices.home((group.state, group.best))
                if run.checkpoints is not None:
                    run.checkpoints.save(run.record.step, state, run.record.history())


def _reason(run: Run, interrupts: list[int]) -> StopReason | None:
    if not run.is_open:
        return None
    return run.record.reason or (StopReason.INTERRUPTED if interrupts else None)
