"""The default recipe: from a log density to a posterior, with no settings needed."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flowvi import checks
from flowvi.compiling import compiled
from flowvi.families import Family
from flowvi.objectives import ELBO
from flowvi.params import cast
from flowvi.posteriors import diagnosis as diagnoses
from flowvi.posteriors import remarks
from flowvi.posteriors.defaults import MODERATE, placed_family
from flowvi.posteriors.posterior import NUM_DIAGNOSIS, Posterior, draws
from flowvi.posteriors.start import find
from flowvi.posteriors.tails import WideELBO, widened
from flowvi.posteriors.target import Target
from flowvi.posteriors.tempering import Tempered
from flowvi.training import Plateau, fit
from flowvi.training.arguments import check_key
from flowvi.training.result import Look

Array = jax.Array


class Budget(NamedTuple):
    """What a fit of so many coordinates does by default.

    Attributes:
        largest: the number of coordinates up to which it holds.
        num_steps: steps.
        num_samples: draws of a step.
        learning_rate: the largest one, of the default flow.
        careful_rate: that of a family of the user's, whose networks may be of any kind, of a
            tempered fit, which loses modes and tails at higher ones, and of a fit with little to
            gain, which has little way to go.
        width: that of the draws of the default flow; see `WideELBO`.
    """

    largest: float
    num_steps: int
    num_samples: int
    learning_rate: float
    careful_rate: float
    width: float


#: Few coordinates leave time for long fits. With more of them networks are wider and a step takes
#: long; beyond `MODERATE` there is no network at all. Wide draws leave the bulk of the density
#: where there are many coordinates.
BUDGETS = (
    Budget(10, 4_000, 256, 2e-2, 5e-3, 1.3),
    Budget(50, 2_500, 128, 5e-2, 1e-2, 1.0),
    Budget(MODERATE, 1_800, 128, 5e-2, 5e-3, 1.0),
    Budget(np.inf, 2_000, 64, 5e-3, 5e-3, 1.0),
)

#: Draws of a step of a tempered fit, at least: the weights of its modes are as exact as theirs are.
TEMPERED_SAMPLES = 512

#: The start of the default flow is easy if its importance weights put the log evidence within so
#: many nats of its ELBO. What is left to gain takes so few steps, at the end of which the step size
#: is small: a long fit would end on its plateau, where the step size is large still.
EASY, EASY_STEPS = 0.05, 1_000

#: The bound on the norm of every gradient.
MAX_NORM = 10.0

#: The rule that ends a fit early: so little left to gain that the noise has vanished with it.
PLATEAU = Plateau(window=100, patience=3, tolerance=5e-4)

#: Draws that choose between the start and the fit.
NUM_CHOICE = 4_000

Objective = Callable[[Family, Any], Any]


@functools.lru_cache(maxsize=64)
def default_optimizer(num_steps: int, learning_rate: float) -> optax.GradientTransformation:
    """Adam with clipped gradients and a cosine decay."""
    schedule = optax.cosine_decay_schedule(learning_rate, num_steps, 0.01)
    return optax.chain(optax.clip_by_global_norm(MAX_NORM), optax.adam(schedule))


def fit_posterior(
    target: Target,
    *,
    key: Array,
    family: Family | None = None,
    objective: Objective | None = None,
    optimizer: optax.GradientTransformation | None = None,
    num_steps: int | None = None,
    num_samples: int | None = None,
    batch_size: int | None = None,
    start: Any = None,
    tempering: float | None = None,
    progress: bool = True,
    callback: Callable[[Look], bool | None] | None = None,
) -> Posterior:
    """Fits a posterior to a log density, with no settings needed.

    1. L-BFGS runs from several points. Normal distributions along its paths are compared by ELBO,
       and where the target can be differentiated twice the best one is improved by variational
       Newton steps: the start (`flowvi.posteriors.start`).
    2. A flow that begins as the identity is put before that normal distribution's affine map, so
       all targets look alike to it, and is fitted by path gradients of the ELBO, with many draws a
       step and a step size that decays; it ends early where the ELBO stops improving. Up to 10
       coordinates the draws come from a base 1.3 times as wide, so the tails are fitted with the
       rest: the path gradient vanishes at q = p whatever the draws are. Where JAX is in double
       precision, so is all of this but the flow's networks while they are fitted. Beyond
       200 coordinates the flow is a map of each marginal after the affine map.
    3. The start and the fit are compared by ELBO on the same draws, and the better one is taken. If
       k-hat is above 0.3, its base is made wider by up to 4 % where that makes k-hat smaller for at
       most 0.005 nats: importance weights grow without bound where q is too narrow.
    4. Importance weights of fresh draws make the diagnosis, and a `PosteriorWarning` where k-hat is
       above 0.7, the effective sample size below 0.2 of the draws, the standard error of the log
       evidence above 0.05, or the ELBO more than 1 nat below the log evidence.

    Importance weights are made from draws of the approximation itself. So they cannot see a mode
    that it misses altogether: they look fine, and the log evidence is too small by the log of the
    mass that was found. Up to 200 coordinates runs of L-BFGS, from near zero and from up to 40
    standard deviations around the start, look for such modes, and a warning says so where one ends
    in a mode of mass that the approximation leaves out; a mode that none of them ends in remains
    unseen. Of a curved ridge hundreds of times as long as it is thick a fit may follow the middle
    only: again the weights look fine, and the log evidence rises with more steps. And in high
    dimension tails are lost slowly before any of these numbers moves. If there may be several
    modes, fit again with `tempering=0.1`, and compare the log evidence.

    Args:
        target: the target.
        key: a random key.
        family: the flow, or any other reparameterised family, in the units of the start; by default
            that of `default_family`.
        objective: (family, log joint) -> a loss for `fit`, such as
            `functools.partial(fv.objectives.Renyi, alpha=0.5, num_samples=64)`; the ELBO with path
            gradients by default. If it has `init(key)`, that makes the parameters beside q's.
        optimizer: an Optax optimizer; by default Adam, with a learning rate that decays from 0.02
            for up to 10 coordinates, from 0.05 for up to 200, and from 0.005 beyond; with
            `tempering`, where `family` is given, and where the start is as good as a fit, from
            0.005, or 0.01 between 10 and 50.
        num_steps: steps to do at most; by default 4000 for up to 10 coordinates, 2500 for up to 50,
            1800 for up to 200 and 2000 beyond; with the default flow, objective and optimizer 1000
            where the start is as good as a fit: where its ELBO lies within 0.05 nats of the log
            evidence, by its importance weights.
        num_samples: draws of a step, where `objective` is not given; by default 256 for up to 10
            coordinates, 128 for up to 200, and 64 beyond; 512 with `tempering`.
        batch_size: rows of a subsample, where the target has a likelihood over rows; all by
            default.
        start: points to start from, in the user's space, with a leading axis if there are several.
            By default they are drawn around zero.
        tempering: the remedy for lost modes: an inverse temperature between 0 and 1, such as 0.1,
            at which the fit starts. It rises to 1 in the first 0.3 of the steps; the forward KL
            divergence, beside the ELBO, sets the modes' weights right.
        progress: whether to show progress on standard error.
        callback: as in `fit`.

    Returns:
        A `Posterior`.

    Raises:
        TypeError: if an argument is of the wrong kind, or the log density is not floating.
        ValueError: if the log density is no scalar, constant, not finite at any starting point, or
            rises without end; or arguments do not go together.

    Source: the start, Zhang, Carpenter, Gelman, Vehtari, "Pathfinder: Parallel Quasi-Newton
    Variational Inference", 2022; the gradient, Roeder, Wu, Duvenaud, "Sticking the Landing", 2017;
    the diagnosis, Yao, Vehtari, Simpson, Gelman, "Yes, but Did It Work?: Evaluating Variational
    Inference", 2018.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flowvi as fv
        >>> target = fv.Target.from_named(
        ...     lambda p: -0.5 * jnp.sum(jnp.square((p["x"] - 3.0) / 2.0)), {"x": ((2,), "real")}
        ... )
        >>> posterior = fv.fit_posterior(
        ...     target, key=jax.random.key(0), num_steps=100, progress=False
        ... )
        >>> x = posterior.sample(jax.random.key(1), 10_000)["x"]
        >>> bool(jnp.all(abs(x.mean(0) - 3.0) < 0.1))
        True
    """
    if not isinstance(target, Target):
        raise TypeError(
            f"`target` must be a target, such as `fv.Target(log_density, 2)`; got {target!r}."
        )
    check_key(key)
    _check_options(target, family, objective, batch_size, tempering)
    target.check()
    size = target.event_size
    budget = next(each for each in BUDGETS if size <= each.largest)
    steps = budget.num_steps if num_steps is None else checks.positive_int("num_steps", num_steps)
    if num_samples is None:
        least = 0 if tempering is None else TEMPERED_SAMPLES
        num_samples = max(budget.num_samples, least)
    placed = placed_family(size, family, "affine" if tempering is None else "spline")
    careful = family is not None or tempering is not None
    width = budget.width if family is None else 1.0
    make = objective
    if make is None:
        make = _default_objective(steps, num_samples, tempering, width)
    loss_fn = make(placed, target.log_joint)

    start_key, init_key, fit_key, choice_key, final_key = jax.random.split(key, 5)
    found = find(target, start_key, start, 1.0 if tempering is None else tempering, placed.rank)
    params = _fresh(loss_fn if hasattr(loss_fn, "init") else _Plain(placed), init_key)
    # It has a width from the start, so that one program draws from it, widened or not.
    own = placed.widen(params["posterior"], 1.0)
    params["posterior"] = placed.place(own, found.whitening)
    # Noise of the draws is larger than rounding by far: the networks of the default flow, in units
    # of the start, move in single precision. The target and the affine map keep their own.
    single = family is None and objective is None and size <= MODERATE
    default = single and num_steps is None and optimizer is None and tempering is None
    if default and _is_easy(placed, target, params["posterior"], choice_key):
        careful, steps = True, min(steps, EASY_STEPS)
    if optimizer is None:
        rate = budget.careful_rate if careful else budget.learning_rate
        optimizer = default_optimizer(steps, rate)
    result = fit(
        loss_fn,
        cast(params, jnp.float32) if single else params,
        optimizer,
        key=fit_key,
        num_steps=steps,
        data=target.data,
        batch_size=batch_size,
        max_bad_steps=steps,
        plateau=PLATEAU if tempering is None else None,
        progress=progress,
        callback=callback,
    )
    if single:
        full = [cast(each, jnp.result_type(float)) for each in (result.params, result.last_params)]
        result = dataclasses.replace(result, params=full[0], last_params=full[1])
    candidates = [result.params["posterior"]]
    if tempering is None:
        candidates += [
            placed.place(params["posterior"], each) for each in (found.whitening, found.best)
        ]
    best = _best(placed, target, candidates, choice_key)
    if objective is None:
        best = widened(placed, target, best, choice_key)
    weights = draws(placed, target, best, final_key, NUM_DIAGNOSIS)[2]
    log_evidence = diagnoses.diagnose(weights).log_evidence.value
    seen = remarks.on_the_fit(target, found, result)
    seen += remarks.on_modes(
        functools.partial(_log_prob, placed, best), target, found, log_evidence
    )
    diagnosis = diagnoses.diagnose(weights, seen)
    diagnoses.warn(diagnosis, stacklevel=2)
    return Posterior(target, placed, best, result, found, diagnosis)


def _check_options(
    target: Target, family: Any, objective: Any, batch_size: Any, tempering: Any
) -> None:
    size = target.event_size
    if family is not None:
        if not isinstance(family, Family):
            raise TypeError(f"`family` must be a family, such as `fv.iaf({size})`; got {family!r}.")
        if family.event_shape != (size,):
            raise ValueError(
                f"`family` must have event shape {(size,)}, that of the target's vector; got "
                f"{family.event_shape} of {family!r}."
            )
        if family.context_shape is not None:
            raise ValueError(
                f"`family` must take no context; got context shape {family.context_shape} of "
                f"{family!r}."
            )
    if not (objective is None or callable(objective)):
        raise TypeError(
            "`objective` must be a function (family, log_joint) -> loss, such as "
            f"`fv.objectives.IWELBO`; got {objective!r}."
        )
    if batch_size is not None and target.data is None:
        raise ValueError(
            f"`batch_size` must be None for a target without rows of data; got {batch_size!r}. "
            "Perhaps make it with `fv.Target.from_likelihood`?"
        )
    if tempering is not None:
        if not isinstance(tempering, int | float) or not 0 < tempering < 1:
            raise ValueError(
                f"`tempering` must be None or a number between 0 and 1; got {tempering!r}."
            )
        if objective is not None:
            raise ValueError("`tempering` must be None where `objective` is given; got both.")


@dataclasses.dataclass(frozen=True)
class _Plain:
    """Parameters of q alone, for an objective that does not make any."""

    family: Family

    def init(self, key: Array) -> dict[str, Any]:
        return {"posterior": self.family.init(key)}


def _default_objective(
    num_steps: int, num_samples: int, tempering: float | None, width: float
) -> Objective:
    options: dict[str, Any] = {"num_samples": num_samples, "skip_nonfinite": True}
    if tempering is not None:
        return functools.partial(Tempered, power=float(tempering), num_steps=num_steps, **options)
    if width > 1:
        return functools.partial(WideELBO, width=width, **options)
    return functools.partial(ELBO, path=True, **options)


# What runs once need not run fast: without optimisations it compiles in a third of the time.
_once = compiled(compiler_options={"xla_backend_optimization_level": 0})


@_once
def _fresh(maker: Any, key: Array) -> Any:
    return maker.init(key)


@_once
def _log_prob(family: Family, params: Any, u: Array) -> Array:
    return family.log_prob(params, u)


def _is_easy(family: Family, target: Target, params: Any, key: Array) -> bool:
    """Whether importance weights of the start say that little is left to gain."""
    start = diagnoses.diagnose(draws(family, target, params, key, NUM_CHOICE)[2])
    return start.lost == 0 and start.log_evidence.value - start.elbo.value < EASY


def _best(family: Family, target: Target, candidates: list[Any], key: Array) -> Any:
    """The parameters of largest ELBO, from the same draws; the first one where they tie."""
    if len(candidates) == 1:
        return candidates[0]
    scores = []
    for params in candidates:
        weights = draws(family, target, params, key, NUM_CHOICE)[2]
        good = np.isfinite(weights)
        scores.append(weights[good].mean() if good.mean() > 0.5 else -np.inf)
    return candidates[int(np.argmax(scores))]
