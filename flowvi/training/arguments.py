"""Checks of what `fit` is given."""

from typing import Any

import jax

from flowvi import checks
from flowvi.training import stretch
from flowvi.training.step import LossFn, check_loss
from flowvi.training.stopping import NEVER, Plateau

Array = jax.Array


def count(name: str, value: Any) -> int:
    """`value` as a positive integer; one that is never reached for None."""
    return NEVER if value is None else checks.positive_int(name, value)


def check_key(key: Any) -> None:
    """Checks that `key` is a random key, of either kind.

    Raises:
        TypeError: if it is not.
    """
    try:
        jax.eval_shape(jax.random.fold_in, key, 0)  # remembered, as a lambda's would not be
    except (TypeError, ValueError):
        raise TypeError(
            f"`key` must be a random key, such as `jax.random.key(0)`; got {key!r}."
        ) from None


def check_functions(loss_fn: Any, optimizer: Any, validate: Any, callback: Any) -> None:
    """Checks that functions are functions, and hashable.

    Raises:
        TypeError: if they are not.
    """
    for name, function in {"loss_fn": loss_fn, "validate": validate, "callback": callback}.items():
        if not (callable(function) or (function is None and name != "loss_fn")):
            raise TypeError(f"`{name}` must be a function; got {function!r}.")
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(
            "`optimizer` must be an Optax optimizer, such as `optax.adam(1e-3)`; got "
            f"{optimizer!r}."
        )
    known = {"loss_fn": loss_fn, "optimizer": optimizer, "validate": validate}
    for name, value in known.items():
        try:
            hash(value)
        except TypeError:
            raise TypeError(
                f"`{name}` must be hashable, so that a second call knows it again; got {value!r}. "
                "Perhaps make its class a frozen dataclass?"
            ) from None


def check_validation(
    loss_fn: LossFn,
    validate: LossFn | None,
    validation_data: Any,
    validate_every: int | None,
    patience: int | None,
) -> LossFn | None:
    """The validation loss; None without validation.

    Raises:
        ValueError: if an argument of the validation is missing or superfluous.
    """
    given = {"validate": validate, "validation_data": validation_data, "patience": patience}
    if validate_every is None:
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"`validate_every` must be a positive integer where `{name}` is given; got "
                    "None."
                )
        return None
    if validate is None and validation_data is None:
        raise ValueError(
            "`validate_every` must be None where neither `validate` nor `validation_data` is "
            f"given; got {validate_every}."
        )
    return loss_fn if validate is None else validate


def check_losses(
    program: stretch.Program,
    compiled: stretch.Compiled,
    params: Any,
    key: Array,
    batch: Any,
    validation_data: Any,
) -> tuple[list[str], tuple[str, ...]]:
    """The names of the metrics, and of what a validation writes, after a look at the losses.

    Raises:
        TypeError, ValueError: see `step.check_loss`.
    """
    state, _ = jax.eval_shape(compiled.begin, params, key)
    params = state.params
    names = check_loss("loss_fn", compiled.loss_fn, params, key, batch)
    if compiled.validate is None:
        return names, ()
    name = "loss_fn" if program.validate is program.loss_fn else "validate"
    own = check_loss(name, compiled.validate, params, key, validation_data)
    written = tuple(stretch.validation_values(None, dict.fromkeys(own)))
    for metric in names:
        if metric in written:
            raise ValueError(
                f"`loss_fn` must not name a metric {metric!r}, under which the history keeps a "
                "metric of the validation."
            )
    return names, written


def check_plateau(plateau: Any) -> Plateau | None:
    """Checks that `plateau` is a rule or None.

    Raises:
        TypeError: if it is not.
    """
    if plateau is not None and not isinstance(plateau, Plateau):
        raise TypeError(f"`plateau` must be an `fv.Plateau(...)` or None; got {plateau!r}.")
    return plateau


def check_averaging(decay: Any) -> float | None:
    """Checks that `decay` is one, or None.

    Raises:
        TypeError, ValueError: if it is not.
    """
    if decay is None:
        return None
    if isinstance(decay, bool) or not isinstance(decay, int | float):
        raise TypeError(f"`averaging` must be a number between 0 and 1 or None; got {decay!r}.")
    if not 0 < decay < 1:
        raise ValueError(f"`averaging` must lie between 0 and 1; got {decay}.")
    return float(decay)


def check_checkpoints(directory: Any, every: Any, resume: bool, num_steps: int) -> int:
    """Steps between two checkpoints; by default a tenth of them all.

    Raises:
        TypeError, ValueError: if an argument of the checkpoints is wrong or superfluous.
    """
    if directory is None:
        for name, value in {"checkpoint_every": every, "resume": resume}.items():
            if value:
                raise ValueError(
                    f"`checkpoint_dir` must be a directory where `{name}` is given; got None."
                )
        return NEVER
    if every is None:
        return max(num_steps // 10, 1)
    return checks.positive_int("checkpoint_every", every)
