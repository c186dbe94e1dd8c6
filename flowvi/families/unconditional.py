"""A family whose context is a parameter of its own."""

import dataclasses
from typing import Any

import distrax
import jax
import jax.numpy as jnp

from flowvi.families.family import Array, Family, Params, Wrapper
from flowvi.families.parametric import Parametric
from flowvi.params import Fixed, Origin


@dataclasses.dataclass(frozen=True)
class Unconditional(Wrapper):
    """A family at one context; see `unconditional`."""

    family: Family
    learned: bool = True
    context_shape: None = dataclasses.field(default=None, init=False)

    def init(self, key: Array) -> Params:
        """{"family", "context", "origin"}."""
        family_key, context_key = jax.random.split(key)
        context: Any = jnp.zeros(self.family.context_shape or ())
        if isinstance(self.family, Parametric):
            context = self.family.initial_arguments(context_key)
        return {
            "family": self.family.init(family_key),
            "context": context if self.learned else Fixed(context),
            "origin": Origin(self),
        }

    def distribution(self, params: Params, context: Array | None = None) -> distrax.Distribution:
        """See `Family.distribution`."""
        self.check_context(context)
        return self.family.distribution(params["family"], self._own(params))

    def train_distribution(
        self, params: Params, key: Array, context: Array | None = None
    ) -> tuple[distrax.Distribution, Params]:
        """See `Family.train_distribution`."""
        self.check_context(context)
        own = params["family"]
        inner, new = self.family.train_distribution(own, key, self._own(params))
        return inner, params if new is own else {**params, "family": new}

    def check_support(self, x: Any, name: str = "x") -> None:
        """See `Family.check_support`."""
        self.family.check_support(x, name)

    def _own(self, params: Params) -> Any:
        context = params["context"]
        return context.value if isinstance(context, Fixed) else context


def unconditional(family: Family, *, learned: bool = True) -> Unconditional:
    """A family whose context is a parameter of its own: what `fv.conditional` is not.

    It makes a prior of a family that takes its parameters as context. Contexts start at zero, for
    which coins are fair and classes equally likely; of a mixture the locations start at random.

    Args:
        family: a family with a context.
        learned: whether an optimizer moves the context; if not it stays as it starts.

    Raises:
        TypeError: if it is no family.
        ValueError: if it takes no context.

    Example:
        >>> import jax
        >>> import flowvi as fv
        >>> prior = fv.unconditional(fv.bernoulli(3), learned=False)
        >>> prior.log_prob(prior.init(jax.random.key(0)), jax.numpy.ones(3))  # 3 log 1/2
        Array(-2.0794415, dtype=float32)
    """
    if not isinstance(family, Family):
        raise TypeError(f"`family` must be a family; got {family!r}.")
    if family.context_shape is None:
        raise ValueError(f"`family` must take a context; got {family!r}, which takes none.")
    return Unconditional(family, bool(learned))
