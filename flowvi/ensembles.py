"""Ensembles: many fits that differ in their keys, in one compiled program, and their mixture."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from jax.typing import ArrayLike

from flowvi import checks
from flowvi.densities import Density
from flowvi.families import check_key
from flowvi.families.copies import Copies
from flowvi.families.known import Stacked
from flowvi.params import Array
from flowvi.posteriors import Posterior
from flowvi.posteriors.diagnosis import diagnose
from flowvi.posteriors.posterior import draws
from flowvi.training import FitResult, Fitted
from flowvi.training.together import together

F = TypeVar("F", bound=Fitted | FitResult)

#: Draws of each member by which they are compared, by default.
NUM_DRAWS = 2_000


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Ensemble(Generic[F]):
    """Fits that differ in their keys.

    Attributes:
        members: what each fit returned, in the order of the keys.
        log_weights: those of the members in their mixture, of shape [M].
        mixture: of densities a `Density`, of posteriors a `Posterior`; None of other fits.
    """

    members: tuple[F, ...]
    log_weights: np.ndarray
    mixture: Density | Posterior | None

    def __repr__(self) -> str:
        steps = [member.num_steps for member in self.members]
        return f"Ensemble({len(steps)} members, num_steps={steps}, mixture={self.mixture!r})"

    def disagreement(
        self, key: Array, num_draws: int = NUM_DRAWS, context: ArrayLike | None = None
    ) -> np.ndarray:
        """How far each member is from the mixture of all, in nats: of shape [M].

            KL(p_m || sum_k w_k p_k) = E_{p_m} [log p_m(x) - log sum_k w_k p_k(x)]

        estimated from draws, the mean over contexts where there are any. It is 0 where all say the
        same, and -log w_m of a member that is where no other one is.

        Args:
            key: a random key.
            num_draws: draws of each member, at each context.
            context: of shape [*batch, *context_shape], where the density takes one.

        Raises:
            TypeError: if the members are neither densities nor posteriors.
            ValueError: if posteriors get a context.
        """
        check_key(key)
        num_draws = checks.positive_int("num_draws", num_draws)
        rule = "`disagreement` needs an ensemble of densities or of posteriors"
        checks.require(self.mixture is not None, rule, self.members[0], error=TypeError)
        mixture: Any = self.mixture
        rule = "`context` must be None for an ensemble of posteriors"
        checks.require(context is None or isinstance(mixture, Density), rule, context)
        own = () if context is None else (context,)
        found = []
        members: tuple[Any, ...] = self.members
        for member, its_key in zip(members, jax.random.split(key, len(members)), strict=True):
            x, log_prob = member.sample_and_log_prob(its_key, num_draws, *own)
            whole = mixture.log_prob(x, *own)
            found.append(np.mean(np.asarray(log_prob, float) - np.asarray(whole, float)))
        return np.array(found)


def ensemble(fit: Callable[[Array], F], keys: Array | Sequence[Array]) -> Ensemble[F]:
    """Many small fits, in one compiled program where they are alike, and their mixture.

    `fit` is any function of a key that fits something with this library, by one fit or by several:
    it is called once for each key, as ever, and what stands before and behind its training is done
    in turn. When all calls have come to the steps of a fit, those of one program and of the same
    shapes are done together, over an axis of members. Each member has its own rows, shuffles,
    validations and checks of what went wrong, and is stopped by its own rule; those that are over
    wait for the others without a step. The results are those of fits in turn, up to rounding.

    Steps of small models take as long as it takes to start their many kernels, so that those of
    many members take little longer. Members of large models take as long together as in turn. Fits
    with checkpoints, over a mesh or of an iterable of batches are done in turn.

    Members of densities have equal weights in the mixture. Those of posteriors have weights by
    their log evidences, so that modes that only some have found get their shares; all must be of
    one target.

    Args:
        fit: a function of a random key alone; what it fits does not depend on the others.
        keys: random keys, of shape [M], as `jax.random.split` gives them.

    Raises:
        ValueError: if posteriors are of different targets; and what `fit` raises.

    Example:
        >>> import jax
        >>> import flowvi as fv
        >>> x = jax.random.normal(jax.random.key(0), (200, 2))
        >>> def fit(key):
        ...     return fv.fit_density(fv.mean_field(2), x, key=key, num_steps=50, progress=False)
        >>> found = fv.ensemble(fit, jax.random.split(jax.random.key(1), 4))
        >>> found.mixture.sample(jax.random.key(2), 3).shape, len(found.members)
        ((3, 2), 4)
        >>> bool((found.disagreement(jax.random.key(3)) < 0.1).all())
        True

    Source: Lakshminarayanan, Pritzel, Blundell, "Simple and Scalable Predictive Uncertainty
    Estimation Using Deep Ensembles", 2017.
    """
    checks.require(callable(fit), "`fit` must be a function of a key", fit, error=TypeError)
    each = list(keys)
    checks.require(each, "`keys` must hold at least one key", "none", say=str)
    for key in each:
        check_key(key, " Perhaps `jax.random.split(key, 16)`?")
    members = tuple(together([functools.partial(fit, key) for key in each]))
    log_weights = np.full(len(members), -np.log(len(members)))
    densities = [member for member in members if isinstance(member, Density)]
    posteriors = [member for member in members if isinstance(member, Posterior)]
    mixture: Density | Posterior | None = None
    if len(densities) == len(members):
        mixture = _of_densities(densities, log_weights)
    elif len(posteriors) == len(members):
        evidences = np.array([member.diagnosis.log_evidence.value for member in posteriors])
        log_weights = evidences - np.logaddexp.reduce(evidences)
        mixture = _of_posteriors(posteriors, log_weights)
    return Ensemble(members, log_weights, mixture)


def _of_densities(members: Sequence[Density], log_weights: np.ndarray) -> Density:
    first = members[0]
    family = Stacked(tuple(member.family for member in members))
    params = family.joined([member.params for member in members], log_weights)
    messages = tuple(dict.fromkeys(each for member in members for each in member.messages))
    return Density(
        result=FitResult.untrained(params, sum(member.seconds for member in members)),
        family=family,
        dtype=first.dtype,
        num_rows=first.num_rows,
        messages=messages,
        columns=first.columns,
        context_columns=first.context_columns,
    )


def _of_posteriors(members: Sequence[Posterior], log_weights: np.ndarray) -> Posterior:
    target = members[0].target
    rule = "`fit` must fit posteriors of one target"
    checks.require(all(member.target is target for member in members), rule, "several", say=str)
    first, are_alike = members[0].family, all(m.family == members[0].family for m in members)
    family: Copies | Stacked
    family = Copies(first, len(members)) if are_alike else Stacked(tuple(m.family for m in members))
    params = family.joined([member.params for member in members], log_weights)
    return Posterior(
        result=FitResult.untrained(params, sum(member.seconds for member in members)),
        target=target,
        family=family,
        start=None,
        diagnosis=diagnose(draws(family, target, params, jax.random.key(0))[2]),
    )
