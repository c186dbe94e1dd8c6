"""The stages of the default recipe: a flow around a start, and what is tried where it is wrong."""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flowvi.compiling import compiled
from flowvi.families import (
    Family,
    Whitened,
    standard_normal,
    whitened,
)
from flowvi.families.copies import Copies
from flowvi.objectives import ELBO
from flowvi.params import Array, Fixed, PyTree, cast, host_generator
from flowvi.posteriors import annealing, curves, modes
from flowvi.posteriors.annealing import Particles, anneal, near
from flowvi.posteriors.attempts import Attempt, widened
from flowvi.posteriors.defaults import (
    BUDGETS,
    MODERATE,
    default_family,
    default_optimizer,
    placed,
)
from flowvi.posteriors.diagnosis import Cost, Diagnosis, diagnose, warnings_of_modes
from flowvi.posteriors.leaving import Departure, departure
from flowvi.posteriors.objectives import Tempered, WideELBO
from flowvi.posteriors.posterior import NUM_DIAGNOSIS, draws
from flowvi.posteriors.start import Found, find, probe
from flowvi.posteriors.target import Target, as_float
from flowvi.training import FitResult, Plateau, StopReason, TrainingOptions, fit

#: Draws of a step of a tempered fit: the weights of its modes are as exact as theirs are.
TEMPERED_SAMPLES = 512

#: What is left to gain of an easy start takes so few steps; a long fit would end while its step
#: size is large still.
EASY_STEPS, EASY_SAMPLES = 1_000, 64

#: A flow is fitted again, with tails and to modes, above so many nats between evidence and ELBO,
#: and begins with a careful rate below the second. Of a mixture those components become flows that
#: bring so many nats, at most so many, and if together they bring twice the second.
MOST_GAP, RIGHT, WORTH, MOST_FLOWS = 0.05, 0.005, 0.001, 12

#: A fit around a curve is not compared with one around the start below so many nats.
CLOSE = 0.01

#: Steps of a fit around a curve, and their learning rate, where there is anything to gain.
CURVED_STEPS, CURVED_RATE = 2_000, 2e-2

#: The width of the draws that learn tails, and draws that weigh a part.
TAIL_WIDTH, PART_DRAWS = 1.5, 4_000

#: Coordinates up to which those draws are wide. Beyond, where modes are missing still, a fit begins
#: with the density to this power.
FEW, POWER = 10, 0.1

#: Runs of the optimiser from particles on their way.
NUM_RUNS = 60

#: Seconds of one gradient from which on a fit is planned to take so many seconds; the fewest
#: gradients that are allowed, and the fewest draws of a step.
DEAR, SECONDS, MOST_THRIFTY, LEAST_SAMPLES = 5e-4, 240.0, 2_000, 8

#: Draws of a fit of which those of the largest weights begin further runs of the optimiser, and the
#: seconds that they may take; it is not tried with fewer than the second number.
SIFTED, SIFT_SECONDS, LEAST_SIFTED = 200_000, 3.0, 20_000

#: How often a price is asked for.
PRICINGS = 3

#: Particles that leave a posterior, of all and of those over many rows; gradients of each; and what
#: has to be allowed for a search for modes.
PARTICLES, EACH, TO_EXPLORE = (annealing.NUM_PARTICLES, 250, 10_000), 50, 400_000

#: Draws at which it is seen whether the gradient is finite where the density is.
NUM_PROBES = 500

#: The rule that ends a fit early: so little left to gain that the noise has vanished with it.
PLATEAU = Plateau(window=100, patience=3, tolerance=5e-4)

#: Why a fit ended after which nothing more is fitted.
STOPPED = (StopReason.CALLBACK, StopReason.INTERRUPTED)

#: (family, log joint) -> a loss.
Objective = Callable[..., Callable[..., PyTree]]


@dataclasses.dataclass
class Stages:
    """What all stages of one fit share, and what they have cost so far."""

    target: Target
    given_family: Family | None
    objective: Objective | None
    num_samples: int | None
    tempering: float | None
    options: TrainingOptions
    init_key: Array
    fit_key: Array
    choice_key: Array
    leave_key: Array
    explore_key: Array
    final_key: Array
    cost: Cost = dataclasses.field(default_factory=lambda: Cost(0, 0))
    checked: tuple[PyTree, tuple[Departure, Particles]] | None = None
    allowed: float = np.inf
    price: float = 0.0
    stage: str | None = None

    def __post_init__(self) -> None:
        size = self.target.event_size
        self.budget = next(each for each in BUDGETS if size <= each.most_coordinates)
        self.family = placed(size, self.given_family, self.tempering)
        self.is_default = self.given_family is None and self.objective is None
        self.is_default &= self.tempering is None

    def plan(self, found: Found, max_gradients: int | None, max_seconds: float | None) -> None:
        """Sets how many gradients there may be, from what one costs."""
        used = found.search.num_gradients
        self.allowed = np.inf if max_gradients is None else max(max_gradients - used, MOST_THRIFTY)
        points = as_float(np.tile(found.start.mode, (64, 1)))
        prices = []
        for _ in range(PRICINGS):  # the first one may compile, others may be interrupted
            began = time.perf_counter()
            jax.block_until_ready(probe(self.target, points, self.target.data))
            prices.append((time.perf_counter() - began) / len(points))
        self.price = price = min(prices)
        self.cost += Cost(PRICINGS * len(points), 0)
        if max_seconds is None and price < DEAR:
            return
        # By powers of two, so that a fit does not hang on the clock's last digits.
        price = 2.0 ** float(np.round(np.log2(price)))
        seconds = SECONDS if max_seconds is None else max_seconds
        self.allowed = min(self.allowed, max(seconds / price, MOST_THRIFTY))

    def _thrifty(self, num_steps: int, num_samples: int, part: float) -> tuple[int, int]:
        """(steps, draws of each) within a part of what is allowed: first fewer draws."""
        most = part * self.allowed
        while num_steps * num_samples > most and num_samples > LEAST_SAMPLES:
            num_samples //= 2
        if num_steps * num_samples > most:
            num_steps = max(int(most / num_samples), 50)
        return num_steps, num_samples

    # ---------------------------------------------------------------------------- the stages

    def best(self, found: Found) -> tuple[Attempt, Found]:
        """A flow around the start; where it is not right, the best of it and of what may be."""
        small = self.is_default and self.target.event_size <= MODERATE
        may_explore = self.allowed >= TO_EXPLORE
        curved = self.fit_curved(found) if small and may_explore else None
        candidates = [] if curved is None else [curved]
        if curved is None or curved.gap > CLOSE:
            candidates.append(self.fit_start(found))
        fitted = max(candidates, key=lambda each: each.score)
        if fitted.result.stop_reason in STOPPED or not may_explore:
            return fitted, found
        found = self.sift(fitted, found)
        if not small or self.is_right(fitted, found):
            return fitted, found
        rng = host_generator(self.explore_key)
        explored = self.explore(found, rng)
        if explored is None:
            return fitted, found
        particles, mixture = explored
        # Where there are more modes than components, no mixture holds most of the mass.
        left_out = particles.log_evidence - mixture.log_evidence
        countable = self.target.event_size <= FEW or not left_out > max(1, 3 * particles.error)
        parts = self.fit_parts(mixture) if countable and len(mixture.normals) > 1 else None
        if parts is not None:
            candidates.append(parts)
            if parts.score == max(each.score for each in candidates) and self.is_right(
                parts, found
            ):
                return parts, found
        best = max(candidates, key=lambda each: each.score)
        if self.missing(best, found) and self.target.event_size > FEW:
            candidates.append(self.fit_tempered())
        else:
            candidates.append(self.fit_tails(fitted, particles))
        return max(candidates, key=lambda each: each.score), found

    def sift(self, fitted: Attempt, found: Found) -> Found:
        """The ends of more runs, from those of many draws that have the largest weights.

        A narrow mode draws in none of the few runs from far away, and weighs next to nothing in the
        draws that judge a fit; but of many draws some lie on its slopes.
        """
        count = int(min(SIFTED, SIFT_SECONDS / max(self.price, 1e-9)))
        if not found.ends or count < LEAST_SIFTED:
            return found
        u, _, log_weights = draws(fitted.family, self.target, fitted.params, self.leave_key, count)
        self.cost += Cost(0, count)
        log_weights = np.where(np.isfinite(log_weights), log_weights, -np.inf)
        top = np.argpartition(-log_weights, NUM_RUNS)[:NUM_RUNS]
        return found.with_ends(found.search.ends_from(u[top]))

    def is_right(self, fitted: Attempt, found: Found) -> bool:
        """Whether nothing says that anything is left out."""
        is_close = fitted.gap < MOST_GAP and not self.missing(fitted, found)
        return is_close and not self.left(fitted, fitted.diagnosis).is_suspicious

    def missing(self, fitted: Attempt, found: Found) -> list[str]:
        """What the ends of the optimiser's runs say that is left out."""
        ends = found.start.ends
        if not len(ends):
            return []
        log_p = np.asarray(self.target(ends), np.float64)
        log_q = np.asarray(_log_prob(fitted.family, fitted.params, ends), np.float64)
        evidence = fitted.diagnosis.log_evidence.value
        return list(warnings_of_modes(log_p, log_q, found.start, evidence))

    def fit_tempered(self) -> Attempt:
        """A flow that begins with a flattened density, for more modes than can be counted."""
        stages = dataclasses.replace(
            self, tempering=POWER, cost=Cost(0, 0), checked=None, stage="tempered"
        )
        found = find(self.target, self.explore_key, None, POWER, None)
        fitted = stages.fit_start(found)
        search = found.search
        self.cost += stages.cost + Cost(search.num_gradients, search.num_evaluations)
        return fitted

    def fit_start(self, found: Found) -> Attempt:
        """A flow in the units of the start, or the start itself where that is better."""
        family, start = self.family, found.start
        steps, optimizer = self.options.get("num_steps"), self.options.get("optimizer")
        num_steps = self.budget.num_steps if steps is None else steps
        num_samples = self.budget.num_samples if self.tempering is None else TEMPERED_SAMPLES
        if self.num_samples is not None:
            num_samples = self.num_samples
        elif self.is_default and steps is None:
            num_steps, num_samples = self._thrifty(num_steps, num_samples, 0.7)
        loss_fn = self._loss(family, num_steps, num_samples)
        params = _fresh(loss_fn, family, self.init_key)
        fresh = params["posterior"]
        params["posterior"] = family.place(fresh, start.whitening)
        candidates = (
            [] if self.tempering is not None else [self.judged(family, params["posterior"])]
        )
        careful = self.given_family is not None or self.tempering is not None
        if self.is_default and steps is None and optimizer is None and candidates[0].is_easy:
            careful, num_steps = True, min(num_steps, EASY_STEPS)
            num_steps, few = self._thrifty(num_steps, EASY_SAMPLES, 0.7)
            num_samples = few if self.num_samples is None else self.num_samples
            loss_fn = self._loss(family, num_steps, num_samples)
        rate = self.budget.careful_rate if careful else self.budget.learning_rate
        result = self._fit(loss_fn, params, num_steps, rate, num_samples, self.stage)
        candidates.insert(0, self.judged(family, result.params["posterior"]))
        if self.tempering is None and start.best is not start.whitening:
            candidates.append(self.judged(family, family.place(fresh, start.best)))
        best = max(candidates, key=lambda each: each.score)
        if self.objective is None:
            best = widened(family, functools.partial(self.judged, family), best)
        return best._replace(result=result)

    def fit_tails(self, fitted: Attempt, particles: Particles) -> Attempt:
        """A flow whose marginals have tails of their own, in units of wider draws."""
        size = self.target.event_size
        family = whitened(default_family(size), marginal="tailed")
        params = family.init(self.init_key)
        normal = modes.normal_of(particles.u)
        fresh = self.judged(family, family.place(params, normal.whitening()))
        begun = fresh
        if fitted.family == whitened(default_family(size)):
            further = {**params, "family": fitted.params["family"]}
            whitening = fitted.params["whitening"].value
            on = self.judged(family, family.place(further, whitening))
            # Wider draws know of more; but if they lie elsewhere, what was fitted is no start.
            begun = on if on.score > fresh.score - 1 else fresh
        width = TAIL_WIDTH if size <= FEW else 1.0
        budget = self.budget
        return self._polished(family, begun, budget.num_steps, budget.careful_rate, width, "tails")

    def fit_curved(self, found: Found) -> Attempt | None:
        """A flow around a map of which coordinates follow others along parabolas.

        None where the start is good as it is, or draws around it show no such curve.
        """
        whitening = found.start.whitening
        if self.target.event_size > curves.MOST_CURVED:
            return None
        if self.judged(*self._normal(whitening)).is_easy:
            return None
        keys = self.init_key, self.explore_key
        family, params, num_gradients = curves.drawn(self.target, whitening, *keys)
        self.cost += Cost(num_gradients, 0)
        if params is None:
            return None
        begun = self.judged(family, params)
        budget = self.budget
        # A funnel's neck and a ridge's ends take most of the steps.
        rate = budget.careful_rate if begun.gap < RIGHT else CURVED_RATE
        num_steps = EASY_STEPS if begun.gap < RIGHT else CURVED_STEPS
        return self._polished(family, begun, num_steps, rate, budget.width, "curved")

    def _polished(
        self,
        family: Whitened,
        begun: Attempt,
        num_steps: int,
        rate: float,
        width: float,
        name: str,
    ) -> Attempt:
        """The better of what was begun and of what more steps make of it."""
        loss_fn = WideELBO(
            family,
            self.target.log_joint,
            num_samples=EASY_SAMPLES,
            skip_nonfinite=True,
            width=width,
        )
        steps = self.options.get("num_steps") or num_steps
        start = {"posterior": begun.params}
        result = self._fit(loss_fn, start, steps, rate, EASY_SAMPLES, name)
        best = max(self.judged(family, result.params["posterior"]), begun, key=lambda e: e.score)
        return widened(family, functools.partial(self.judged, family), best)._replace(result=result)

    def explore(
        self, found: Found, rng: np.random.Generator
    ) -> tuple[Particles, modes.Mixture] | None:
        """Particles from far around the start, and the mixture of normals that describes them.

        None where the particles lead nowhere.
        """
        around, params = self._normal(found.start.whitening)
        particles = anneal(
            around, self.target, params, self.explore_key, widths=(annealing.FAR,), least_ess=0.6
        )
        self.cost += Cost(particles.num_gradients, 0)
        good = near(particles.u)
        if good.sum() < max(len(good) / 2, 4 * self.target.event_size):
            return None
        particles = dataclasses.replace(particles, u=particles.u[good])
        ends = found.ends
        if ends:
            ends = ends + found.search.ends_from(particles.early[rng.permutation(NUM_RUNS)])
        seen = modes.distinct(found, ends, rng)
        mixture = modes.mixture_of(self.target, particles, seen, rng)
        self.cost += Cost(0, mixture.num_evaluations)
        return particles, mixture

    def fit_parts(self, mixture: modes.Mixture) -> Attempt | None:
        """A mixture of normals, and of flows where a component's own is worth it."""
        target, size, count = self.target, self.target.event_size, len(mixture.normals)
        part = modes.Part(target)
        arrays = jax.tree.map(lambda a: jnp.asarray(a, jnp.result_type(float)), mixture.arrays)
        owns = [
            {"part": Fixed({"mixture": arrays, "index": jnp.asarray(index)})}
            for index in range(count)
        ]

        def begun(member: Whitened) -> list[PyTree]:
            fresh = member.init(self.init_key)
            return [member.place(fresh, normal.whitening()) for normal in mixture.normals]

        member = whitened(standard_normal(size))
        copies = begun(member)
        found = [
            self._diagnose_part(member, part, params, own)
            for params, own in zip(copies, owns, strict=True)
        ]
        # The divergence of a mixture is at most the mean of its parts'.
        worth = np.exp(mixture.log_weights) * [
            each.log_evidence.value - each.elbo.value for each in found
        ]
        worth = np.where(np.isfinite(worth), worth, np.inf)
        chosen = [index for index in np.argsort(-worth)[:MOST_FLOWS] if worth[index] > WORTH]
        if worth[chosen].sum() < 2 * RIGHT:
            chosen = []
        result = None
        if chosen:
            member = whitened(default_family(size))
            copies = begun(member)
            loss_fn = ELBO(member, part, num_samples=EASY_SAMPLES, path=True, skip_nonfinite=True)
        for index in chosen:
            steps = self.options.get("num_steps") or EASY_STEPS
            start = {"posterior": copies[index], **owns[index]}
            rate, name = self.budget.careful_rate, f"part_{index}"
            result = self._fit(loss_fn, start, steps, rate, EASY_SAMPLES, name)
            after = self._diagnose_part(member, part, result.params["posterior"], owns[index])
            if after.elbo.value > found[index].elbo.value:
                copies[index], found[index] = result.params["posterior"], after
            if result.stop_reason in STOPPED:
                break
        evidences = np.array([each.log_evidence.value for each in found])
        log_weights = evidences - np.logaddexp.reduce(evidences)
        family = Copies(member, count)
        params = family.joined(copies, log_weights)
        if result is None:
            result = FitResult.untrained(params)
        fitted = self.judged(family, params)._replace(result=result)
        return fitted if np.isfinite(fitted.score) else None

    def left(self, fitted: Attempt, diagnosis: Diagnosis) -> Departure:
        """What draws say that have left an approximation."""
        return self._left(fitted, diagnosis)[0]

    def _left(self, fitted: Attempt, diagnosis: Diagnosis) -> tuple[Departure, Particles]:
        target = self.target
        if self.checked is not None and self.checked[0] is fitted.params:
            return self.checked[1]
        family, params, own = fitted.family, fitted.params, None
        u = draws(family, target, params, self.choice_key, 2000)[0]
        if isinstance(family, Copies):
            # Of a mixture there is no one map: normal units of its draws.
            own = family, params
            family, params = self._normal(modes.normal_of(u).whitening())
        particles = anneal(
            family, target, params, self.leave_key, own=own, num_particles=self._particles()
        )
        values, norms = map(np.asarray, probe(target, as_float(u[:NUM_PROBES]), target.data))
        bad = float((np.isfinite(values) & ~np.isfinite(norms)).mean())
        self.cost += Cost(particles.num_gradients + NUM_PROBES, len(u))
        log_q = np.asarray(_log_prob(fitted.family, fitted.params, particles.u))
        found = departure(particles, log_q, u, diagnosis.log_evidence, bad)
        self.checked = fitted.params, (found, particles)
        return found, particles

    def _normal(self, whitening: Mapping[str, ArrayLike]) -> tuple[Whitened, PyTree]:
        """A normal distribution as a family, and its parameters."""
        family = whitened(standard_normal(self.target.event_size))
        return family, family.place(family.init(self.init_key), whitening)

    def _particles(self) -> int:
        most, few, many_rows = PARTICLES
        count = most if (self.target.num_rows or 0) < many_rows else few
        return int(min(count, max(0.2 * self.allowed / EACH, 50)))

    # ------------------------------------------------------------------------- what they share

    def judged(self, family: Family, params: PyTree) -> Attempt:
        """Parameters with the diagnosis of the same draws as all others."""
        self.cost += Cost(0, NUM_DIAGNOSIS)
        found = diagnose(draws(family, self.target, params, self.choice_key)[2])
        return Attempt(family, params, FitResult.untrained(params), found)

    def _diagnose_part(
        self, member: Family, part: modes.Part, params: PyTree, own: PyTree
    ) -> Diagnosis:
        self.cost += Cost(0, PART_DRAWS)
        return diagnose(_part_weights(member, part, params, own, self.choice_key, self.target.data))

    def _loss(self, family: Whitened, num_steps: int, num_samples: int) -> Callable[..., PyTree]:
        """The loss of a fit around the start."""
        kind: Objective
        every: dict[str, PyTree] = {"num_samples": num_samples, "skip_nonfinite": True}
        if self.objective is not None:
            kind, every = self.objective, {}
        elif self.tempering is not None:
            power = float(self.tempering)
            kind, every = Tempered, {**every, "power": power, "num_steps": num_steps}
        elif self.given_family is None and self.budget.width > 1:
            kind, every = WideELBO, {**every, "width": self.budget.width}
        else:
            kind, every = ELBO, {**every, "path": True}
        return kind(family, self.target.log_joint, **every)

    def _fit(
        self,
        loss_fn: Callable[..., PyTree],
        params: PyTree,
        num_steps: int,
        rate: float,
        num_samples: int,
        stage: str | None = None,
    ) -> FitResult:
        # Noise of the draws is larger than rounding by far: the networks of the default flow, in
        # units of the start, move in single precision. The target and the affine map keep theirs.
        single = self.is_default and self.target.event_size <= MODERATE
        plateau = PLATEAU if self.tempering is None else None
        given = {"max_bad_steps": num_steps, "plateau": plateau, "data": self.target.data}
        given |= {**self.options, "num_steps": num_steps}
        directory = self.options.get("checkpoint_dir")
        if stage is not None and directory is not None:
            given["checkpoint_dir"] = pathlib.Path(directory) / stage
        if given.get("optimizer") is None:
            given["optimizer"] = default_optimizer(num_steps, rate)
        result = fit(
            loss_fn,
            cast(params, jnp.float32) if single else params,
            key=self.fit_key,
            configuration={"num_steps": str(num_steps)},  # on which the default schedule depends
            **given,
        )
        self.cost += Cost(result.num_steps * num_samples, 0)
        if single:
            full = {name: getattr(result, name) for name in ("params", "last_params")}
            result = dataclasses.replace(result, **cast(full, jnp.result_type(float)))
        return result


#: What runs once need not run fast: without optimisations it compiles in a third of the time.
ONCE = {"xla_backend_optimization_level": 0}


@compiled(2, compiler_options=ONCE)
def _fresh(loss_fn: Callable[..., PyTree], family: Family, key: Array) -> PyTree:
    """Parameters of a loss: of q alone, where it does not make any."""
    init = getattr(loss_fn, "init", None)
    return {"posterior": family.init(key)} if init is None else init(key)


@compiled(2)
def _part_weights(
    member: Family, part: modes.Part, params: PyTree, own: PyTree, key: Array, data: PyTree
) -> Array:
    q = member.distribution(params)
    u, log_q = q.sample_and_log_prob(seed=key, sample_shape=PART_DRAWS)
    return part(own, None, u, data) - log_q


@compiled(compiler_options=ONCE)
def _log_prob(family: Family, params: PyTree, u: np.ndarray) -> Array:
    return family.log_prob(params, jnp.asarray(u))
