"""What all fits are given, and checks of it."""

from collections.abc import Callable, Mapping
from typing import TypedDict

import optax
from jax.sharding import Mesh

from flowvi import checks, files
from flowvi.checks import require
from flowvi.training.result import Progress
from flowvi.training.step import LossFn
from flowvi.training.stopping import NEVER, Plateau

Callback = Callable[[Progress], bool | None]


class TrainingOptions(TypedDict, total=False):
    """What all fits share: keyword arguments of `fit`, `fit_density`, `fit_posterior`, `fit_vae`.

    Attributes:
        num_steps: steps to do.
        batch_size: rows of a batch.
        optimizer: an Optax optimizer. Line searches and plateau rules get what they ask for:
            `value`, `grad` and `value_fn`.
        averaging: the decay, between 0 and 1, of an exponential moving average of the parameters,
            such as 0.999. With it, the average is what is validated and handed back. It gives
            the noise of steps no way into the result, and lets the rate stay high for longer. A
            schedule-free optimizer brings an average of its own, which is used instead.
        plateau: end training when the loss itself stops improving; see `Plateau`.
        max_bad_steps: end training when so many steps in a row were bad.
        checkpoint_dir: a directory for checkpoints, of which the last three are kept. They are
            written beside the running steps, and there is one at the end. A directory belongs to
            one running fit.
        checkpoint_every: steps between two checkpoints; by default a tenth of all.
        resume: go on from the last whole checkpoint in `checkpoint_dir`, or begin if there is none.
            The result is that of a run that was never interrupted, to the bit. It needs the same
            arguments; what ends training early may differ.
        progress: whether to show progress on standard error.
        callback: called with a `Progress` a few times a second; training ends when it returns True.
        mesh: a `jax.sharding.Mesh` with an axis "data", or a number of devices, over which the rows
            of a batch are split, or its draws where it has no rows; by default that of
            `jax.set_mesh`, or one device. The result is that of one device, up to rounding.

    Example:
        >>> import flowvi as fv
        >>> fv.TrainingOptions(num_steps=100, progress=False)
        {'num_steps': 100, 'progress': False}
    """

    num_steps: int
    batch_size: int | None
    optimizer: optax.GradientTransformation
    averaging: float | None
    plateau: Plateau | None
    max_bad_steps: int
    checkpoint_dir: files.Path | None
    checkpoint_every: int | None
    resume: bool
    progress: bool
    callback: Callback | None
    mesh: Mesh | int | None


def check_names(options: Mapping[str, object]) -> None:
    """Checks that options are those of training."""
    known = TrainingOptions.__annotations__
    unknown = ", ".join(name for name in options if name not in known)
    rule = f"`options` must be among {', '.join(known)}"
    require(not unknown, rule, unknown, error=TypeError, say=str)


def check_functions(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    validate: LossFn | None,
    callback: Callback | None,
) -> None:
    """Checks that functions are functions, and hashable."""
    for name, function in {"loss_fn": loss_fn, "validate": validate, "callback": callback}.items():
        is_one = callable(function) or (function is None and name != "loss_fn")
        require(is_one, f"`{name}` must be a function", function, error=TypeError)
    is_one = hasattr(optimizer, "init") and hasattr(optimizer, "update")
    rule = "`optimizer` must be an Optax optimizer, such as `optax.adam(1e-3)`"
    require(is_one, rule, optimizer, error=TypeError)
    for name, value in {"loss_fn": loss_fn, "optimizer": optimizer, "validate": validate}.items():
        try:
            hash(value)
        except TypeError:
            rule = f"`{name}` must be hashable, so that a second call knows it again"
            fix = "Perhaps make its class a frozen dataclass?"
            raise TypeError(f"{rule}; got {value!r}. {fix}") from None


def check_validation(every: int | None, **given: object) -> None:
    """Checks that arguments of the validation go together."""
    for name, value in given.items():
        rule = f"`validate_every` must be a positive integer where `{name}` is given"
        require(every is not None or value is None, rule, every)
    has_any = given["validate"] is not None or given["validation_data"] is not None
    rule = "`validate_every` must be None where neither `validate` nor `validation_data` is given"
    require(every is None or has_any, rule, every)


def count(name: str, value: int | None) -> int:
    """`value` as a positive integer; one that is never reached for None."""
    return NEVER if value is None else checks.positive_int(name, value)


def check_options(
    progress: bool, resume: bool, plateau: Plateau | None, averaging: float | None
) -> None:
    """Checks options that are no counts."""
    for name, flag in {"progress": progress, "resume": resume}.items():
        require(isinstance(flag, bool), f"`{name}` must be True or False", flag, error=TypeError)
    rule = "`plateau` must be an `fv.Plateau(...)` or None"
    require(isinstance(plateau, Plateau | None), rule, plateau, error=TypeError)
    is_number = isinstance(averaging, int | float | None) and not isinstance(averaging, bool)
    rule = "`averaging` must be a number between 0 and 1 or None"
    require(is_number, rule, averaging, error=TypeError)
    lies_there = averaging is None or 0 < averaging < 1
    require(lies_there, "`averaging` must lie between 0 and 1", averaging)


def checkpoint_interval(
    directory: files.Path | None, every: int | None, resume: bool, num_steps: int
) -> int:
    """Steps between two checkpoints; by default a tenth of them all."""
    if directory is None:
        for name, is_given in {"checkpoint_every": every is not None, "resume": resume}.items():
            rule = f"`checkpoint_dir` must be a directory where `{name}` is given"
            require(not is_given, rule, directory)
        return NEVER
    return max(num_steps // 10, 1) if every is None else count("checkpoint_every", every)
