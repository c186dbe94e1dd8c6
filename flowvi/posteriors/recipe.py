"""The default recipe: from a log density to a posterior, with no settings needed."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flowvi import checks
from flowvi.compiling import compiled
from flowvi.families import Family, Flow, Whitened, check_key, full_rank, iaf, mean_field, whitened
from flowvi.objectives import ELBO
from flowvi.params import Array, PyTree, cast
from flowvi.posteriors.diagnosis import Diagnosis, diagnose, warnings_of_fit, warnings_of_modes
from flowvi.posteriors.objectives import Tempered, WideELBO
from flowvi.posteriors.posterior import Posterior, draws
from flowvi.posteriors.search import ANY_HESSIAN
from flowvi.posteriors.start import find
from flowvi.posteriors.target import Target, Theta
from flowvi.training import Plateau, TrainingOptions, check_names, fit
from flowvi.transformers import Transformer

#: Up to the first size there are autoregressive layers; beyond, marginal maps, and directions of a
#: low-rank start.
MODERATE, RANK = 200, 20


class Budget(NamedTuple):
    """What a fit of up to so many coordinates does by default; for the width, see `WideELBO`."""

    most_coordinates: float
    num_steps: int
    num_samples: int
    learning_rate: float
    careful_rate: float
    width: float


#: The careful rate is that of a user's family, whose networks may be of any kind, of a tempered
#: fit, which loses modes and tails at higher ones, and of a fit with little to gain. Wide draws
#: leave the bulk of the density where there are many coordinates.
BUDGETS = (
    Budget(10, 4_000, 256, 2e-2, 5e-3, 1.3),
    Budget(50, 2_500, 128, 5e-2, 1e-2, 1.0),
    Budget(MODERATE, 1_800, 128, 5e-2, 5e-3, 1.0),
    Budget(np.inf, 2_000, 64, 5e-3, 5e-3, 1.0),
)

#: Draws of a step of a tempered fit: the weights of its modes are as exact as theirs are.
TEMPERED_SAMPLES = 512

#: The start of the default flow is easy if the log evidence is within so many nats of its ELBO.
#: What is left to gain takes so few steps; a long fit would end while its step size is large still.
EASY, EASY_STEPS = 0.05, 1_000

#: The rule that ends a fit early: so little left to gain that the noise has vanished with it.
PLATEAU = Plateau(window=100, patience=3, tolerance=5e-4)

#: A base is made wider where k-hat is above this, by one of these factors, for so many nats at most
#: and only if k-hat falls by more than its noise.
HEAVY, FACTORS, MOST_COST, KHAT_NOISE = 0.3, (1.003, 1.01, 1.02, 1.03, 1.04), 5e-3, 0.05

#: (family, log joint) -> a loss.
Objective = Callable[..., Callable[..., PyTree]]


def default_family(event_size: int, *, transformer: str | Transformer = "affine") -> Flow:
    """The flow that is fitted by default, in the units of the start.

    Four autoregressive layers that sample in one pass, and a triangular map after them; beyond 200
    coordinates a shift and a scale of each, after which `fit_posterior` puts marginal maps.
    """
    size = checks.positive_int("event_size", event_size)
    if size > MODERATE:
        return mean_field(size)
    hidden_sizes = (max(64, 2 * size),) * 2  # two units of each degree
    layers = iaf(size, num_layers=4, hidden_sizes=hidden_sizes, transformer=transformer)
    return Flow(layers, full_rank(size).transform)


@functools.lru_cache(maxsize=64)
def default_optimizer(num_steps: int, learning_rate: float) -> optax.GradientTransformation:
    """Adam with clipped gradients and a cosine decay."""
    schedule = optax.cosine_decay_schedule(learning_rate, num_steps, 0.01)
    return optax.chain(optax.clip_by_global_norm(10.0), optax.adam(schedule))


def fit_posterior(
    target: Target,
    *,
    key: Array,
    family: Family | None = None,
    objective: Objective | None = None,
    num_samples: int | None = None,
    start: Theta | None = None,
    tempering: float | None = None,
    **options: Unpack[TrainingOptions],
) -> Posterior:
    """Fits a posterior to a log density, with no settings needed.

    1. The start is the best, by ELBO, of many normal distributions along paths of L-BFGS, improved
       by variational Newton steps where the target can be differentiated twice.
    2. A flow that begins as the identity, before the start's affine map, is fitted by path
       gradients of the ELBO until that stops improving. Up to 10 coordinates the draws come from a
       base 1.3 times as wide, so that tails are fitted with the rest; beyond 200 the flow is a map
       of each marginal after the affine map. All but the flow's networks keeps JAX's precision.
    3. The better one of start and fit, by ELBO on the same draws, is taken. Where its k-hat is
       above 0.3, a base up to 4 % wider is tried, for at most 0.005 nats.
    4. Importance weights of fresh draws make the diagnosis, and a `PosteriorWarning` where k-hat is
       above 0.7, the effective sample size below 0.2 of the draws, the standard error of the log
       evidence above 0.05, or the ELBO more than 1 nat below the log evidence.

    Importance weights cannot see a mode that is missed altogether: the log evidence is then too
    small by the log of the mass that was found. Up to 200 coordinates runs of L-BFGS, from near
    zero and from up to 40 standard deviations around the start, search for such modes, and a
    warning names what they find. If there may be several modes, fit again with `tempering=0.1`, and
    compare the log evidence. Of a curved ridge hundreds of times as long as thick a fit may follow
    the middle only; then the log evidence rises with more steps. In high dimension tails are lost
    slowly before any of these numbers moves.

    Args:
        target: the target.
        key: a random key.
        family: any reparameterised family, in the units of the start; by default a flow of four
            autoregressive layers and a triangular map.
        objective: (family, log joint) -> a loss for `fit`, such as
            `functools.partial(fv.objectives.Renyi, alpha=0.5, num_samples=64)`; the ELBO with path
            gradients by default. If it has `init(key)`, that makes the parameters beside q's.
        num_samples: draws of a step, where `objective` is not given; by default 256 for up to 10
            coordinates, 128 for up to 200, and 64 beyond; 512 with `tempering`.
        start: points to start from, in the user's space, with a leading axis if there are several;
            drawn around zero by default.
        tempering: the remedy for lost modes: an inverse temperature between 0 and 1, such as 0.1,
            at which the fit starts. It rises to 1 in the first 0.3 of the steps; the forward KL
            divergence, beside the ELBO, sets the modes' weights right.
        options: those of `fit`. By default `num_steps` is 4000 for up to 10 coordinates, 2500 for
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
    check_key(key)
    _check_options(target, family, objective, tempering, options)
    target.check()
    size = target.event_size
    budget = next(each for each in BUDGETS if size <= each.most_coordinates)
    num_steps, optimizer = options.get("num_steps"), options.get("optimizer")
    steps = budget.num_steps if num_steps is None else checks.positive_int("num_steps", num_steps)
    if num_samples is None:
        num_samples = budget.num_samples if tempering is None else TEMPERED_SAMPLES
    placed = _placed(size, family, tempering)
    kind: Objective
    every: dict[str, PyTree] = {"num_samples": num_samples, "skip_nonfinite": True}
    if objective is not None:
        kind, every = objective, {}
    elif tempering is not None:
        kind, every = Tempered, {**every, "power": float(tempering), "num_steps": steps}
    elif family is None and budget.width > 1:
        kind, every = WideELBO, {**every, "width": budget.width}
    else:
        kind, every = ELBO, {**every, "path": True}
    loss_fn = kind(placed, target.log_joint, **every)

    start_key, init_key, fit_key, choice_key, final_key = jax.random.split(key, 5)
    found = find(target, start_key, start, tempering or 1.0, placed.rank)
    params = _fresh(loss_fn, placed, init_key)
    fresh = params["posterior"]

    def judged(params: PyTree) -> _Judged:  # all candidates from the same draws
        return _Judged(params, diagnose(draws(placed, target, params, choice_key)[2]))

    params["posterior"] = placed.place(fresh, found.whitening)
    candidates = [] if tempering is not None else [judged(params["posterior"])]
    # Noise of the draws is larger than rounding by far: the networks of the default flow, in units
    # of the start, move in single precision. The target and the affine map keep their own.
    single = family is None and objective is None and size <= MODERATE
    careful = family is not None or tempering is not None
    if single and num_steps is None and optimizer is None and not careful and candidates[0].easy:
        careful, steps = True, min(steps, EASY_STEPS)
    rate = budget.careful_rate if careful else budget.learning_rate
    plateau = PLATEAU if tempering is None else None
    given = {"max_bad_steps": steps, "plateau": plateau, "data": target.data, **options}
    given |= {"num_steps": steps, "optimizer": optimizer or default_optimizer(steps, rate)}
    result = fit(
        loss_fn,
        cast(params, jnp.float32) if single else params,
        key=fit_key,
        configuration={"num_steps": str(steps)},  # on which the default schedule depends
        **given,
    )
    if single:
        full = {name: getattr(result, name) for name in ("params", "last_params")}
        result = dataclasses.replace(result, **cast(full, jnp.result_type(float)))
    candidates.insert(0, judged(result.params["posterior"]))
    if tempering is None and found.best is not found.whitening:
        candidates.append(judged(placed.place(fresh, found.best)))
    best = max(candidates, key=lambda each: each.score)
    if objective is None:
        best = _widened(placed, judged, best)
    diagnosis = diagnose(draws(placed, target, best.params, final_key)[2])
    messages = [*warnings_of_fit(target, found, result)]
    if len(found.ends):
        log_p = np.asarray(target(found.ends), np.float64)
        log_q = np.asarray(_log_prob(placed, best.params, found.ends), np.float64)
        messages += warnings_of_modes(log_p, log_q, found, diagnosis.log_evidence.value)
    diagnosis = diagnosis.warn(messages, stacklevel=2)
    result = dataclasses.replace(result, params=best.params)
    return Posterior(result=result, target=target, family=placed, start=found, diagnosis=diagnosis)


class _Judged(NamedTuple):
    """Parameters of q, and what their importance weights say."""

    params: PyTree
    diagnosis: Diagnosis

    @property
    def score(self) -> float:
        return self.diagnosis.elbo.value if self.diagnosis.lost < 0.5 else -np.inf

    @property
    def easy(self) -> bool:
        """Whether little is left to gain."""
        gap = self.diagnosis.log_evidence.value - self.diagnosis.elbo.value
        return self.diagnosis.lost == 0 and gap < EASY


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
    batch_size = options.get("batch_size")
    rule = "`batch_size` must be None for a target without rows of data"
    fix = "Perhaps make it with `fv.Target.from_likelihood`?"
    checks.require(batch_size is None or target.data is not None, rule, batch_size, fix)
    is_power = isinstance(tempering, int | float) and 0 < tempering < 1
    rule = "`tempering` must be None or between 0 and 1"
    checks.require(tempering is None or is_power, rule, tempering)
    if tempering is not None and objective is not None:
        raise ValueError("`tempering` must be None where `objective` is given; got both.")


def _placed(size: int, family: Family | None, tempering: float | None) -> Whitened:
    """A family, the default one by default, in the units of a start."""
    if isinstance(family, Whitened):
        return family
    marginal = "spline" if family is None and size > MODERATE else None
    if family is None:
        family = default_family(size, transformer="affine" if tempering is None else "spline")
    return whitened(family, rank=None if size <= ANY_HESSIAN else RANK, marginal=marginal)


def _widened(family: Whitened, judged: Callable[[PyTree], _Judged], fitted: _Judged) -> _Judged:
    """What was fitted, spread a little where the largest importance weights have a heavy tail."""
    # The best fit by ELBO is as often too narrow as too wide in each of its tails, and weights grow
    # without bound where it is too narrow. With a base 1 + e times as wide, at the price of about
    # D e^2 nats, the largest weights move to the middle.
    if fitted.diagnosis.lost > 0:
        return fitted
    tried, elbo = [fitted], fitted.diagnosis.elbo.value
    for factor in FACTORS:
        if tried[-1].diagnosis.khat <= HEAVY:
            return tried[-1]
        wide = judged(family.widen(fitted.params, factor))
        elbo = max(elbo, wide.diagnosis.elbo.value)
        if wide.diagnosis.lost > 0 or elbo - wide.diagnosis.elbo.value > MOST_COST:
            break
        tried.append(wide)
    best = min(tried, key=lambda each: each.diagnosis.khat)
    limit = max(HEAVY, fitted.diagnosis.khat - KHAT_NOISE)
    return best if best.diagnosis.khat <= limit else fitted


#: What runs once need not run fast: without optimisations it compiles in a third of the time.
ONCE = {"xla_backend_optimization_level": 0}


@compiled(2, compiler_options=ONCE)
def _fresh(loss_fn: Callable[..., PyTree], family: Family, key: Array) -> PyTree:
    """Parameters of a loss: of q alone, where it does not make any."""
    init = getattr(loss_fn, "init", None)
    return {"posterior": family.init(key)} if init is None else init(key)


@compiled(compiler_options=ONCE)
def _log_prob(family: Family, params: PyTree, u: np.ndarray) -> Array:
    return family.log_prob(params, jnp.asarray(u))
