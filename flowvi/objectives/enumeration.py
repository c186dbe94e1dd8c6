"""The ELBO with every choice summed out."""

import dataclasses
import math
from collections.abc import Callable

import distrax
import jax
import jax.numpy as jnp

from flowvi import distributions
from flowvi.families import Family
from flowvi.objectives.variational import Joint, Loss, Step, Variational, require
from flowvi.params import PyTree

Array = jax.Array

#: Choices of a row that may be summed over.
MOST_CHOICES = 1 << 16


@dataclasses.dataclass(frozen=True)
class Enumeration(Variational):
    """Minus the ELBO in nats, a mean over rows, summed over all choices behind a draw.

        ELBO = sum_c q(c) E [f(z_c)],   f = log p(z, x) - log q(z)

    Of a discrete q the choices are its values: the ELBO and its gradient are exact. Of a mixture
    they are the components, each with K reparameterised draws of its own, so that the gradient has
    no score term; of a `fv.joint` they are all combinations. Every choice is an evaluation of the
    joint density for each row. Of a `Joint` the metrics are "rate" = KL(q(z) || p(z)) and
    "distortion" = -E_q log p(x | z).

    Attributes:
        num_samples: K, the draws of each choice; the other fields are those of `Variational`.

    Raises:
        ValueError: if there are more than 65,536 choices, or no end of them; or `skip_nonfinite` is
            asked for, since no choice may be left out.

    Source: for mixtures, Graves, "Stochastic Backpropagation through Mixture Density
    Distributions", 2016; Roeder, Wu, Duvenaud, "Sticking the Landing", 2017.

    Example:
        >>> import jax, flowvi as fv
        >>> family = fv.unconditional(fv.bernoulli(2))
        >>> loss = fv.objectives.Enumeration(family, lambda p, key, z, x: z.sum(-1))
        >>> loss({"posterior": family.init(jax.random.key(0))}, jax.random.key(1), None).shape
        ()
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not self.skip_nonfinite, "`skip_nonfinite` must be False for `Enumeration`", True)
        check_count("family", self.family, count_choices(self.family))

    def _choices(self, q: distrax.Distribution, key: Array) -> tuple[Array, Array]:
        """z of each choice and draw in one axis, as a joint density takes it; log shares of them.

        Rows share the values of a discrete q, so a likelihood that can take them has axes of one in
        place of those of the batch.
        """
        likelihood = getattr(self.log_joint, "log_likelihood", None)
        shared = getattr(likelihood, "takes_shared", False)
        if shared and distributions.support_size(q) is not None:
            values = distributions.support(q)
            z = values.reshape(len(values), *(1,) * len(q.batch_shape), *q.event_shape)
            return z, q.log_prob(z)
        count, flag = (self.num_samples,), self.family.reparameterized
        z, log_choice = distributions.draw_each(q, key, count, reparameterized=flag)
        log_share = log_choice - jnp.log(self.num_samples)
        return z.reshape(-1, *z.shape[2:]), log_share.reshape(-1, *log_share.shape[2:])

    def _loss(self, step: Step) -> Loss:
        z, log_choice = self._choices(step.q.distribution, step.key)
        weights = jnp.exp(log_choice)

        def total(terms: Array) -> Array:
            # What is never chosen does not count, whatever the density there.
            terms = jnp.where(weights > 0, weights * jnp.where(weights > 0, terms, 0), 0)
            return self._mean(jnp.sum(terms, axis=0), None, step.batch)

        # The mean score of the point itself is zero.
        terms, rates, new = self._terms(step, z, step.q.frozen.log_prob(z))
        if not isinstance(self.log_joint, Joint):
            return -total(terms - rates), {}, new
        metrics = {"rate": total(rates), "distortion": -total(terms)}
        return metrics["rate"] + metrics["distortion"], metrics, new


def count_choices(family: Family) -> int | None:
    """The number of choices behind a draw of a family; None if there is no end of them."""
    flag = family.reparameterized
    return _of_distribution(family, lambda q: distributions.num_choices(q, reparameterized=flag))


def support_size(family: Family) -> int | None:
    """The number of values of a discrete family; None for one that is not discrete."""
    return _of_distribution(family, distributions.support_size)


def _of_distribution(
    family: Family, function: Callable[[distrax.Distribution], int | None]
) -> int | None:
    """What a function says of a family's distribution, whose arrays are never computed."""
    found: list[int | None] = []

    def keep(params: PyTree, context: Array | None) -> None:
        found.append(function(family.distribution(params, context)))

    params = jax.eval_shape(family.init, jax.random.key(0))
    shape = family.context_shape
    number = jnp.result_type(float) if shape != () else jnp.result_type(int)
    context = None if shape is None else jax.ShapeDtypeStruct((1, *shape), number)
    jax.eval_shape(keep, params, context)
    return found[0]


def check_count(name: str, family: Family, count: int | None) -> None:
    """Checks that there are choices, and not too many."""
    rule = f"`{name}` must have at most {MOST_CHOICES:,} values or choices to be enumerated"
    if count is None:
        raise ValueError(f"{rule}; got {family!r}, which is continuous and has no end of them.")
    # Such a number may be beyond all floats.
    shown = f"{count:,}" if count < 1e15 else f"about 10^{math.log10(count):.0f}"
    fix = "Perhaps use `fv.objectives.ScoreFunction`?"
    require(count <= MOST_CHOICES, rule, f"{shown} of {family!r}", fix, say=str)
