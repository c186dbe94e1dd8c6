"""The default recipe: from a log density to a posterior, with no settings needed."""

import dataclasses
import time
from typing import Any, Unpack

import jax

from flowvi import checks
from flowvi.families import (
    Family,
    check_key,
)
from flowvi.params import Array
from flowvi.posteriors.diagnosis import (
    Cost,
    diagnose,
    warnings_of_fit,
)
from flowvi.posteriors.posterior import Posterior, draws
from flowvi.posteriors.stages import Objective, Stages
from flowvi.posteriors.start import find
from flowvi.posteriors.target import Target, Theta
from flowvi.training import TrainingOptions, check_names


def fit_posterior(
    target: Target,
    *,
    key: Array,
    family: Family | None = None,
    objective: Objective | None = None,
    num_samples: int | None = None,
    start: Theta | None = None,
    tempering: float | None = None,
    max_gradients: int | None = None,
    max_seconds: float | None = None,
    **options: Unpack[TrainingOptions],
) -> Posterior:
    """Fits a posterior to a log density, with no settings needed.

    1. The start is the best, by ELBO, of many normal distributions along paths of L-BFGS, improved
       by variational Newton steps where the target can be differentiated twice.
    2. Where that start is more than 0.05 nats from the log evidence, annealed particles around it
       are asked, for up to 16 coordinates, whether coordinates follow others along parabolas, or
       have scales that do so exponentially. If so a map that does is drawn through them, anew
       while the evidence rises, and the flow is fitted before that map, for 2000 steps of 64 draws:
       a thin ridge, or a funnel, becomes a normal.
    3. Without one, or if it is more than 0.01 nats from the log evidence, a flow that begins as the
       identity, before the start's affine map, is fitted by path gradients of the ELBO until that
       stops improving. Up to 10 coordinates the draws come from a base 1.3 times as wide, so that
       tails are fitted with the rest; beyond 200 the flow is a map of each marginal after the
       affine map. All but the flow's networks keeps JAX's precision.
    4. The better one of start and fit, by ELBO on the same draws, is taken. Where its k-hat is
       above 0.3, a base up to 4 % wider is tried, for at most 0.005 nats.
    5. Of up to 200,000 draws those of the largest weights begin runs of L-BFGS: they lie on the
       slopes of narrow modes. Particles that begin in the fit and in wider ones, up to 24 times,
       are led to the density by annealed sequential Monte Carlo, whose moves leave the fit. If any
       of these finds other mass, moments or evidence, or the ELBO lies more than 0.05 nats below
       the log evidence, more is tried: particles from 50 standard deviations of the start and runs
       of L-BFGS from them look for modes; a mixture of normals is fitted to what they find, and a
       flow to each of its parts. If that is not right either, a flow whose marginals have tails of
       their own is fitted; or, of more than 10 coordinates with modes left out, one with
       `tempering=0.1`. The best by ELBO is taken.
    6. Importance weights of fresh draws make the diagnosis, and a `PosteriorWarning` where k-hat is
       above 0.7, the effective sample size below 0.2 of the draws, the standard error of the log
       evidence above 0.05, the ELBO more than 0.5 nats below the log evidence, or where particles
       as in step 5 still leave what was fitted.

    What neither a run of the optimiser nor a particle ever saw, nothing can tell of: a narrow mode
    in many coordinates is such a thing. In high dimension tails are lost slowly before any of these
    numbers moves. `posterior.refine` makes exact draws of what was found.

    Args:
        target: the target.
        key: a random key.
        family: any reparameterised family, in the units of the start; by default a flow of four
            autoregressive layers and a triangular map.
        objective: (family, log joint) -> a loss for `fit`, such as
            `functools.partial(fv.objectives.Renyi, alpha=0.5, num_samples=64)`; the ELBO with path
            gradients by default. If it has `init(key)`, that makes the parameters beside q's.
        num_samples: draws of a step, where `objective` is not given; by default 128 for up to 10
            coordinates, 96 for up to 50, 128 for up to 200, and 64 beyond; 512 with `tempering`.
        start: points to start from, in the user's space, with a leading axis if there are several;
            drawn around zero by default.
        tempering: the remedy for lost modes: an inverse temperature between 0 and 1, such as 0.1,
            at which the fit starts. It rises to 1 in the first 0.3 of the steps; the forward KL
            divergence, beside the ELBO, sets the modes' weights right.
        max_gradients: evaluations of the density with its gradient that the fit may take, nearly.
        max_seconds: seconds that they may take, by the price of one. Where it is above half a
            millisecond, 240 by default.
        options: those of `fit`. By default `num_steps` is 3000 for up to 10 coordinates, 2500 for
            up to 50, 1800 for up to 200 and 2000 beyond, and `optimizer` is Adam, with a learning
            rate that decays from 0.02 for up to 10 coordinates, from 0.05 for up to 200, and from
            0.005 beyond. With `tempering` or a `family` it is 0.005, or 0.01 between 10 and 50; so
            it is, with 1000 steps, where the ELBO of the default flow's start lies within 0.05 nats
            of the log evidence. `batch_size` rows are a subsample, where the target has a
            likelihood over rows.

    Raises:
        ValueError: if the log density is constant, nowhere finite, or rises without end.

    Source: Zhang, Carpenter, Gelman, Vehtari, "Pathfinder: Parallel Quasi-Newton Variational
    Inference", 2022; Roeder, Wu, Duvenaud, "Sticking the Landing", 2017; Yao, Vehtari, Simpson,
    Gelman, "Yes, but Did It Work?: Evaluating Variational Inference", 2018.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flowvi as fv
        >>> target = fv.Target(lambda u: -0.5 * jnp.sum((u - 3.0) ** 2), 1)
        >>> posterior = fv.fit_posterior(
        ...     target, key=jax.random.key(0), family=fv.mean_field(1), num_steps=10, progress=False
        ... )
        >>> bool(abs(posterior.sample(jax.random.key(1), 10_000).mean() - 3.0) < 0.1)
        True
    """
    began = time.perf_counter()
    check_key(key)
    _check_options(target, family, objective, tempering, options)
    if max_gradients is not None:
        checks.positive_int("max_gradients", max_gradients)
    if max_seconds is not None:
        is_positive = isinstance(max_seconds, int | float) and max_seconds > 0
        checks.require(is_positive, "`max_seconds` must be None or positive", max_seconds)
    target.check()
    start_key, *keys = jax.random.split(key, 7)
    stages = Stages(target, family, objective, num_samples, tempering, options, *keys)
    found = find(target, start_key, start, tempering or 1.0, stages.family.rank)
    stages.plan(found, max_gradients, max_seconds)
    fitted, found = stages.best(found)
    stages.cost += Cost(found.search.num_gradients, found.search.num_evaluations)
    diagnosis = diagnose(draws(fitted.family, target, fitted.params, stages.final_key)[2])
    left = stages.left(fitted, diagnosis)
    messages = [
        *warnings_of_fit(target, found.start, fitted.result),
        *left.messages(target.labels()),
        *stages.missing(fitted, found),
    ]
    seconds = time.perf_counter() - began
    cost = dataclasses.replace(stages.cost, seconds=seconds)
    diagnosis = dataclasses.replace(diagnosis.warn(messages, stacklevel=2), cost=cost)
    return Posterior(
        result=dataclasses.replace(fitted.result, params=fitted.params),
        target=target,
        family=fitted.family,
        start=found.start,
        diagnosis=diagnosis,
    )


def _check_options(
    target: Any, family: Any, objective: object, tempering: object, options: TrainingOptions
) -> None:
    rule = "`target` must be a target, such as `fv.Target(log_density, 2)`"
    checks.require(isinstance(target, Target), rule, target, error=TypeError)
    check_names(options)
    if family is not None:
        rule = "`family` must be a family, such as `fv.iaf(2)`"
        checks.require(isinstance(family, Family), rule, family, error=TypeError)
        shape = (target.event_size,)
        rule = f"`family` must have event shape {shape}, that of the target's vector"
        checks.require(family.event_shape == shape, rule, family.event_shape)
        is_free = family.context_shape is None
        checks.require(is_free, "`family` must take no context", family)
    is_function = objective is None or callable(objective)
    rule = "`objective` must be a function (family, log_joint) -> loss, such as "
    checks.require(is_function, f"{rule}`fv.objectives.IWELBO`", objective, error=TypeError)
    if options.get("num_steps") is not None:
        checks.positive_int("num_steps", options["num_steps"])
    batch_size = options.get("batch_size")
    rule = "`batch_size` must be None for a target without rows of data"
    fix = "Perhaps make it with `fv.Target.from_likelihood`?"
    checks.require(batch_size is None or target.data is not None, rule, batch_size, fix)
    is_power = isinstance(tempering, int | float) and 0 < tempering < 1
    rule = "`tempering` must be None or between 0 and 1"
    checks.require(tempering is None or is_power, rule, tempering)
    if tempering is not None and objective is not None:
        raise ValueError("`tempering` must be None where `objective` is given; got both.")
