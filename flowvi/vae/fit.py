"""Fitting a latent-variable model to data."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flowvi import checks
from flowvi.compiling import compiled
from flowvi.objectives import Variational
from flowvi.training import FitResult, Look, Plateau, fit
from flowvi.training.arguments import check_key
from flowvi.vae.batches import weights_of
from flowvi.vae.defaults import BATCH_SIZE, default_optimizer
from flowvi.vae.inputs import NAMES
from flowvi.vae.model import VAE

Array = jax.Array

#: Validations over the length of a fit.
VALIDATIONS = 50


def fit_vae(
    vae: VAE,
    x: Any,
    *,
    key: Array,
    num_steps: int,
    batch_size: int | None = None,
    weights: Any = None,
    objective: Variational | None = None,
    params: Any = None,
    optimizer: optax.GradientTransformation | None = None,
    validation_data: Any = None,
    validation_samples: int = 1,
    validate_every: int | None = None,
    patience: int | None = None,
    plateau: Plateau | None = None,
    checkpoint_dir: Any = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    progress: bool = True,
    callback: Callable[[Look], bool | None] | None = None,
) -> FitResult:
    """Fits prior, likelihood and posterior of a model together.

    Maximises the ELBO, a mean over rows, or another objective. The history holds "loss", and with
    the ELBO "rate" and "distortion", a number for each step; and with `validation_data`
    "validation", minus the ELBO of those rows, "validation_rate", "validation_distortion" and, of
    several draws, "validation_log_likelihood", one for each validation.

    Args:
        vae: the model.
        x: array of shape [num_rows, *event_shape]; an `np.memmap` may be larger than memory. Where
            each row has its own posterior, x[i] is row i.
        key: a random key.
        num_steps: steps to do.
        batch_size: rows of a batch; 128 by default, or all if there are fewer.
        weights: array of shape [num_rows] of how much each row counts, None for equally. Only their
            ratios matter.
        objective: what `vae.loss` returns; by default `vae.loss()`, the ELBO of one draw, with the
            KL divergence in closed form where it has one.
        params: parameters to start from, such as an earlier result's.
        optimizer: an Optax optimizer. By default Adam, with steps relative to the size that
            parameters start with, whose learning rate rises over the first steps to 0.02, or to 0.1
            for parameters per row, and falls to zero with the last. `optax.multi_transform` over
            the keys of the parameters gives each family its own.
        validation_data: array of shape [num_validation_rows, *event_shape], rows that are not
            trained on. With it the result holds the parameters with the highest ELBO of them.
        validation_samples: draws of each row in a validation.
        validate_every: steps between two validations; by default there are 50.
        patience: end training when so many validations in a row brought no new best.
        plateau: end training when the loss itself stops improving; see `Plateau`.
        checkpoint_dir: as in `fit`, as are those that follow.
        checkpoint_every: see there.
        resume: see there.
        progress: whether to show progress on standard error.
        callback: as in `fit`.

    Returns:
        A `FitResult`, whose `params` are those of `vae`, and whose "control" there is where the
        objective has a state.

    Raises:
        TypeError: if an argument is of the wrong kind.
        ValueError: if shapes disagree, data are outside of the likelihood's support or not finite,
            weights are negative, or there are more rows than posteriors; before anything is
            trained.
        TrainingDiverged: as in `fit`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flowvi as fv
        >>> from flowvi.networks import MLP
        >>> x = jax.random.bernoulli(jax.random.key(0), 0.3, (100, 8))
        >>> vae = fv.VAE(
        ...     prior=fv.standard_normal(2),
        ...     likelihood=fv.conditional(fv.bernoulli(8), MLP(2, (16,), 8)),
        ...     posterior=fv.conditional(fv.gaussian(2), MLP(8, (16,), 4)),
        ... )
        >>> result = fv.fit_vae(vae, x, key=jax.random.key(1), num_steps=50, progress=False)
        >>> sorted(result.history), vae.reconstruct(result.params, jax.random.key(2), x).shape
        (['distortion', 'loss', 'rate'], (100, 8))
    """
    if not isinstance(vae, VAE):
        raise TypeError(f"`vae` must be a `fv.VAE(...)`; got {vae!r}.")
    check_key(key)
    num_steps = checks.positive_int("num_steps", num_steps)
    x = check_data(vae, "x", x)
    batch_size = min(BATCH_SIZE, len(x)) if batch_size is None else batch_size
    loss_fn: Any = vae.loss() if objective is None else objective
    if not (isinstance(loss_fn, Variational) and loss_fn.family == vae.posterior):
        raise TypeError(
            "`objective` must be what `vae.loss(...)` of this model returns, such as "
            f"`vae.loss(fv.objectives.IWELBO, num_samples=8)`; got {objective!r}."
        )
    data: dict[str, Any] = {"x": x}
    if vae.is_local:
        data["row"] = np.arange(len(x), dtype=np.int32)
        vae.posterior.check_context(data["row"])
    if weights is not None:
        data["weight"] = _check_weights(weights, len(x))
        loss_fn = dataclasses.replace(loss_fn, row_weights=weights_of)
    init_key, objective_key, fit_key = jax.random.split(key, 3)
    start = vae.init(init_key) if params is None else check_params(params)
    params = _with_state(start, state_beside(loss_fn, objective_key))
    num_samples = checks.positive_int("validation_samples", validation_samples)
    validation: dict[str, Any] = {}
    if validation_data is not None:
        if vae.is_local:
            raise ValueError(
                "`validation_data` must be None where each row has its own posterior, which rows "
                f"that are not trained on have not; got {vae.posterior!r}. Perhaps fit those by "
                "`fv.fit_rows`, afterwards?"
            )
        validation = {
            "validate": Validation(vae, num_samples),
            "validation_data": check_data(vae, "validation_data", validation_data),
            "validate_every": validate_every or max(num_steps // VALIDATIONS, 1),
        }
    elif validate_every is not None:
        validation = {"validate_every": validate_every}
    return fit(
        loss_fn,
        params,
        default_optimizer(num_steps) if optimizer is None else optimizer,
        key=fit_key,
        num_steps=num_steps,
        data=data,
        batch_size=batch_size,
        patience=patience,
        plateau=plateau,
        checkpoint_dir=checkpoint_dir,
        checkpoint_every=checkpoint_every,
        resume=resume,
        progress=progress,
        callback=callback,
        **validation,
    )


@dataclasses.dataclass(frozen=True)
class Validation:
    """Minus the ELBO of held-out rows, as a loss, with its parts as metrics."""

    vae: VAE
    num_samples: int = 1

    def __call__(self, params: Any, key: Array, x: Array) -> tuple[Array, dict[str, Array]]:
        """The loss and {"rate", "distortion"}, and "log_likelihood" of several draws."""
        found = self.vae.evaluate(params, key, x, self.num_samples)
        metrics = {"rate": jnp.mean(found.rate), "distortion": jnp.mean(found.distortion)}
        if self.num_samples > 1:
            metrics["log_likelihood"] = jnp.mean(found.log_likelihood)
        return -jnp.mean(found.elbo), metrics


@compiled()
def state_beside(loss_fn: Variational, key: Array) -> dict[str, Any]:
    """What an objective needs beside the model's parameters."""
    made = loss_fn.init(key)
    return {name: made[name] for name in made if name != "posterior"}


def _with_state(params: dict[str, Any], fresh: dict[str, Any]) -> dict[str, Any]:
    """The model's parameters and the state of an objective; that of an earlier fit if it is one."""
    known = {name: params[name] for name in fresh if _alike(params.get(name), fresh[name])}
    return {**{name: params[name] for name in NAMES}, **fresh, **known}


def _alike(left: Any, right: Any) -> bool:
    structures: list[Any] = [jax.tree.structure(tree) for tree in (left, right)]
    return structures[0] == structures[1]


def check_data(vae: VAE, name: str, x: Any) -> Any:
    """`x` as rows of the model's events.

    Raises:
        TypeError: if it does not hold numbers.
        ValueError: if it has another shape or no rows, or is outside of the likelihood's support.
    """
    x = x if hasattr(x, "shape") and hasattr(x, "dtype") else np.asarray(x)
    if x.shape[1:] != vae.event_shape or x.ndim == 0:
        raise ValueError(
            f"`{name}` must have shape [num_rows, {', '.join(map(str, vae.event_shape))}], rows of "
            f"the event shape of the likelihood {vae.likelihood!r}; got shape {x.shape}."
        )
    if not (jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool):
        raise TypeError(f"`{name}` must hold numbers; got dtype {x.dtype}.")
    if not len(x):
        raise ValueError(f"`{name}` must have at least one row; got shape {x.shape}.")
    if x.dtype == bool:
        x = np.asarray(x, np.uint8)
    vae.likelihood.check_support(x, name)
    return x


def _check_weights(weights: Any, num_rows: int) -> np.ndarray:
    """Weights whose mean is 1."""
    weights = np.asarray(weights, np.float64)
    if weights.shape != (num_rows,):
        raise ValueError(
            f"`weights` must have shape {(num_rows,)}, one for each row of `x`; got shape "
            f"{weights.shape}."
        )
    bad = ~(np.isfinite(weights) & (weights >= 0))
    if bad.any():
        row = int(np.argmax(bad))
        raise ValueError(
            f"`weights` must be finite and at least 0; got {weights[row]} in row {row}."
        )
    if not weights.any():
        raise ValueError("`weights` must not all be 0.")
    return (weights / weights.mean()).astype(jnp.result_type(float))


def check_params(params: Any) -> dict[str, Any]:
    """`params`, if they are those of a model.

    Raises:
        ValueError: if they are not.
    """
    if not isinstance(params, dict) or any(name not in params for name in NAMES):
        got = sorted(params) if isinstance(params, dict) else params
        raise ValueError(
            "`params` must be a dict with the keys prior, likelihood and posterior, such as "
            f"`vae.init(key)`; got {got!r}."
        )
    return params
