"""Posteriors of single rows against a model that is held fixed: new rows, and refinement."""

import dataclasses
from typing import Any, NamedTuple

import distrax
import jax
import numpy as np
import optax

from flowvi import checks
from flowvi.compiling import compiled
from flowvi.families import Conditional, Family, Local, Wrapper, local
from flowvi.objectives import ELBO, ScoreFunction, Variational
from flowvi.params import Fixed
from flowvi.training import FitResult, fit
from flowvi.training.arguments import check_key
from flowvi.vae.batches import as_float
from flowvi.vae.defaults import BATCH_SIZE, ROW_DRAWS, ROW_STEPS, row_optimizer
from flowvi.vae.evaluation import over_rows
from flowvi.vae.fit import check_data, check_params, state_beside
from flowvi.vae.model import VAE

Array = jax.Array
Params = dict[str, Any]


class FittedRows(NamedTuple):
    """A model in which each row has its own posterior.

    Attributes:
        vae: the same prior and likelihood, and a posterior by `fv.local` in which x[i] is row i.
        params: its parameters; those of prior and likelihood are as they were.
        result: what `fit` returned: the history, and why it ended.
    """

    vae: VAE
    params: Params
    result: FitResult


def fit_rows(
    vae: VAE,
    params: Params,
    x: Any,
    *,
    key: Array,
    num_steps: int = ROW_STEPS,
    batch_size: int | None = None,
    objective: type[Variational] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    progress: bool = True,
    **options: Any,
) -> FittedRows:
    """Fits to each row of x a posterior of its own, against the model held fixed.

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
        num_steps: steps of each row.
        batch_size: rows of a step; 128 by default, or all if there are fewer.
        objective: as in `VAE.loss`, with its options; by default the ELBO of 8 draws, or
            `ScoreFunction` where draws carry no gradients.
        optimizer: an Optax optimizer, which sees each row for itself. By default Adam, whose
            learning rate falls from 0.1 to zero.
        progress: whether to show progress on standard error.
        **options: of the objective.

    Returns:
        A `FittedRows`, whose model takes the same x, row by row.

    Raises:
        TypeError: if an argument is of the wrong kind, or the posterior is neither amortized by a
            network nor local.
        ValueError: if shapes disagree, or data are outside of the likelihood's support.
        TrainingDiverged: as in `fit`.

    Source: Kim, Wiseman, Miller, Sontag, Rush, "Semi-Amortized Variational Autoencoders", 2018.

    Example:
        >>> import jax
        >>> import flowvi as fv
        >>> from flowvi.networks import MLP
        >>> x = jax.random.normal(jax.random.key(0), (60, 4))
        >>> vae = fv.VAE(
        ...     prior=fv.standard_normal(1),
        ...     likelihood=fv.conditional(fv.gaussian(4), MLP(1, (), 8)),
        ...     posterior=fv.local(fv.gaussian(1), 50),
        ... )
        >>> params = fv.fit_vae(
        ...     vae, x[:50], key=jax.random.key(1), num_steps=50, progress=False
        ... ).params
        >>> new = fv.fit_rows(
        ...     vae, params, x[50:], key=jax.random.key(2), num_steps=50, progress=False
        ... )
        >>> new.vae.elbo(new.params, jax.random.key(3), x[50:], 10).shape
        (10,)
    """
    if not isinstance(vae, VAE):
        raise TypeError(f"`vae` must be a `fv.VAE(...)`; got {vae!r}.")
    check_key(key)
    num_steps = checks.positive_int("num_steps", num_steps)
    params = check_params(params)
    x = check_data(vae, "x", x)
    batch_size = min(BATCH_SIZE, len(x)) if batch_size is None else batch_size
    batch_size = checks.positive_int("batch_size", batch_size)
    begin_key, state_key, fit_key = jax.random.split(key, 3)
    own, start = begin_rows(vae, params, begin_key, x)
    if objective is None:
        objective = ELBO if own.posterior.reparameterized else ScoreFunction
        options = {"num_samples": ROW_DRAWS, **options}
    loss_fn = Held(_evaluated(own).loss(objective, **options))
    total = -(-num_steps * len(x) // min(batch_size, len(x)))
    result = fit(
        loss_fn,
        {**held(start), **state_beside(loss_fn.loss_fn, state_key)},
        row_optimizer(total) if optimizer is None else optimizer,
        key=fit_key,
        num_steps=total,
        data={"x": x, "row": np.arange(len(x), dtype=np.int32)},
        batch_size=batch_size,
        progress=progress,
    )
    learned, last = released(result.params), released(result.last_params)
    result = dataclasses.replace(result, params=learned, last_params=last)
    return FittedRows(own, {name: learned[name] for name in start}, result)


def begin_rows(vae: VAE, params: Params, key: Array, x: Any) -> tuple[VAE, Params]:
    """The model in which each row of x has its own posterior, and where that begins.

    Raises:
        TypeError: if the posterior is of another kind.
    """
    old, shared = vae.posterior, params["posterior"]
    if not isinstance(old, Conditional | Local):
        raise TypeError(
            "`vae` must have a posterior by `fv.conditional` or `fv.local`, whose rows can be told "
            f"apart; got {old!r}."
        )
    posterior = local(old.family, len(x))
    if isinstance(old, Conditional):
        begun = posterior.with_rows(shared, _features(old, shared, x))
    else:
        begun = posterior.with_rows(shared, posterior.init(key)["rows"].value)
    return dataclasses.replace(vae, posterior=posterior), {
        "prior": params["prior"],
        "likelihood": params["likelihood"],
        "posterior": begun,
    }


@compiled()
def _features(posterior: Conditional, params: Params, x: Array) -> Any:
    """What the encoder says of each row."""
    return over_rows(lambda x: posterior.features(params, x), (as_float(x),), 1)


# ------------------------------------------------------------------------- the model held fixed


def held(params: Params) -> Params:
    """The parameters, of which nothing but the rows can move."""
    posterior = {**params["posterior"], "family": Fixed(params["posterior"]["family"])}
    fixed = {name: Fixed(params[name]) for name in ("prior", "likelihood")}
    return {**params, **fixed, "posterior": posterior}


def released(params: Params) -> Params:
    """The inverse of `held`."""
    posterior = {**params["posterior"], "family": params["posterior"]["family"].value}
    free = {name: params[name].value for name in ("prior", "likelihood")}
    return {**params, **free, "posterior": posterior}


@dataclasses.dataclass(frozen=True)
class Held:
    """A loss of a model over parameters that `held` has made."""

    loss_fn: Any

    def __call__(self, params: Params, key: Array, batch: Any) -> Any:
        """The loss, in the form that it has."""
        output = self.loss_fn(released(params), key, batch)
        if not isinstance(output, tuple) or len(output) < 3:
            return output
        return *output[:2], held(output[2])


@dataclasses.dataclass(frozen=True)
class Evaluated(Wrapper):
    """A family whose training form is that of evaluation: without dropout, and nothing moves."""

    family: Family

    def init(self, key: Array) -> Any:
        """Those of the inner family."""
        return self.family.init(key)

    def distribution(self, params: Any, context: Array | None = None) -> distrax.Distribution:
        """See `Family.distribution`."""
        return self.family.distribution(params, context)


def _evaluated(vae: VAE) -> VAE:
    return VAE(Evaluated(vae.prior), Evaluated(vae.likelihood), Evaluated(vae.posterior))
