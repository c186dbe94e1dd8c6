"""One training step: a pure function of parameters, optimizer state, key and batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flowvi.params import combine, partition
from flowvi.training import rowwise

Array = jax.Array
LossFn = Callable[[Any, Array, Any], Any]

#: What the history keeps for itself; a validation's metric "step" would become one of them.
RESERVED = ("loss", "validation", "validation_step", "step")


class Faults(NamedTuple):
    """The count of bad steps.

    Attributes:
        total: bad steps so far.
        in_row: bad steps since the last good one.
        suspects: shape [number of suspects], True for those that were not finite in the first bad
            step of the row; `suspects` names them.
    """

    total: Any
    in_row: Any
    suspects: Any

    def one_more(self, flaws: Array) -> "Faults":
        """The count after a bad step with these flaws."""
        first = self.in_row == 0
        return Faults(self.total + 1, self.in_row + 1, jnp.where(first, flaws, self.suspects))


class Outcome(NamedTuple):
    """What one step brought.

    Attributes:
        params: parameters after the step.
        opt_state: the optimizer's state after it.
        loss: scalar.
        metrics: a dict of scalars.
        good: whether all that it has looked at is finite. Where it is not, the step was a bad one,
            and parameters and state are of no use, except where there are parameters per row: then
            they are those before it.
        flaws: for each of the `suspects`, whether it may be the cause; None for a step that was not
            careful.
    """

    params: Any
    opt_state: Any
    loss: Array
    metrics: dict[str, Array]
    good: Array
    flaws: Array | None


def unpack(output: Any) -> tuple[Any, dict[str, Any], Any]:
    """(loss, metrics, params) from any of the three forms of a loss; params may be None.

    Raises:
        TypeError: if it is none of the three.
    """
    if not isinstance(output, tuple):
        return output, {}, None
    if len(output) not in (2, 3):
        raise TypeError(
            "`loss_fn` must return loss, (loss, metrics) or (loss, metrics, params); got a tuple "
            f"of length {len(output)}."
        )
    loss, metrics, params = (*output, None)[:3]
    if not isinstance(metrics, dict) or not all(isinstance(name, str) for name in metrics):
        raise TypeError(
            f"`loss_fn` must return its metrics as a dict from names to scalars; got {metrics!r}."
        )
    return loss, metrics, params


def train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    params: Any,
    opt_state: Any,
    key: Array,
    batch: Any,
    careful: bool = True,
) -> Outcome:
    """Moves the trainable leaves down the gradient and takes over new `Fixed` leaves.

    It says whether the step was good, and leaves it to the caller to take a bad one back: an update
    that waits for the verdict takes a short step a third longer. Where there are parameters per
    row, it takes a bad step back itself: it moves a few rows of them in place, and nobody else
    could tell which, short of a copy of them all.

    Args:
        loss_fn: any of the three forms of a loss.
        optimizer: a `rowwise` one where there are parameters per row. It sees the trainable
            leaves, with None in the place of `Fixed` subtrees. It is told `value`, `grad` and
            `value_fn`, which line searches and plateau rules ask for.
        params: parameters.
        opt_state: the optimizer's state.
        key: for the loss.
        batch: for the loss.
        careful: whether to look at the gradient, and at what the step leaves behind, or at the loss
            alone. To look takes a short step a fifth longer.
    """
    whole = params, opt_state
    params, opt_state = rowwise.picked(whole, batch)
    trainable, fixed = partition(params)

    def value_fn(trainable: Any) -> Any:
        loss, metrics, new = unpack(loss_fn(combine(trainable, fixed), key, batch))
        return loss, (metrics, None if new is None else partition(new)[1])

    (loss, (metrics, new_fixed)), gradient = jax.value_and_grad(value_fn, has_aux=True)(trainable)
    updates, new_opt_state = optax.with_extra_args_support(optimizer).update(
        gradient,
        opt_state,
        trainable,
        value=loss,
        grad=gradient,
        value_fn=lambda trainable: value_fn(trainable)[0],
    )
    new_trainable = optax.apply_updates(trainable, updates)
    new = combine(new_trainable, fixed if new_fixed is None else new_fixed), new_opt_state
    new_params, new_opt_state = jax.tree.map(_like, new, (params, opt_state))
    good, flaws = jnp.isfinite(loss), None
    if careful:
        flaws = _flaws(gradient, new_fixed, params)
        good &= _all(jnp.isfinite, gradient) & ~spoiled(
            (params, opt_state), (new_params, new_opt_state)
        )
    if rowwise.tables(params):
        new_params, new_opt_state = rowwise.put_back(whole, (new_params, new_opt_state), good)
    return Outcome(new_params, new_opt_state, loss, metrics, good, flaws)


def spoiled(old: Any, new: Any) -> Array:
    """Whether steps left behind what is not finite, in (parameters, optimizer's state).

    What was not finite before does not count, nor does infinity in `Fixed` leaves, which may be
    meant: the open end of a support.
    """
    (old_params, old_state), (new_params, new_state) = old, new
    (old_free, old_fixed), (new_free, new_fixed) = partition(old_params), partition(new_params)
    broken = [
        jnp.any(jnp.isfinite(before) & ~jnp.isfinite(after))
        for before, after in _float_pairs((old_free, old_state), (new_free, new_state))
    ] + [
        jnp.any(jnp.isnan(after) & ~jnp.isnan(before))
        for before, after in _float_pairs(old_fixed, new_fixed)
    ]
    return jnp.any(jnp.stack(broken))


def shows(optimizer: optax.GradientTransformation, params: Any, opt_state: Any) -> Array:
    """Whether a gradient that is not finite always leaves parameters that are not.

    It does with most optimizers; but one may clip each number, take signs, collect the gradients of
    several steps, or leave some parameters alone.
    """
    trainable, _ = partition(params)

    def left(value: float) -> Array:
        gradient = jax.tree.map(lambda leaf: jnp.full_like(leaf, value), trainable)
        nan = jnp.full((), jnp.nan)
        updates, _ = optax.with_extra_args_support(optimizer).update(
            gradient, opt_state, trainable, value=nan, grad=gradient, value_fn=lambda _: nan
        )
        return _all(lambda leaf: ~jnp.isfinite(leaf), optax.apply_updates(trainable, updates))

    return left(np.nan) & left(np.inf)


def _flaws(gradient: Any, new_fixed: Any, params: Any) -> Array:
    """For each of the `suspects`, whether it may be what makes the step a bad one.

    A gradient of which a square is not finite would silence an adaptive optimizer for good.
    """
    flaws = [
        ~jnp.all(jnp.abs(leaf) <= float(np.sqrt(jnp.finfo(leaf.dtype).max)))
        for leaf in jax.tree.leaves(gradient)
    ] + [jnp.any(jnp.isnan(leaf)) for leaf in jax.tree.leaves(new_fixed) if _is_float(leaf)]
    # A loss that hands back no parameters leaves the Fixed ones out.
    flaws += [jnp.bool_(False)] * (len(suspects(params)) - len(flaws))
    return jnp.stack(flaws)


def _all(holds: Callable[[Array], Array], tree: Any) -> Array:
    """Whether something holds everywhere in the floating leaves of a tree."""
    found = [jnp.all(holds(leaf)) for leaf in jax.tree.leaves(tree) if _is_float(leaf)]
    return jnp.all(jnp.stack([jnp.bool_(True), *found]))


def _float_pairs(old: Any, new: Any) -> list[tuple[Array, Array]]:
    pairs = zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    return [(before, after) for before, after in pairs if _is_float(before)]


def _like(new: Array, old: Array) -> Array:
    # A loop's state must not change, down to weak types.
    return jax.lax.convert_element_type(new, old.dtype) if new.dtype == old.dtype else new


def _is_float(leaf: Any) -> bool:
    try:
        return bool(jnp.issubdtype(leaf.dtype, jnp.floating))
    except (AttributeError, TypeError):
        return False


def suspects(params: Any) -> list[str]:
    """What the entries of `Faults.suspects` stand for, in words."""
    trainable, fixed = partition(params)
    gradients = jax.tree_util.tree_leaves_with_path(trainable)
    fixed_leaves = jax.tree_util.tree_leaves_with_path(fixed)
    return [f"the gradient of `params{jax.tree_util.keystr(path)}`" for path, _ in gradients] + [
        f"the new value of the Fixed leaf `params{jax.tree_util.keystr(path)}`"
        for path, leaf in fixed_leaves
        if _is_float(leaf)
    ]


def no_faults(params: Any) -> Faults:
    """The count before the first step."""
    return Faults(np.int32(0), np.int32(0), np.zeros(len(suspects(params)), bool))


def check_params(params: Any) -> None:
    """Checks that there is something to train and that all of it can be trained.

    Raises:
        TypeError: if a leaf outside `Fixed` is not a floating array.
        ValueError: if no leaf can be trained.
    """
    leaves = jax.tree_util.tree_leaves_with_path(partition(params)[0])
    if not leaves:
        raise ValueError("`params` must have at least one leaf outside `Fixed`; got none.")
    for path, leaf in leaves:
        where = f"params{jax.tree_util.keystr(path)}"
        if not (isinstance(leaf, float) or _is_float(leaf)):
            got = f"dtype {leaf.dtype}" if hasattr(leaf, "dtype") else repr(leaf)
            raise TypeError(
                f"`{where}` must be a floating array; got {got}. "
                "Perhaps wrap it in `Fixed`, so that the optimizer leaves it alone?"
            )


def check_loss(name: str, loss_fn: LossFn, params: Any, key: Array, batch: Any) -> list[str]:
    """Checks what a loss returns, from shapes alone.

    Args:
        name: what to call the loss in a message.
        loss_fn: any of the three forms.
        params: parameters.
        key: a random key.
        batch: a batch, or its shapes.

    Returns:
        The names of the metrics.

    Raises:
        TypeError: if the loss is not of one of the three forms, or not floating.
        ValueError: if the loss or a metric is not a scalar, a metric's name is taken, or the
            parameters it hands back differ in structure, shape or dtype.
    """
    loss, metrics, new_params = unpack(jax.eval_shape(loss_fn, params, key, batch))
    if getattr(loss, "shape", None) != ():
        raise ValueError(
            f"`{name}` must return a scalar loss; got {_describe(loss)}. "
            "Perhaps take its mean over the batch?"
        )
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise TypeError(f"`{name}` must return a floating loss; got {_describe(loss)}.")
    for metric, value in metrics.items():
        if metric in RESERVED:
            raise ValueError(
                f"`{name}` must not name a metric {metric!r}, which the history keeps for itself."
            )
        if getattr(value, "shape", None) != ():
            raise ValueError(
                f"`{name}` must return scalar metrics; got {_describe(value)} for {metric!r}."
            )
    if new_params is not None:
        _check_same(name, params, new_params)
    return list(metrics)


def _check_same(name: str, params: Any, new_params: Any) -> None:
    old: Any = jax.tree.structure(params)
    new: Any = jax.tree.structure(new_params)
    if old != new:
        raise ValueError(
            f"`{name}` must hand back parameters of the structure it was given, {old}; got {new}."
        )
    # Only the Fixed leaves are taken over, so only they matter.
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(partition(params)[1]),
        jax.tree.leaves(partition(new_params)[1]),
        strict=True,
    )
    for (path, before), after in pairs:
        if (before.shape, before.dtype) != (after.shape, after.dtype):
            raise ValueError(
                f"`{name}` must keep the shape and dtype of the Fixed leaf "
                f"`params{jax.tree_util.keystr(path)}`, {_describe(before)}; got "
                f"{_describe(after)}."
            )


def _describe(value: Any) -> str:
    if not hasattr(value, "shape"):
        return repr(value)
    return f"shape {value.shape} and dtype {value.dtype.name}"
