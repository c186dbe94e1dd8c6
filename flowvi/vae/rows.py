"""Posteriors of single rows against a frozen model: new rows, and what amortization costs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, Unpack, cast

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from flowvi import checks
from flowvi.checks import require
from flowvi.compiling import compiled
from flowvi.families import Conditional, Family, Local, Wrapper, as_array, check_key, local
from flowvi.families.family import Composed
from flowvi.objectives import ELBO, ScoreFunction, Variational
from flowvi.objectives.variational import Batch, Output, Params
from flowvi.params import Array, Fixed, PyTree
from flowvi.training import TrainingOptions, check_names, fit
from flowvi.vae.evaluation import Chunks, over_rows
from flowvi.vae.families import NAMES, Rows, own_params
from flowvi.vae.fit import BATCH_SIZE, FittedVAE, check_data, state_beside
from flowvi.vae.model import VAE, check_vae

#: Steps of each row, their learning rate at first, and draws in a step.
STEPS, LEARNING_RATE, DRAWS = 500, 0.1, 8


def fit_rows(
    vae: VAE,
    params: Params,
    x: ArrayLike,
    *,
    key: Array,
    context: ArrayLike | None = None,
    objective: Callable[[VAE], Variational] | None = None,
    **options: Unpack[TrainingOptions],
) -> FittedVAE:
    """Fits to each row of x a posterior of its own, against the frozen model.

        phi_i = argmax ELBO(x_i; phi_i)

    With an encoder the rows begin where it puts them, which is semi-amortized inference: what it
    leaves to be gained is the amortization gap. With a posterior of `fv.local` the rows of x are
    new, and begin as rows do: this is how rows that the model was not fitted to are inferred.

    What moves is the context of the posterior's inner family, row by row: all its parameters, of a
    normal; of a flow, what the encoder tells it, and not its layers. Prior and likelihood are in
    their evaluation form and do not move.

    Args:
        vae: the model; its posterior is one of `fv.conditional` or `fv.local`.
        params: its parameters.
        x: array of shape [num_rows, *event_shape].
        key: a random key.
        context: array of shape [num_rows, *context_shape], where the model takes one.
        objective: a function from the model in which each row has its own posterior to a loss of
            it; by default the ELBO of 8 draws, or `ScoreFunction` where draws carry no gradients.
        **options: see `TrainingOptions`. `num_steps` are those of each row, 500 by default, and
            `batch_size` is 128 by default, or all rows if there are fewer. `optimizer` sees each
            row for itself; by default it is Adam, whose learning rate falls from 0.1 to zero.

    Returns:
        A `FittedVAE` of the same prior and likelihood, and a posterior by `fv.local` in which x[i]
        is row i.

    Raises:
        TypeError: if an option is unknown.
        ValueError: if a number is not positive, or rows are not events of the model.

    Source: Kim, Wiseman, Miller, Sontag, Rush, "Semi-Amortized Variational Autoencoders", 2018.

    Example:
        >>> import jax, jax.numpy as jnp, flowvi as fv
        >>> from flowvi.networks import MLP
        >>> vae = fv.VAE(
        ...     prior=fv.standard_normal(2),
        ...     likelihood=fv.conditional(fv.bernoulli(8), MLP(2, (16,), 8)),
        ...     posterior=fv.local(fv.gaussian(2), 20),
        ... )
        >>> params, x = vae.init(jax.random.key(0)), jnp.ones((5, 8))
        >>> rows = fv.fit_rows(vae, params, x, key=jax.random.key(1), num_steps=10, progress=False)
        >>> rows.stop_reason.value
        'max_steps'
    """
    check_vae(vae)
    check_key(key)
    check_names(options)
    num_steps = checks.positive_int("num_steps", options.get("num_steps", STEPS))
    params = own_params(vae, params)
    data = check_data(vae, x, context)
    x = data["x"]
    if (size := options.get("batch_size")) is None:
        size = BATCH_SIZE
    options["batch_size"] = batch_size = min(checks.positive_int("batch_size", size), len(x))
    begin_key, state_key, fit_key = jax.random.split(key, 3)
    own, start = begin_rows(vae, params, begin_key, data)
    prior, likelihood, posterior = (Evaluated(getattr(own, name)) for name in NAMES)
    training = VAE(prior, likelihood, posterior, own.context_shape)
    kind = ELBO if training.posterior.reparameterized else ScoreFunction
    loss_fn = objective(training) if objective else training.loss(kind, num_samples=DRAWS)
    options["num_steps"] = total = -(-num_steps * len(x) // batch_size)
    options["optimizer"] = options.get("optimizer") or default_optimizer(total)
    params = {**freeze(start), **state_beside(loss_fn, state_key)}
    data["row"] = np.arange(len(x), dtype=np.int32)
    result = fit(Frozen(loss_fn), params, key=fit_key, data=data, **options)
    learned, last = unfreeze(result.params), unfreeze(result.last_params)
    result = dataclasses.replace(result, params=learned, last_params=last)
    return FittedVAE(result=result, vae=own)


# The same object for the same length, so that a second fit compiles nothing.
@functools.lru_cache(maxsize=64)
def default_optimizer(num_steps: int) -> optax.GradientTransformation:
    """Adam with a cosine decay to zero, for parameters per row: they are of the size of latents."""
    # A row has few steps, over which its gradient shrinks by orders of magnitude; so its squares
    # are forgotten within a hundred steps.
    return optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, num_steps), b2=0.99)


def begin_rows(vae: VAE, params: Params, key: Array, data: Rows) -> tuple[VAE, Params]:
    """The model in which each row of the data has its own posterior, and where that begins."""
    old, shared = vae.posterior, params["posterior"]
    if not isinstance(old, Conditional | Local):
        rule = "`vae` must have a posterior by `fv.conditional` or `fv.local`"
        raise TypeError(f"{rule}; got {old!r}.")
    posterior, is_new = local(old.family, len(data["x"])), isinstance(old, Local)
    rows = posterior.init(key)["rows"].value if is_new else _features(vae, shared, data)
    begun = {**own_params(vae, params), "posterior": posterior.with_rows(shared, rows)}
    return dataclasses.replace(vae, posterior=posterior), begun


@compiled()
def _features(vae: VAE, params: Params, data: Rows) -> PyTree:
    """What the encoder says of each row."""

    def of_row(row: Rows) -> PyTree:
        return cast(Composed, vae.posterior).features(params, vae.seen("posterior", row))

    return over_rows(of_row, (data,), Chunks(1))


def _all_but_rows(function: Callable[[PyTree], PyTree], params: Params) -> Params:
    own = {**params["posterior"], "family": function(params["posterior"]["family"])}
    model = {name: function(params[name]) for name in ("prior", "likelihood")}
    return {**params, **model, "posterior": own}


#: Parameters of which nothing but the rows can move, and the inverse.
freeze = functools.partial(_all_but_rows, Fixed)
unfreeze = functools.partial(_all_but_rows, lambda fixed: fixed.value)


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A loss of a model over parameters that `freeze` has made."""

    loss_fn: Variational

    def __call__(self, params: Params, key: Array, batch: Batch) -> Output:
        output = self.loss_fn(unfreeze(params), key, batch)
        if not isinstance(output, tuple) or len(output) < 3:
            return output
        return *output[:2], freeze(output[2])


@dataclasses.dataclass(frozen=True)
class Evaluated(Wrapper):
    """A family whose training form is that of evaluation: without dropout, and nothing moves."""

    family: Family

    def owns(self, family: Family) -> bool:
        return super().owns(family) or self.family.owns(family)

    def init(self, key: Array) -> PyTree:
        return self.family.init(key)

    def distribution(self, params: PyTree, context: Array | None = None) -> distrax.Distribution:
        return self.family.distribution(params, context)


class AmortizationGap(NamedTuple):
    """Bounds of log p(x) of each row, in nats: arrays of shape [num_rows].

        log p(x) - encoder = (log p(x) - refined) + (refined - encoder)
        inference gap      = approximation gap    + amortization gap

    Attributes:
        encoder: the ELBO of the encoder's posterior.
        refined: that of the row's own posterior, never below `encoder`: a row that its steps did
            not make better keeps what the encoder said.
        importance_weighted: log (1/K sum_k p(x, z_k) / q(z_k | x)) of the refined posterior, in
            expectation at most log p(x); None of a single draw, where it is the ELBO.
        rows: the model with the refined posteriors.
    """

    encoder: Array
    refined: Array
    importance_weighted: Array | None
    rows: FittedVAE

    @property
    def amortization(self) -> Array:
        """refined - encoder, at least 0: what the encoder loses to the best of its family."""
        return self.refined - self.encoder

    @property
    def approximation(self) -> Array | None:
        """importance_weighted - refined: what the family loses, about."""
        bound = self.importance_weighted
        return None if bound is None else bound - self.refined

    @property
    def inference(self) -> Array | None:
        """importance_weighted - encoder: the sum of the two."""
        bound = self.importance_weighted
        return None if bound is None else bound - self.encoder


def amortization_gap(
    vae: VAE,
    params: Params,
    x: ArrayLike,
    *,
    key: Array,
    context: ArrayLike | None = None,
    num_samples: int = 1000,
    objective: Callable[[VAE], Variational] | None = None,
    **options: Unpack[TrainingOptions],
) -> AmortizationGap:
    """How much better each row's own posterior is than the encoder's.

    The rows begin where the encoder puts them and are refined by `fit_rows`. Both are evaluated on
    the same noise, and of each row the better one counts: so the gap is at least 0, and that of a
    row which has nothing to gain is 0 or, by chance, a little above.

    Args:
        vae: the model; its posterior is one of `fv.conditional`.
        params: its parameters.
        x: array of shape [num_rows, *event_shape]; rows the model was not fitted to tell more.
        key: a random key.
        context: as in `fit_rows`.
        num_samples: K, draws of each row in the evaluation.
        objective: as in `fit_rows`, as are `**options`.
        **options: see there.

    Raises:
        TypeError: if the posterior is not `fv.conditional`, or an option is unknown.
        ValueError: if a number is not positive, or rows are not events of the model.

    Source: Cremer, Li, Duvenaud, "Inference Suboptimality in Variational Autoencoders", 2018.

    Example:
        >>> import jax, jax.numpy as jnp, flowvi as fv
        >>> from flowvi.networks import MLP
        >>> vae = fv.VAE(
        ...     prior=fv.standard_normal(2),
        ...     likelihood=fv.conditional(fv.bernoulli(8), MLP(2, (16,), 8)),
        ...     posterior=fv.conditional(fv.gaussian(2), MLP(8, (16,), 4)),
        ... )
        >>> params, x = vae.init(jax.random.key(0)), jnp.ones((5, 8))
        >>> gap = fv.amortization_gap(
        ...     vae, params, x, key=jax.random.key(1), num_steps=10, progress=False
        ... )
        >>> gap.amortization.shape
        (5,)
    """
    check_vae(vae)
    rule, old = "`vae` must have an encoder, a posterior by `fv.conditional`", vae.posterior
    require(isinstance(old, Conditional), rule, old, error=TypeError)
    num_samples = checks.positive_int("num_samples", num_samples)
    fit_key, key = jax.random.split(key)
    x = as_array("x", x)
    found = fit_rows(vae, params, x, key=fit_key, context=context, objective=objective, **options)
    encoder = vae.evaluate(params, key, x, num_samples, context=context)
    refined = found.evaluate(key, x, num_samples, context=context)
    better = refined.elbo > encoder.elbo
    weighted = jnp.where(better, refined.log_likelihood, encoder.log_likelihood)
    # A row that did not get better keeps what the encoder said.
    _, start = begin_rows(vae, params, key, check_data(vae, x, context))
    rows = jax.tree.map(
        lambda new, old: jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old),
        found.params["posterior"]["rows"],
        start["posterior"]["rows"],
    )
    posterior = {**found.params["posterior"], "rows": rows}
    kept = dataclasses.replace(found.result, params={**found.params, "posterior": posterior})
    return AmortizationGap(
        encoder=encoder.elbo,
        refined=jnp.where(better, refined.elbo, encoder.elbo),
        importance_weighted=weighted if num_samples > 1 else None,
        rows=dataclasses.replace(found, result=kept),
    )
