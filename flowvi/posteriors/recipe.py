"""The default recipe: from a log density to a posterior, with no settings needed."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flowvi import checks
from flowvi.families import Family, Flow, iaf
from flowvi.families.normal import LocationScale, LocationTriangular
from flowvi.families.whitened import Whitened, whitened
from flowvi.objectives import ELBO
from flowvi.posteriors import diagnosis as diagnoses
from flowvi.posteriors.posterior import Posterior, draws
from flowvi.posteriors.start import ANY_HESSIAN, Start, find
from flowvi.posteriors.target import Target
from flowvi.training import FitResult, fit
from flowvi.training.loop import check_key
from flowvi.training.result import Look

Array = jax.Array

#: Steps, draws of a step, learning rate, bound on the gradient's norm.
NUM_STEPS, NUM_SAMPLES, LEARNING_RATE, MAX_NORM = 4_000, 256, 5e-3, 10.0

#: Up to this size the map after the flow's layers is a full triangular matrix.
TRIANGULAR = 200

#: Directions of the low-rank start.
RANK = 20

#: Draws that choose between the start and the fit, and that make the diagnosis.
NUM_CHOICE, NUM_DIAGNOSIS = 4_000, 10_000


def default_family(event_size: int) -> Flow:
    """The flow that is fitted by default, in the units of the start.

    Autoregressive layers that sample in one pass, and an affine map after them.
    """
    size = checks.positive_int("event_size", event_size)
    layers = iaf(size, num_layers=4, hidden_sizes=(64, 64), transformer="affine")
    last = LocationTriangular(size) if size <= TRIANGULAR else LocationScale(size)
    return Flow(layers, last)


@functools.lru_cache(maxsize=64)
def default_optimizer(num_steps: int) -> optax.GradientTransformation:
    """Adam with clipped gradients and a cosine decay."""
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, num_steps, 0.01)
    return optax.chain(optax.clip_by_global_norm(MAX_NORM), optax.adam(schedule))


def fit_posterior(
    target: Target,
    *,
    key: Array,
    family: Family | None = None,
    objective: Callable[[Family, Any], Any] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    num_steps: int = NUM_STEPS,
    num_samples: int = NUM_SAMPLES,
    batch_size: int | None = None,
    start: Any = None,
    progress: bool = True,
    callback: Callable[[Look], bool | None] | None = None,
) -> Posterior:
    """Fits a posterior to a log density."""
    if not isinstance(target, Target):
        raise TypeError(
            f"`target` must be a `Target`, such as `fv.Target(log_density, 2)`; got {target!r}."
        )
    check_key(key)
    target.check()
    size = target.event_size
    inner = default_family(size) if family is None else family
    if not isinstance(inner, Family):
        raise TypeError(f"`family` must be a family, such as `fv.iaf({size})`; got {family!r}.")
    rank = None if size <= ANY_HESSIAN else min(RANK, size)
    placed = whitened(inner, rank=rank)
    start_key, init_key, fit_key, choice_key, final_key = jax.random.split(key, 5)
    found = find(target, start_key, start, rank=rank)
    params = _init(placed, init_key, found)
    loss_fn = (
        ELBO(placed, target.log_joint, num_samples=num_samples, path=True, skip_nonfinite=True)
        if objective is None
        else objective(placed, target.log_joint)
    )
    result = fit(
        loss_fn,
        {"posterior": params},
        default_optimizer(num_steps) if optimizer is None else optimizer,
        key=fit_key,
        num_steps=num_steps,
        data=target.data,
        batch_size=batch_size,
        max_bad_steps=num_steps,
        progress=progress,
        callback=callback,
    )
    params = _better(placed, target, params, result.params["posterior"], choice_key)
    weights = draws(placed, target, params, final_key, NUM_DIAGNOSIS)[2]
    diagnosis = diagnoses.diagnose(weights, _remarks(target, found, result))
    diagnoses.warn(diagnosis, stacklevel=2)
    return Posterior(target, placed, params, result, found, diagnosis)


def _init(placed: Whitened, key: Array, found: Start) -> Any:
    return placed.place(_fresh(placed, key), found.whitening)


@functools.partial(jax.jit, static_argnums=0)
def _fresh(family: Family, key: Array) -> Any:
    return family.init(key)


def _better(family: Family, target: Target, first: Any, second: Any, key: Array) -> Any:
    """The parameters of larger ELBO, from the same draws."""
    scores = []
    for params in (first, second):
        weights = draws(family, target, params, key, NUM_CHOICE)[2]
        good = np.isfinite(weights)
        scores.append(weights[good].mean() if good.mean() > 0.5 else -np.inf)
    return second if scores[1] > scores[0] else first


def _remarks(target: Target, found: Start, result: FitResult) -> list[str]:
    del target, found, result
    return []
