"""The one idea: a family is a distribution waiting for parameters and a context."""

import abc
from typing import Any, ClassVar

import distrax
import jax
import jax.numpy as jnp
import numpy as np

from flowvi import checks
from flowvi.compiling import compiled

Params = Any
Array = jax.Array
Shape = tuple[int, ...]


class Family(abc.ABC):
    """A distribution waiting for parameters and a context.

    Subclasses are frozen dataclasses: hashable, and equal when they are configured equally, so a
    family is a static argument of `jax.jit`. Objectives, the fit loop, VAEs and diagnostics are
    written against this class and nothing else.

    Attributes:
        event_shape: the shape of one event.
        context_shape: the shape of one context; None if the family takes no context; () for a
            row index.
        reparameterized: whether samples carry gradients to every parameter.
    """

    event_shape: Any
    context_shape: Any
    reparameterized: Any
    #: Whether `with_units` is available: whether the family can be moved into the data's units.
    has_units: ClassVar[bool] = False

    @abc.abstractmethod
    def init(self, key: Array) -> Params:
        """Fresh parameters, a pytree whose float leaves outside `Fixed` accept any finite value."""

    @abc.abstractmethod
    def distribution(self, params: Params, context: Array | None = None) -> distrax.Distribution:
        """The distribution at these parameters and this context, for evaluation.

        Args:
            params: parameters as `init` returns them.
            context: an array of shape [*batch, *context_shape], or None where the family takes
                none.

        Returns:
            A Distrax distribution with batch shape [*batch] and the family's event shape. Rows of
            a batch never share noise.

        Raises:
            ValueError: if the context is missing, superfluous or of the wrong shape.
        """

    def train_distribution(
        self, params: Params, key: Array, context: Array | None = None
    ) -> tuple[distrax.Distribution, Params]:
        """The distribution as training sees it, and parameters with new `Fixed` leaves.

        Args:
            params: parameters as `init` returns them.
            key: randomness of the training form, such as dropout.
            context: as in `distribution`.

        Returns:
            (distribution, params). The default is the evaluation form and unchanged parameters.
        """
        del key
        return self.distribution(params, context), params

    def with_units(self, params: Params, units: Any, context_units: Any = None) -> Params:
        """Parameters that place the family in the data's own units and support.

        Args:
            params: parameters as `init` returns them.
            units: a dict of arrays of the event shape: `shift` and `scale`, and `lower` and `upper`
                where there is a support.
            context_units: a dict of arrays of the context shape, `shift` and `scale`.

        Returns:
            The parameters with these as `Fixed` leaves.

        Raises:
            TypeError: if the family has no place for them (`has_units` is False).
        """
        raise TypeError(f"`family` must be a flow to be given units; got {self!r}.")

    def check_support(self, x: Any, name: str = "x") -> None:
        """Checks that data are where the family can be; by default it can be anywhere.

        Args:
            x: an array of shape [*rows, *event_shape], in memory or on disk.
            name: what to call it in the message.

        Raises:
            ValueError: if a number is outside of the support; it says which, and what to do.
        """
        del x, name

    def log_prob(self, params: Params, x: Array, context: Array | None = None) -> Array:
        """Log density at `x`, of shape [...] for `x` of shape [..., *event_shape]. Compiled.

        NaN in `x` or `params` gives NaN.

        Raises:
            ValueError: if `x` or `context` has the wrong shape.
        """
        checks.trailing_shape("x", x, self.event_shape, f"{self!r}")
        self.check_context(context)
        return _log_prob(self, params, x, context)

    def sample(
        self, params: Params, key: Array, sample_shape: Any = (), context: Array | None = None
    ) -> Array:
        """Samples, of shape sample_shape + batch_shape + event_shape. Compiled.

        Raises:
            ValueError: if `context` has the wrong shape.
        """
        self.check_context(context)
        return _sample(self, params, key, _as_shape(sample_shape), context)

    def sample_and_log_prob(
        self, params: Params, key: Array, sample_shape: Any = (), context: Array | None = None
    ) -> tuple[Array, Array]:
        """Samples and their log densities, for the price of the samples. Compiled.

        Returns:
            (x, log_prob) of shapes sample_shape + batch_shape + event_shape and
            sample_shape + batch_shape.

        Raises:
            ValueError: if `context` has the wrong shape.
        """
        self.check_context(context)
        return _sample_and_log_prob(self, params, key, _as_shape(sample_shape), context)

    def check_context(self, context: Array | None) -> Shape:
        """The batch shape that `context` stands for.

        Raises:
            ValueError: if the context is missing, superfluous or of the wrong shape.
        """
        if self.context_shape is None:
            if context is not None:
                raise ValueError(
                    f"`context` must be None for {self!r}, which takes none; got shape "
                    f"{jnp.shape(context)}. Perhaps give the family a `context_size`?"
                )
            return ()
        if context is None:
            raise ValueError(
                f"`context` must be an array whose shape ends in {self.context_shape} for "
                f"{self!r}; got None."
            )
        checks.trailing_shape("context", context, self.context_shape, f"{self!r}")
        shape = jnp.shape(context)
        return shape[: len(shape) - len(self.context_shape)]


def _as_shape(sample_shape: Any) -> Shape:
    return (int(sample_shape),) if np.ndim(sample_shape) == 0 else tuple(sample_shape)


@compiled()
def _log_prob(family: Family, params: Params, x: Array, context: Array | None) -> Array:
    return family.distribution(params, context).log_prob(x)


@compiled(static_argnums=(3,))
def _sample(
    family: Family, params: Params, key: Array, sample_shape: Shape, context: Array | None
) -> Array:
    return family.distribution(params, context).sample(seed=key, sample_shape=sample_shape)


@compiled(static_argnums=(3,))
def _sample_and_log_prob(
    family: Family, params: Params, key: Array, sample_shape: Shape, context: Array | None
) -> tuple[Array, Array]:
    return family.distribution(params, context).sample_and_log_prob(
        seed=key, sample_shape=sample_shape
    )


class Wrapper(Family):
    """A family made of another, whose shapes are that one's where it does not say otherwise.

    Attributes:
        family: the inner family.
    """

    family: Family

    @property
    def event_shape(self) -> tuple[int, ...]:
        """That of the inner family."""
        return self.family.event_shape

    @property
    def context_shape(self) -> tuple[int, ...] | None:
        """That of the inner family."""
        return self.family.context_shape

    @property
    def reparameterized(self) -> bool:
        """That of the inner family."""
        return self.family.reparameterized
