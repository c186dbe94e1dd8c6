"""One training step: a pure function of parameters, optimizer state, key and batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flowvi.params import combine, partition

Array = jax.Array
LossFn = Callable[[Any, Array, Any], Any]

RESERVED = ("loss", "validation", "validation_step")


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


class Outcome(NamedTuple):
    """What one step brought.

    Attributes:
        params: parameters after the step; the old ones if it was bad.
        opt_state: the optimizer's state; the old one if the step was bad.
        faults: the count of bad steps.
        loss: scalar.
        metrics: a dict of scalars.
    """

    params: Any
    opt_state: Any
    faults: Faults
    loss: Array
    metrics: dict[str, Array]


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


def _square_sums(gradient: Array) -> Array:
    """Sums of squares along all axes but the last: not finite where there is anything to blame.

    Squares, because a gradient whose square overflows would silence an adaptive optimizer for good.
    """
    if gradient.dtype.itemsize == 2:
        gradient = gradient.astype(jnp.float32)  # half precision overflows at once
    return jnp.sum(jnp.square(gradient), axis=range(gradient.ndim - 1))


def _choose(good: Array, update: Callable[[], Any], skip: Callable[[], Any]) -> Any:
    def where() -> Any:
        return jax.tree.map(lambda new, old: jnp.where(good, new, old), update(), skip())

    def branch() -> Any:
        return jax.lax.cond(good, update, skip)

    # On a processor a branch is free, and `where` would compute each moment twice. An accelerator
    # would have to wait for the host to take the branch.
    return jax.lax.platform_dependent(cpu=branch, default=where)


def train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    params: Any,
    opt_state: Any,
    faults: Faults,
    key: Array,
    batch: Any,
) -> Outcome:
    """Moves the trainable leaves down the gradient and takes over new `Fixed` leaves.

    A bad step, whose loss, gradient or new `Fixed` leaf is not finite, changes nothing: neither
    parameters nor the optimizer's state.

    Args:
        loss_fn: any of the three forms of a loss.
        optimizer: sees the trainable leaves, with None in the place of `Fixed` subtrees. It is
            told `value`, `grad` and `value_fn`, which line searches and plateau rules ask for.
        params: parameters.
        opt_state: the optimizer's state.
        faults: the count of bad steps.
        key: for the loss.
        batch: for the loss.
    """
    trainable, fixed = partition(params)

    def value_fn(trainable: Any) -> Any:
        loss, metrics, new = unpack(loss_fn(combine(trainable, fixed), key, batch))
        return loss, (metrics, None if new is None else partition(new)[1])

    (loss, (metrics, new_fixed)), gradient = jax.value_and_grad(value_fn, has_aux=True)(trainable)
    sums = [_square_sums(leaf) for leaf in jax.tree.leaves(gradient)]
    # Infinity may be meant in a Fixed leaf: the open end of a support.
    sums += [
        jnp.sum(jnp.where(jnp.isnan(leaf), leaf, 0))
        for leaf in jax.tree.leaves(new_fixed)
        if _is_float(leaf)
    ]
    # The barrier keeps the compiler from merging the rest of the sum into this one, which it then
    # does not vectorise: that takes 6 times as long, and would be felt in a short step.
    sums = jax.lax.optimization_barrier(sums)
    good = jnp.isfinite(loss)
    for each in sums:
        good &= jnp.isfinite(jnp.sum(each))

    def update() -> tuple[Any, Any, Faults]:
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
        new_faults = faults._replace(in_row=jnp.zeros_like(faults.in_row))
        return *jax.tree.map(_like, new, (params, opt_state)), new_faults

    def skip() -> tuple[Any, Any, Faults]:
        first = faults.in_row == 0
        now = jnp.stack([~jnp.isfinite(jnp.sum(each)) for each in sums])
        # A loss that hands back no parameters leaves the Fixed ones out.
        now = jnp.pad(now, (0, len(faults.suspects) - len(now)))
        new_faults = Faults(
            total=faults.total + 1,
            in_row=faults.in_row + 1,
            suspects=jnp.where(first, now, faults.suspects),
        )
        return params, opt_state, new_faults

    params, opt_state, faults = _choose(good, update, skip)
    return Outcome(params, opt_state, faults, loss, metrics)


def _like(new: Array, old: Array) -> Array:
    # Both branches of a condition must agree, down to weak types.
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
