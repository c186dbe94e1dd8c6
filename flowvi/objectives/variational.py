"""What all variational objectives share: draws of q, and losses that may skip bad draws.

Each objective is a loss for `fit` over parameters {"posterior": those of q, ...}; what stands
beside "posterior" belongs to the log joint density ("prior", "likelihood", ...) and to "control",
the state of control variates.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import distrax
import jax
import jax.numpy as jnp

from flowvi import checks, devices
from flowvi.checks import require
from flowvi.distributions import RelaxedDistribution
from flowvi.families import Family
from flowvi.families.family import Context
from flowvi.params import PyTree

if TYPE_CHECKING:
    from flowvi.objectives.score import ControlVariate

Array = jax.Array
Params = dict[str, PyTree]
Batch = PyTree
Metrics = dict[str, Array]
#: The loss, and in this order metrics and new parameters where there are any.
Output = Array | tuple[Array, Metrics] | tuple[Array, Metrics, Params]
#: A log density, and what its training form hands back: {name: parameters}, or nothing.
DensityAndState = tuple[Array, Params]
LogDensity = Array | DensityAndState
LogJoint = Callable[[Params, Array, Array, Batch], LogDensity]
#: (the loss, metrics, new parameters beside those of q)
Loss = tuple[Array, Metrics, Params]


class Approximation(NamedTuple):
    """The variational distribution q of one step.

    `frozen` is q without gradients to its parameters; `new` is what its training form hands back,
    {"posterior": parameters} or nothing.
    """

    distribution: distrax.Distribution
    frozen: distrax.Distribution
    context: Array | None
    new: Params


class Step(NamedTuple):
    """What a loss is made of; `key` is that of the draws, `model_key` that of the joint density."""

    q: Approximation
    params: Params
    key: Array
    model_key: Array
    batch: Batch

    def density(self, log_density: LogJoint, z: Array) -> DensityAndState:
        """A log density at z, with the same dropout however often it is asked for."""
        again = jax.random.clone(self.model_key)
        if not jax.tree.leaves(self.batch):
            z = devices.split(z)  # there are no rows, which are split already
        return density_and_state(log_density, self.params, again, z, self.batch)


@dataclasses.dataclass(frozen=True)
class Joint:
    """A log joint density in two factors: log p(z) + log p(x | z).

    Where q and the prior allow it, `ELBO` then takes their KL divergence in closed form.

    Attributes:
        prior: the family of p(z), with parameters params["prior"], or none.
        log_likelihood: (params, key, z, batch) -> log p(x | z), of shape [num_samples, *batch]; or
            a pair of that and {name: parameters}, where its training form hands back new ones.
        prior_context: batch -> context of the prior; None where it takes none.

    Source: Kingma, Welling, "Auto-Encoding Variational Bayes", 2014.

    Example:
        >>> import jax, jax.numpy as jnp, flowvi as fv
        >>> fv.objectives.Joint(fv.standard_normal(2), lambda p, key, z, x: -(z**2).sum(-1))(
        ...     {}, jax.random.key(0), jnp.zeros((3, 2)), None
        ... ).shape
        (3,)
    """

    prior: Family
    log_likelihood: LogJoint
    prior_context: Callable[[Batch], Context] | None = None

    def prior_distribution(self, params: Params, batch: Batch) -> distrax.Distribution:
        """p(z)."""
        context = None if self.prior_context is None else self.prior_context(batch)
        return self.prior.distribution(params.get("prior", {}), context)

    def __call__(self, params: Params, key: Array, z: Array, batch: Batch) -> LogDensity:
        likelihood, new = density_and_state(self.log_likelihood, params, key, z, batch)
        log_joint = self.prior_distribution(params, batch).log_prob(z) + likelihood
        return (log_joint, new) if new else log_joint


def density_and_state(
    log_density: LogJoint, params: Params, key: Array, z: Array, batch: Batch
) -> DensityAndState:
    """(log density, what its training form hands back: {name: parameters}, or nothing)."""
    output = log_density(params, key, z, batch)
    return output if isinstance(output, tuple) else (output, {})


@dataclasses.dataclass(frozen=True)
class Variational:
    """The fields of every variational objective.

    Attributes:
        family: q, whose parameters are params["posterior"].
        log_joint: (params, key, z, batch) -> log p(z, x), for z of shape
            [num_samples, *batch, *event] an array of shape [num_samples, *batch]. The batch shape
            is that of the context: () for one posterior, [B] for one of each row. Hashable. It may
            return a pair instead, of that and {name: parameters} with new `Fixed` leaves.
        num_samples: K, the draws of each row in each step.
        context: batch -> context of q; None where q takes none.
        skip_nonfinite: whether draws at which a weight is not finite are left out of the loss, and
            counted as the metric "skipped", the fraction of them. By default they are not, and the
            loss is not finite either.
        row_weights: batch -> weights of the rows, of the batch shape; None for equal ones. The loss
            is the mean of weight times bound, so weights whose mean is 1 keep its scale.
        controls: control variates of the score function, for objectives that have one.

    Raises:
        TypeError: if `family` is none, or a function is none.
        ValueError: if `num_samples` is not positive, or the objective takes no `controls`.

    Source: Blei, Kucukelbir, McAuliffe, "Variational Inference: A Review for Statisticians", 2017.

    Example:
        >>> import flowvi as fv
        >>> issubclass(fv.objectives.ELBO, fv.objectives.Variational)
        True
    """

    family: Family
    log_joint: LogJoint
    _: dataclasses.KW_ONLY
    num_samples: int = 1
    context: Callable[[Batch], Context] | None = None
    skip_nonfinite: bool = False
    row_weights: Callable[[Batch], Array] | None = None
    controls: tuple["ControlVariate", ...] = ()

    #: Whether draws may be relaxed ones, at which a discrete prior has no density.
    takes_relaxed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        rule = "`family` must be a family, such as `fv.iaf(2)`"
        require(isinstance(self.family, Family), rule, self.family, error=TypeError)
        for name in ("log_joint", "context", "row_weights"):
            value = getattr(self, name)
            is_function = callable(value) or (value is None and name != "log_joint")
            require(is_function, f"`{name}` must be a function", value, error=TypeError)
        checks.positive_int("num_samples", self.num_samples)
        object.__setattr__(self, "controls", tuple(self.controls))
        fits = not self.controls or self._has_score
        rule = f"`controls` must be empty for {type(self).__name__} of {self.family!r}, whose "
        rule += "gradient has no score term for them to act on"
        require(fits, rule, self.controls, "Perhaps use `fv.objectives.ScoreFunction`?")

    @property
    def _has_score(self) -> bool:
        """Whether the gradient has a term with the score function."""
        return False

    def init(self, key: Array) -> Params:
        """Fresh parameters of q: {"posterior": ...}, and the state of the objective, "control"."""
        return {"posterior": self.family.init(key)}

    def __call__(self, params: Params, key: Array, batch: Batch) -> Output:
        """The loss, and in this order metrics and new parameters where there are any."""
        train_key, draw_key, model_key = jax.random.split(key, 3)
        q = self._approximation(params, train_key, batch)
        loss, metrics, new = self._loss(Step(q, params, draw_key, model_key, batch))
        return finish(loss, metrics, params, {**q.new, **new})

    def _loss(self, step: Step) -> Loss:
        raise NotImplementedError

    def _approximation(self, params: Params, key: Array, batch: Batch) -> Approximation:
        context = None if self.context is None else self.context(batch)
        own = params["posterior"]
        distribution, new = self.family.train_distribution(own, key, context)
        fits = self.takes_relaxed or not isinstance(distribution, RelaxedDistribution)
        rule = f"`family` must not be relaxed for {type(self).__name__}, which asks a discrete "
        rule += "prior for its density at the draws"
        require(fits, rule, self.family, "Perhaps use `fv.objectives.ELBO`?")
        again = jax.random.clone(key)  # the same randomness, as is meant
        frozen, _ = self.family.train_distribution(jax.lax.stop_gradient(own), again, context)
        handed = {} if new is own else {"posterior": new}
        return Approximation(distribution, frozen, context, handed)

    def _check_reparameterized(self, instead: str = "fv.objectives.ScoreFunction") -> None:
        rule = f"`family` must be reparameterised for {type(self).__name__}, so that its draws "
        rule += "carry gradients"
        require(self.family.reparameterized, rule, self.family, f"Perhaps use `{instead}`?")

    def _terms(self, step: Step, z: Array, log_q: Array) -> tuple[Array, Array, Params]:
        """log p(x | z), log q(z) - log p(z), and new parameters.

        Where the joint density is no `Joint`, the terms are log p(z, x) and log q(z).
        """
        if not isinstance(self.log_joint, Joint):
            terms, new = step.density(self.log_joint, z)
            return terms, log_q, new
        terms, new = step.density(self.log_joint.log_likelihood, z)
        prior = self.log_joint.prior_distribution(step.params, step.batch)
        return terms, log_q - prior.log_prob(z), new

    def _good(self, log_weights: Array) -> tuple[Array | None, Metrics]:
        """Where log weights are finite, or None if it does not matter; and metrics."""
        if not self.skip_nonfinite:
            return None, {}
        good = jnp.isfinite(log_weights)
        return good, {"skipped": 1 - jnp.mean(good.astype(log_weights.dtype))}

    def _mean(self, rows: Array, good: Array | None, batch: Batch) -> Array:
        """The mean over draws and rows of an array of shape [..., *batch], where it is good."""
        if self.row_weights is not None:
            rows = rows * jnp.broadcast_to(self.row_weights(batch), rows.shape)
        if good is None:
            return jnp.mean(rows)
        good = good[-1] if rows.ndim < good.ndim else good
        total, count = jnp.sum(jnp.where(good, rows, 0)), jnp.sum(good)
        # Nothing but bad draws is a bad step.
        return jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.nan)

    def _guarded(self, z: Array) -> Array:
        """z, whose gradient is zero for draws where it is not finite, if such may be skipped."""
        axes = tuple(range(-len(self.family.event_shape), 0))

        @jax.custom_vjp
        def identity(z: Array) -> Array:
            return z

        def backward(_: None, cotangent: Array) -> tuple[Array]:
            good = jnp.all(jnp.isfinite(cotangent), axis=axes, keepdims=True)
            return (jnp.where(good, cotangent, 0),)

        identity.defvjp(lambda z: (z, None), backward)
        return identity(z) if self.skip_nonfinite else z


def finish(loss: Array, metrics: Metrics, params: Params, new: Params) -> Output:
    """The loss in the shortest form that says all."""
    if new:
        return loss, metrics, {**params, **new}
    return (loss, metrics) if metrics else loss


def with_gradient(value: Array, surrogate: Array) -> Array:
    """`value`, with the gradient of `surrogate`."""
    return jax.lax.stop_gradient(value - surrogate) + surrogate
