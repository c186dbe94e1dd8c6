"""Fitting a latent-variable model to data, and what a fit hands back."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from flowvi import checks, plotting
from flowvi.checks import require
from flowvi.compiling import compiled
from flowvi.densities.data import check_weights
from flowvi.families import as_array, check_key
from flowvi.objectives import Variational
from flowvi.objectives.variational import Params
from flowvi.params import Array, PerRow, PyTree, is_per_row
from flowvi.training import Fitted, TrainingOptions, check_names, fit
from flowvi.training.sources import check_batch_size
from flowvi.vae.enumeration import exact_posterior, log_marginal
from flowvi.vae.families import NAMES, Rows, own_params
from flowvi.vae.losses import weights_of
from flowvi.vae.model import VAE, check_vae

P = ParamSpec("P")
R = TypeVar("R")

#: Validations over the length of a fit, and rows of a batch, where there are as many.
VALIDATIONS, BATCH_SIZE = 50, 128
#: Steps: so many epochs, but within these bounds.
EPOCHS, MIN_STEPS, MAX_STEPS = 100, 1_000, 50_000
#: The learning rate at its peak, relative to the size that parameters start with; the part of the
#: steps over which it rises, and how many they are at most.
LEARNING_RATE, RISE, MOST_RISE = 2e-2, 0.1, 500
#: How many times faster than others parameters per row move. They are what an encoder would say of
#: a row, and what it says moves faster than each of its many weights.
ROW_SPEED = 5.0


def _fitted(
    function: Callable[Concatenate[Any, Params, P], R],
) -> Callable[Concatenate["FittedVAE", P], R]:
    """A function of a model and its parameters, as a method of `FittedVAE`."""

    @functools.wraps(function)
    def method(self: "FittedVAE", *args: P.args, **kwargs: P.kwargs) -> R:
        return function(self.vae, self.params, *args, **kwargs)

    # As editors and `help` show it: without the model and its parameters.
    signature = inspect.signature(function)
    owner, _, *rest = signature.parameters.values()
    method.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[owner.replace(name="self", annotation=inspect.Parameter.empty), *rest]
    )
    lines = (method.__doc__ or "").splitlines(keepends=True)
    own = ("vae: a", "params: the parameters", "params: its parameters")
    method.__doc__ = "".join(line for line in lines if not line.strip().startswith(own))
    return cast(Callable[Concatenate["FittedVAE", P], R], method)


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class FittedVAE(Fitted):
    """A model that was fitted: the methods of `VAE`, at the parameters that were learned.

    Attributes:
        vae: the model.
        result: the parameters, the history, and why training ended.
    """

    vae: VAE

    sample = _fitted(VAE.sample)
    sample_given = _fitted(VAE.sample_given)
    encode = _fitted(VAE.encode)
    classify = _fitted(VAE.classify)
    decode = _fitted(VAE.decode)
    reconstruct = _fitted(VAE.reconstruct)
    evaluate = _fitted(VAE.evaluate)
    elbo = _fitted(VAE.elbo)
    rate_and_distortion = _fitted(VAE.rate_and_distortion)
    log_likelihood = _fitted(VAE.log_likelihood)
    log_weights = _fitted(VAE.log_weights)
    log_joint = _fitted(VAE.log_joint)
    prior_bound = _fitted(VAE.prior_bound)
    log_marginal = _fitted(log_marginal)
    exact_posterior = _fitted(exact_posterior)

    plot_samples = _fitted(plotting.prior_samples)
    plot_reconstructions = _fitted(plotting.reconstructions)
    plot_latent_space = _fitted(plotting.latent_space)
    plot_manifold = _fitted(plotting.manifold)

    def plot(self) -> Any:
        """ELBO, distortion and rate over the steps: a matplotlib figure."""
        return plotting.curves(self.result)

    def __repr__(self) -> str:
        shapes = f"event_shape={self.vae.event_shape}, latent_shape={self.vae.latent_shape}"
        return f"FittedVAE({shapes}, {self.result.summary()})"


def fit_vae(
    vae: VAE,
    x: ArrayLike,
    *,
    key: Array,
    context: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    objective: Variational | None = None,
    params: Params | None = None,
    validation_data: ArrayLike | None = None,
    validation_context: ArrayLike | None = None,
    validation_samples: int = 1,
    validate_every: int | None = None,
    patience: int | None = None,
    **options: Unpack[TrainingOptions],
) -> FittedVAE:
    """Fits prior, likelihood and posterior of a model together.

    Maximises the ELBO, a mean over rows, or another objective. The history holds "loss", and with
    the ELBO "rate" and "distortion", for each step; and for each validation "validation", minus
    the ELBO, and "validation_rate", "validation_distortion" and, of several draws,
    "validation_log_likelihood".

    Args:
        vae: the model.
        x: array of shape [num_rows, *event_shape]; an `np.memmap` may be larger than memory. Where
            each row has its own posterior, x[i] is row i.
        key: a random key.
        context: array of shape [num_rows, *context_shape]: the covariates, where the model takes
            them; or, with a posterior by `fv.labelled`, a class for each row, -1 where missing.
        weights: array of shape [num_rows] of how much each row counts, None for equally. Only their
            ratios matter.
        objective: what `vae.loss` returns; by default `vae.loss()`, the ELBO of one draw, with the
            KL divergence in closed form where it has one.
        params: parameters to start from, such as an earlier result's.
        validation_data: rows that are not trained on, of any number. With them the result holds
            the parameters with their highest ELBO.
        validation_context: their covariates.
        validation_samples: draws of each row in a validation.
        validate_every: steps between two validations; by default there are 50.
        patience: end training when so many validations in a row brought no new best.
        **options: see `TrainingOptions`. `num_steps` makes 100 epochs by default, but at least 1000
            and at most 50,000; `batch_size` is 128, or all rows if there are fewer. `optimizer` is
            Adam by default, with steps relative to the size that parameters start with, whose
            learning rate rises over the first steps to 0.02, or to 0.1 for parameters per row, and
            falls to zero with the last. `optax.multi_transform` over the keys of the parameters
            gives each family its own.

    Returns:
        A `FittedVAE`: the methods of `vae` at the parameters that were learned, and the history.

    Raises:
        TypeError: if the model, the objective or an option is none.
        ValueError: if rows are not events of the model, or a number is not positive.

    Source: Kingma, Welling, "Auto-Encoding Variational Bayes", 2014.

    Example:
        >>> import jax, flowvi as fv
        >>> from flowvi.networks import MLP
        >>> x = jax.random.bernoulli(jax.random.key(0), 0.3, (100, 8))
        >>> vae = fv.VAE(
        ...     prior=fv.standard_normal(2),
        ...     likelihood=fv.conditional(fv.bernoulli(8), MLP(2, (16,), 8)),
        ...     posterior=fv.conditional(fv.gaussian(2), MLP(8, (16,), 4)),
        ... )
        >>> fitted = fv.fit_vae(vae, x, key=jax.random.key(1), num_steps=50, progress=False)
        >>> fitted.sample(jax.random.key(2), 10).shape, fitted.elbo(jax.random.key(3), x).shape
        ((10, 8), (100,))
        >>> options = {"key": jax.random.key(4), "num_steps": 5, "progress": False}
        >>> fv.fit_rows(vae, fitted.params, x[:10], **options).elbo(jax.random.key(5), x[:10]).shape
        (10,)
    """
    check_vae(vae)
    check_key(key)
    check_names(options)
    data = check_data(vae, x, context)
    x = data["x"]
    if (batch_size := options.get("batch_size")) is None:
        batch_size = min(BATCH_SIZE, len(x))
    options["batch_size"] = batch_size = check_batch_size(batch_size, len(x)) or len(x)
    if (num_steps := options.get("num_steps")) is None:
        num_steps = int(np.clip(EPOCHS * len(x) // batch_size, MIN_STEPS, MAX_STEPS))
    options["num_steps"] = num_steps = checks.positive_int("num_steps", num_steps)
    loss_fn = vae.loss() if objective is None else objective
    is_own = isinstance(loss_fn, Variational) and loss_fn.family == vae.posterior
    rule = "`objective` must be what `vae.loss(...)` of this model returns"
    require(is_own, rule, objective, error=TypeError)
    if vae.is_unamortized:
        data["row"] = rows = jnp.arange(len(x), dtype=jnp.int32)
        vae.posterior.check_context(rows)
    if (counts := check_weights(weights, len(x))) is not None:
        # Of mean 1, so that they keep the scale of the loss.
        data["weight"] = (counts / counts.mean()).astype(jnp.result_type(float))
        loss_fn = dataclasses.replace(loss_fn, row_weights=weights_of)
    init_key, objective_key, fit_key = jax.random.split(key, 3)
    params = vae.init(init_key) if params is None else params
    own_params(vae, params)
    num_samples = checks.positive_int("validation_samples", validation_samples)
    held = None
    rule = "`validation_context` must be None without `validation_data`"
    has_data = validation_data is not None or validation_context is None
    require(has_data, rule, validation_context, say=checks.shown)
    if validation_data is not None:
        rule = "`validation_data` must be None where each row has its own posterior"
        fix = "Perhaps fit those rows by `fv.fit_rows`, afterwards?"
        require(not vae.is_unamortized, rule, vae.posterior, fix)
        names = ("validation_data", "validation_context")
        held = check_data(vae, validation_data, validation_context, names)
        validate_every = validate_every or max(num_steps // VALIDATIONS, 1)
    options["optimizer"] = options.get("optimizer") or default_optimizer(num_steps)
    result = fit(
        loss_fn,
        _with_state(params, state_beside(loss_fn, objective_key)),
        key=fit_key,
        data=data,
        validate=None if held is None else Validation(vae, num_samples),
        validation_data=held,
        validate_every=validate_every,
        patience=patience,
        # The default schedule and the moments of validations depend on the number of steps.
        configuration={"num_steps": str(num_steps)},
        **options,
    )
    return FittedVAE(result=result, vae=vae)


@dataclasses.dataclass(frozen=True)
class Validation:
    """Minus the ELBO of validation rows, as a loss; rate, distortion, log likelihood as metrics."""

    vae: VAE
    num_samples: int = 1

    def __call__(self, params: Params, key: Array, rows: Rows) -> tuple[Array, dict[str, Array]]:
        context = rows.get("context")
        found = self.vae.evaluate(params, key, rows["x"], self.num_samples, context=context)
        metrics = {"rate": jnp.mean(found.rate), "distortion": jnp.mean(found.distortion)}
        if self.num_samples > 1:
            metrics["log_likelihood"] = jnp.mean(found.log_likelihood)
        return -jnp.mean(found.elbo), metrics


@compiled()
def state_beside(loss_fn: Variational, key: Array) -> Params:
    """What an objective needs beside the model's parameters."""
    made = loss_fn.init(key)
    return {name: made[name] for name in made if name != "posterior"}


def _with_state(params: Params, fresh: Params) -> Params:
    """The model's parameters and the state of an objective; that of an earlier fit if it is one."""
    state = {}
    for name, new in fresh.items():
        structures = {str(jax.tree.structure(tree)) for tree in (params.get(name), new)}
        state[name] = params[name] if len(structures) == 1 else new
    return {**{name: params[name] for name in NAMES}, **state}


def check_data(
    vae: VAE,
    x: ArrayLike,
    context: ArrayLike | None,
    names: tuple[str, str] = ("x", "context"),
) -> Rows:
    """Rows of the model's events, inside of the likelihood's support, and of its context."""
    name, name_of_context = names
    x = as_array(name, x)
    fits = x.ndim > 0 and x.shape[1:] == vae.event_shape and len(x)
    axes = ", ".join(map(str, ("num_rows", *vae.event_shape)))
    rule = f"`{name}` must have at least one row, and shape [{axes}] for {vae.likelihood!r}"
    require(fits, rule, f"shape {x.shape}", say=str)
    x = x.astype(np.uint8) if x.dtype == bool else x
    vae.likelihood.check_support(x, name)
    if (rows := vae.check_context(context, name=name_of_context)) is None:
        return {"x": x}
    shape = (len(x), *vae.shapes["context"])
    rule = f"`{name_of_context}` must have shape {shape}, a row for each of `{name}`"
    require(rows.shape == shape, rule, rows.shape)
    return {"x": x, "context": rows}


def scale_by_start() -> optax.GradientTransformation:
    """Multiplies the updates of each leaf by the root mean square that it started with."""
    # Networks of different libraries keep the same function in weights of size 1, divided by the
    # root of the fan-in when they are used, or in weights of that smaller size; so they learn
    # alike. A leaf that starts at zero, as biases do, is taken for one of size 1.

    def of(node: PyTree) -> PyTree:
        if not is_per_row(node):
            square = jnp.mean(jnp.square(node))
            return jnp.sqrt(jnp.where(square > 0, square, 1))
        return PerRow(jax.tree.map(lambda leaf: jnp.asarray(ROW_SPEED, leaf.dtype), node.value))

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        return jax.tree.map(jnp.multiply, updates, state), state

    init = functools.partial(jax.tree.map, of, is_leaf=is_per_row)
    return optax.GradientTransformation(init, update)


# The same object for the same length, so that a second fit compiles nothing.
@functools.lru_cache(maxsize=64)
def default_optimizer(num_steps: int) -> optax.GradientTransformation:
    """Adam relative to the parameters' size at start; a warm-up, and a cosine decay to zero."""
    rise = min(int(RISE * num_steps), MOST_RISE)
    rate = optax.warmup_cosine_decay_schedule(LEARNING_RATE / 10, LEARNING_RATE, rise, num_steps)
    return optax.chain(optax.scale_by_adam(), scale_by_start(), optax.scale_by_learning_rate(rate))
