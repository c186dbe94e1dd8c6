"""An amortized posterior: q(theta | x) for any observation, by one network."""

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flowvi import checks, diagnostics, plotting
from flowvi.amortized.prior import ONLY, Prior
from flowvi.amortized.range import Range
from flowvi.amortized.simulations import (
    check_observations,
    constrained,
    log_det,
    unconstrained,
)
from flowvi.compiling import compiled
from flowvi.diagnostics import Estimate
from flowvi.families import Standardized, unconditional
from flowvi.families.family import bare, check_key
from flowvi.layouts import Layout, Theta
from flowvi.params import Array, Fixed, Origin, PyTree, Shape
from flowvi.posteriors import Posterior, Target
from flowvi.posteriors.diagnosis import Diagnosis, diagnose
from flowvi.posteriors.posterior import draws
from flowvi.training import FitResult, Fitted

if TYPE_CHECKING:
    from flowvi.plotting.curves import Figure

#: (theta, x) -> the log likelihood of one observation, a scalar.
LogLikelihood = Callable[[Theta, Array], Array]

#: Draws that are made by one call of a compiled program, about: so few that caches hold them.
CHUNK = 10_000

#: An observation is far if it is so many times as far out as the farthest held-out simulation.
FAR = 1.5

NO_LIKELIHOOD = (
    "There is no likelihood to weigh draws by: whether they are right, `fv.calibrate` tells."
)


class AmortizationWarning(UserWarning):
    """An amortized posterior that should not be trusted as it is."""


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """Importance weights of draws of q(theta | x), by p(theta) p(x | theta) / q(theta | x).

    Attributes:
        log_weights: of shape [num_samples, n], in the order of the draws.
        khat: the Pareto shape of each observation's largest weights, [n]; trust it below 0.7.
        ess: the effective sample size of each, as a fraction of the draws, [n].
        log_evidence: log p(x) of each.
    """

    log_weights: np.ndarray = dataclasses.field(repr=False)
    khat: np.ndarray
    ess: np.ndarray
    log_evidence: tuple[Estimate, ...]


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class AmortizedPosterior(Fitted):
    """What `fit_amortized` learned: the posterior q(theta | x) of any observation x.

    Attributes:
        family: the family of the unconstrained vector u given x, in units of its own.
        layout: the names and supports of the parameters that u stands for.
        single: whether parameters are one array without a name.
        num_pairs: pairs that it was trained on, or held out.
        num_dropped: simulations that were left out, because they were not finite.
        range: where simulations lie; None where there were none.
        observed: the one observation that it was fitted for; None where it is for any.
        prior: the prior; None where it comes from a file.
        log_likelihood: (theta, x) -> log p(x | theta), where it is known.
        messages: what is doubtful; empty where nothing is.
    """

    family: Standardized
    layout: Layout
    single: bool
    num_pairs: int = 0
    num_dropped: int = 0
    range: Range | None = None
    observed: np.ndarray | None = None
    messages: tuple[str, ...] = ()
    prior: Prior | None = dataclasses.field(default=None, metadata={"file": False})
    log_likelihood: LogLikelihood | None = dataclasses.field(default=None, metadata={"file": False})

    def __repr__(self) -> str:
        return (
            f"AmortizedPosterior({self.family!r}, num_pairs={self.num_pairs}, "
            f"{self.result.summary()})"
        )

    @property
    def x_shape(self) -> Shape:
        """The shape of one observation."""
        return self.family.context_shape or ()

    def sample(self, x: ArrayLike, key: Array, num_samples: int) -> Theta:
        """Draws of shape [num_samples, *batch, *shape] at observations of shape [*batch, *x_shape].

        They are an array, or {name: array} where the prior has names; never outside of its support.

        Warns:
            AmortizationWarning: where an observation is far from all simulations.
        """
        array = self._observations(x)
        return constrained(self.layout, self._u(array, key, num_samples)[0], self.single)

    def sample_and_log_prob(
        self, x: ArrayLike, key: Array, num_samples: int
    ) -> tuple[Theta, np.ndarray]:
        """Draws as `sample` gives them, and log q(theta | x) of shape [num_samples, *batch]."""
        u, log_q = self._u(self._observations(x), key, num_samples)
        return constrained(self.layout, u, self.single), log_q - log_det(self.layout, u)

    def log_prob(self, x: ArrayLike, theta: Theta) -> np.ndarray:
        """log q(theta | x), of the shape of the leading axes of theta and of x, which broadcast.

        Raises:
            ValueError: if theta lies outside of its support; the density is zero there.
        """
        array = check_observations(x, self.x_shape)
        u = unconstrained(self.layout, theta)
        log_q = np.asarray(self.family.log_prob(self.params, u, array))
        return log_q - log_det(self.layout, u)

    def _observations(self, x: ArrayLike) -> np.ndarray:
        """Observations, checked; those that are far from all simulations are warned of."""
        array = check_observations(x, self.x_shape)
        message = self._distant(array)
        if self.observed is not None and not np.all(array == self.observed):
            message = "This posterior was fitted for one observation, and this is another one."
        if message:
            warnings.warn(message, AmortizationWarning, stacklevel=3)
        return array

    def distance(self, x: ArrayLike) -> np.ndarray:
        """How far observations are from the nearest simulation, of shape [*batch].

        In units of the distance that 99 of 100 held-out simulations do not reach: an observation
        far above 1 is one that the simulator does not make, and no posterior of it means a thing.
        """
        array = check_observations(x, self.x_shape)
        rule = "`distance` needs simulations, which this posterior was not trained on"
        if self.range is None:
            raise ValueError(f"{rule}; got none.")
        batch = array.shape[: array.ndim - len(self.x_shape)]
        found = self.range.distances(array.reshape(-1, math.prod(self.x_shape)))
        return found.reshape(batch) / max(self.range.far, 1e-12)

    def _distant(self, array: np.ndarray) -> str:
        if self.range is None or not array.size:
            return ""
        distances = self.distance(array).ravel()
        # Some simulations lie a little farther out than all that were looked at.
        most = FAR * float(self.range.held_out[-1] / max(self.range.far, 1e-12))
        far = np.flatnonzero(distances > most)
        if not len(far):
            return ""
        worst = int(np.argmax(distances))
        which = f"Observation {worst}" if len(distances) > 1 else "The observation"
        more = f" ({len(far)} of {len(distances)} are as far)" if len(distances) > 1 else ""
        return (
            f"{which} is {distances[worst]:.3g} times as far from the nearest simulation as 99 of "
            f"100 held-out simulations are, and much farther than all {len(self.range.held_out)}"
            f"{more}: the posterior there is a guess. Perhaps the simulator or the prior leaves "
            "out what made it?"
        )

    def _u(self, array: np.ndarray, key: Array, num_samples: int) -> tuple[np.ndarray, np.ndarray]:
        """(unconstrained draws [num_samples, *batch, D] in double precision, log q of them)."""
        check_key(key)
        count = checks.positive_int("num_samples", num_samples)
        batch = array.shape[: array.ndim - len(self.x_shape)]
        rows = array.reshape(-1, *self.x_shape)
        size = max(CHUNK // count, 1)
        size = min(size, max(len(rows), 1))
        ends = range(0, len(rows), size)
        u = np.empty((count, len(rows), *self.family.event_shape))
        log_q = np.empty((count, len(rows)), np.float32)
        for start in ends:
            some = rows[start : start + size]
            # As many rows in each call, or the last one would compile anew.
            filled = np.concatenate([some, np.repeat(some[-1:], size - len(some), 0)])
            features = self.family._features_on_host(self.params, filled)
            y, log_y = self.family.family.sample_and_log_prob(
                self.params["family"], jax.random.fold_in(key, start), count, features
            )
            keep = slice(start, start + len(some))
            u[:, keep] = self.family.unstandardize(self.params, y)[:, : len(some)]
            log_q[:, keep] = np.asarray(log_y)[:, : len(some)]
        slope = self.family.standardize(self.params, u)[1]
        return (
            u.reshape(count, *batch, *self.family.event_shape),
            (log_q + slope).reshape(count, *batch),
        )

    def weights(self, x: ArrayLike, key: Array, num_samples: int = 1000) -> Weights:
        """Importance weights and k-hat of each of the observations, of shape [n, *x_shape].

        The draws are those of `sample` at the same key.

        Raises:
            ValueError: if the likelihood, or the density of the prior, is not known.
        """
        array = self._observations(x)
        array = array[None] if array.ndim == len(self.x_shape) else array
        checks.require(
            array.ndim == 1 + len(self.x_shape), "`x` must have one leading axis", array.shape
        )
        target = self._log_joint()
        u, log_q = self._u(array, key, num_samples)
        log_p = np.asarray(_log_joints(target, jnp.asarray(u), jnp.asarray(array)), np.float64)
        log_weights = log_p - log_q
        safe = np.where(np.isnan(log_weights), -np.inf, log_weights)
        found = [diagnostics.psis(column) for column in safe.T]
        evidence = tuple(diagnostics.log_evidence(column) for column in safe.T)
        khat, ess = (np.array([getattr(each, name) for each in found]) for name in ("khat", "ess"))
        return Weights(log_weights, khat, ess, evidence)

    def _log_joint(self) -> "LogJoint":
        known = self.prior is not None and self.prior.log_prob is not None
        if self.log_likelihood is None or self.prior is None or not known:
            what = "`log_likelihood`" if self.log_likelihood is None else "a prior's `log_prob`"
            rule = f"`weights` need {what}, which `fit_amortized` was not given"
            fix = "Perhaps give it, or look at `fv.calibrate`?"
            raise ValueError(f"{rule}; got none. {fix}")
        return LogJoint(self.layout, self.single, self.prior, self.log_likelihood)

    def given(self, x: ArrayLike) -> Posterior:
        """The posterior of one observation, of shape [*x_shape]: draws, pictures, ArviZ, weights.

        Where the likelihood and the density of the prior are known, importance weights make its
        diagnosis, and `refine` and `resample` mend it. Where they are not, its log density is that
        of q itself, and nothing in it tells whether q is right. Parameters without a name are
        called "theta" in it.

        Warns:
            AmortizationWarning: where the observation is far from all simulations.
            PosteriorWarning: where importance weights say that it cannot be trusted.
        """
        array = self._observations(x)
        rule = f"`x` must be one observation, of shape {self.x_shape}"
        checks.require(array.shape == self.x_shape, rule, f"shape {array.shape}", say=str)
        family = unconditional(self.family, learned=False)
        context = Fixed(jnp.asarray(array))
        params = {"family": bare(self.params), "context": context, "origin": Origin(family)}
        size = self.layout.event_size
        weighted = self.log_likelihood is not None and self.prior is not None
        weighted = weighted and self.prior.log_prob is not None  # type: ignore[union-attr]
        if weighted:
            density = _AtObservation(self._log_joint(), jnp.asarray(array))
            target = Target(density, size, layout=self.layout)
            _, _, log_weights = draws(family, target, params, jax.random.key(0))
            diagnosis = diagnose(log_weights).warn((), stacklevel=2)
        else:
            own = _OwnDensity(self.family, self.layout, bare(self.params), jnp.asarray(array))
            target = Target(own, size, layout=self.layout)
            unknown = Estimate(math.nan, math.nan)
            diagnosis = Diagnosis(unknown, unknown, math.nan, math.nan, 0.0, (NO_LIKELIHOOD,))
        result = FitResult.untrained(params, self.seconds)
        return Posterior(
            result=dataclasses.replace(result, history=self.history),
            target=target,
            family=family,
            start=None,
            diagnosis=diagnosis,
        )

    def plot(
        self,
        x: ArrayLike,
        *,
        key: Array | None = None,
        num_samples: int = 4_000,
        reference: ArrayLike | None = None,
    ) -> "Figure":
        """A picture of the posterior of one observation; see `flowvi.plotting.pairs`."""
        key = jax.random.key(0) if key is None else key
        return plotting.pairs(self.given(x), key, num_samples=num_samples, reference=reference)


@dataclasses.dataclass(frozen=True, eq=False)
class LogJoint:
    """log p(theta, x), of parameters as users write them."""

    layout: Layout
    single: bool
    prior: Prior
    log_likelihood: LogLikelihood

    def __call__(self, named: Theta, x: Array) -> Array:
        theta = named[ONLY] if self.single else named
        return self.prior.log_prob(theta) + self.log_likelihood(theta, x)  # type: ignore[misc]

    def at(self, u: Array, x: Array) -> Array:
        """log p(u, x) of the unconstrained vector."""
        named, jacobian = self.layout.constrain_and_log_det(u)
        return self(named, x) + jacobian


@dataclasses.dataclass(frozen=True, eq=False)
class _AtObservation:
    """log p(theta, x) at one x."""

    joint: LogJoint
    x: Array

    def __call__(self, named: Theta) -> Array:
        return self.joint(named, self.x)


@dataclasses.dataclass(frozen=True, eq=False)
class _OwnDensity:
    """log q(theta | x) at one x, as a log density of named parameters."""

    family: Standardized
    layout: Layout
    params: PyTree
    x: Array

    def __call__(self, named: Theta) -> Array:
        u = jnp.concatenate([jnp.ravel(named[name]) for name in self.layout.names])
        bijector = self.layout.support.bijector()
        jacobian: Array | float = 0.0
        if bijector is not None:
            u, jacobian = bijector.inverse_and_log_det(u)
        return self.family.distribution(self.params, self.x).log_prob(u) + jacobian


@compiled()
def _log_joints(joint: LogJoint, u: Array, x: Array) -> Array:
    """log p(u, x) of draws [num_samples, n, D] at observations [n, *x_shape]."""
    return jax.lax.map(
        lambda pair: jax.vmap(lambda each: joint.at(each, pair[1]))(pair[0]),
        (jnp.swapaxes(u, 0, 1), x),
    ).T
