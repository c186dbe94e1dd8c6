"""One training step: a pure function of parameters, optimizer state, key and batch."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from flowvi.checks import require
from flowvi.optimizers import rowwise
from flowvi.params import PyTree, combine, named_leaves, partition

Array = jax.Array
Metrics = dict[str, Array]
LossFn = Callable[[PyTree, Array, PyTree], Array | tuple]

#: What the history keeps for itself; a validation's metric "step" would become one of them.
RESERVED = ("loss", "validation", "validation_step", "step")


class Outcome(NamedTuple):
    """What one step brought; a bad one that guards brings the parameters and state before it."""

    params: PyTree
    opt_state: PyTree
    loss: Array
    metrics: Metrics
    good: Array


def unpack(output: object) -> tuple[Array, Metrics, PyTree]:
    """(loss, metrics, params) from any of the three forms of a loss; params may be None."""
    if not isinstance(output, tuple):
        return output, {}, None  # type: ignore[return-value]
    rule = "`loss_fn` must return loss, (loss, metrics) or (loss, metrics, params)"
    length = f"a tuple of length {len(output)}"
    require(len(output) in (2, 3), rule, length, error=TypeError, say=str)
    loss, metrics, params = (*output, None)[:3]
    named = isinstance(metrics, dict) and all(isinstance(name, str) for name in metrics)
    rule = "`loss_fn` must return its metrics as a dict from names to scalars"
    require(named, rule, metrics, error=TypeError)
    return loss, metrics, params


def gradient_of(
    loss_fn: LossFn, params: PyTree, key: Array, batch: PyTree
) -> tuple[Array, Metrics, PyTree, PyTree]:
    """(loss, metrics, new `Fixed` leaves or None, gradient of the trainable leaves)."""
    trainable, fixed = partition(params)

    def value_fn(trainable: PyTree) -> tuple[Array, tuple[Metrics, PyTree]]:
        loss, metrics, new = unpack(loss_fn(combine(trainable, fixed), key, batch))
        return loss, (metrics, None if new is None else partition(new)[1])

    (loss, (metrics, new)), gradient = jax.value_and_grad(value_fn, has_aux=True)(trainable)
    return loss, metrics, new, gradient


def train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformationExtraArgs,
    params: PyTree,
    opt_state: PyTree,
    key: Array,
    batch: PyTree,
    guards: bool = True,
) -> Outcome:
    """Moves the trainable leaves down the gradient and takes over new `Fixed` leaves.

    A step whose loss or gradient is not finite is a bad one. Where it guards, so is one whose new
    parameters are not, and a bad one changes nothing. The optimizer, a `rowwise` one, sees None in
    the place of `Fixed` subtrees, and is told `value`, `grad` and `value_fn`, which line searches
    and plateau rules ask for.
    """
    whole = params, opt_state
    params, opt_state = rowwise.picked(whole, batch)
    loss, metrics, new_fixed, gradient = gradient_of(loss_fn, params, key, batch)
    trainable, fixed = partition(params)
    value_fn = lambda other: unpack(loss_fn(combine(other, fixed), key, batch))[0]  # noqa: E731
    extra = {"value": loss, "grad": gradient, "value_fn": value_fn}
    updates, new_opt_state = optimizer.update(gradient, opt_state, trainable, **extra)
    moved = optax.apply_updates(trainable, updates)
    good = jnp.isfinite(loss) & is_finite(gradient)
    if new_fixed is not None:
        good &= ~_any_nan(new_fixed)
    new = combine(moved, fixed if new_fixed is None else new_fixed), new_opt_state
    new_params, new_opt_state = jax.tree.map(_like, new, (params, opt_state))
    if guards:
        good &= is_finite(moved)
        new_params, new_opt_state = rowwise.put_back(whole, (new_params, new_opt_state), good)
    return Outcome(new_params, new_opt_state, loss, metrics, good)


def is_finite(tree: PyTree) -> Array:
    """Whether sums of squares are finite: one that is not would silence Adam for good."""
    # One product costs less than to look at each number.
    wide = lambda leaf: leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))  # noqa: E731
    flat = [jnp.ravel(wide(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.isfinite(sum((jnp.vdot(leaf, leaf) for leaf in flat), start=jnp.zeros(())))


def _any_nan(tree: PyTree) -> Array:
    # Infinity may be meant.
    found = [jnp.any(jnp.isnan(leaf)) for leaf in jax.tree.leaves(tree) if _is_float(leaf)]
    return jnp.any(jnp.stack([jnp.bool_(False), *found]))


def _like(new: Array, old: Array) -> Array:
    # A loop's state must not change, down to weak types.
    return jax.lax.convert_element_type(new, old.dtype) if new.dtype == old.dtype else new


def _is_float(leaf: object) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and bool(jnp.issubdtype(dtype, jnp.floating))


def culprit(loss_fn: LossFn, params: PyTree, key: Array, batch: PyTree) -> str:
    """What is not finite in a bad step: a metric, the loss, a gradient or a new `Fixed` leaf."""
    params = rowwise.picked((params, None), batch)[0]
    loss, metrics, new_fixed, gradient = gradient_of(loss_fn, params, key, batch)
    for name, value in metrics.items():
        if not jnp.isfinite(value):
            return f"the metric {name!r} was {value}"
    if not jnp.isfinite(loss):
        return f"the loss was {loss}"
    for what, tree, broken in (
        ("the gradient of", gradient, lambda leaf: ~is_finite(leaf)),
        ("the new value of the Fixed leaf", new_fixed, _any_nan),
    ):
        for name, leaf in named_leaves("params", tree).items():
            if broken(leaf):
                return f"{what} `{name}` was not finite"
    return "what the optimizer made of the parameters was not finite"


def check_params(params: PyTree) -> None:
    """Checks that there is something to train and that all of it can be trained."""
    leaves = named_leaves("params", partition(params)[0])
    require(leaves, "`params` must have at least one leaf outside `Fixed`", "none", say=str)
    fix = "Perhaps wrap it in `Fixed`, so that the optimizer leaves it alone?"
    for name, leaf in leaves.items():
        is_float = isinstance(leaf, float) or _is_float(leaf)
        got = f"dtype {leaf.dtype}" if hasattr(leaf, "dtype") else repr(leaf)
        require(is_float, f"`{name}` must be a floating array", got, fix, TypeError, str)


def check_loss(name: str, loss_fn: LossFn, params: PyTree, key: Array, batch: PyTree) -> list[str]:
    """The names of the metrics of a loss, after a look at the shapes of what it returns."""
    try:
        output = jax.eval_shape(loss_fn, params, key, batch)
    except Exception as error:
        kind = type(error) if type(error) in (TypeError, ValueError) else ValueError
        rule = f"`{name}` must take `params`, `key` and a batch of `data` or `validation_data`"
        raise kind(f"{rule}; it raised {type(error).__name__}: {error}") from error
    loss, metrics, new_params = unpack(output)
    is_scalar, fix = getattr(loss, "shape", None) == (), "Perhaps take its mean over the batch?"
    require(is_scalar, f"`{name}` must return a scalar loss", loss, fix, say=_describe)
    rule = f"`{name}` must return a floating loss"
    require(jnp.issubdtype(loss.dtype, jnp.floating), rule, loss, error=TypeError, say=_describe)
    for metric, value in metrics.items():
        if metric in RESERVED:
            raise ValueError(
                f"`{name}` must not name a metric {metric!r}, which the history keeps for itself."
            )
        is_scalar, got = getattr(value, "shape", None) == (), f"{_describe(value)} for {metric!r}"
        require(is_scalar, f"`{name}` must return scalar metrics", got, say=str)
    if new_params is not None:
        _check_same(name, params, new_params)
    return list(metrics)


def _check_same(name: str, params: PyTree, new_params: PyTree) -> None:
    old, new = jax.tree.structure(params), jax.tree.structure(new_params)
    rule = f"`{name}` must hand back parameters of the structure it was given, {old}"
    require(old == new, rule, new)  # type: ignore[operator]
    # Only the Fixed leaves are taken over, so only they matter.
    (_, fixed), (_, new_fixed) = partition(params), partition(new_params)
    fixed = named_leaves("params", fixed)
    for (where, before), after in zip(fixed.items(), jax.tree.leaves(new_fixed), strict=True):
        is_same = (before.shape, before.dtype) == (after.shape, after.dtype)
        rule = f"`{name}` must keep the shape and dtype of the Fixed leaf `{where}`"
        require(is_same, f"{rule}, {_describe(before)}", after, say=_describe)


def _describe(value: object) -> str:
    if not hasattr(value, "shape"):
        return repr(value)
    return f"shape {value.shape} and dtype {value.dtype.name}"  # type: ignore[attr-defined]
