"""Networks of Haiku."""

import dataclasses
from typing import Any

import haiku as hk
import jax

from flowvi.networks.foreign import ForeignNetwork, parameters_of

Array = jax.Array


@dataclasses.dataclass(frozen=True, repr=False)
class HaikuNetwork(ForeignNetwork):
    """A transformed Haiku function of one input, and maybe of a flag such as `is_training`.

    Attributes:
        transformed: what `hk.transform` or `hk.transform_with_state` returned, and
            `hk.without_apply_rng` maybe.
        input_shape: the shape of one input.
        train_flag: see `ForeignNetwork`.
    """

    transformed: Any
    input_shape: tuple[int, ...]
    train_flag: str | None = None

    @property
    def _has_state(self) -> bool:
        return isinstance(self.transformed, hk.TransformedWithState)

    @property
    def subject(self) -> Any:
        """The function that was transformed."""
        return original(self.transformed)

    def begin(self, key: Array, x: Array) -> tuple[Any, Any]:
        """See `ForeignNetwork.begin`."""
        result = self.transformed.init(key, x, **self.flags(self.subject, True))
        return result if self._has_state else (result, {})

    def call(self, params: Any, state: Any, x: Array, key: Array | None) -> tuple[Any, Any]:
        """See `ForeignNetwork.call`."""
        # `hk.without_apply_rng` leaves the type as it is and takes the argument away.
        takes_rng = "rng" in parameters_of(self.transformed.apply)
        inputs = [*([key] if takes_rng else []), x]
        flags = self.flags(self.subject, key is not None)
        if self._has_state:
            return self.transformed.apply(params, state, *inputs, **flags)
        return self.transformed.apply(params, *inputs, **flags), {}


def original(transformed: Any) -> Any:
    """The function that was transformed."""
    return getattr(transformed.init, "_original_fn", transformed.init)
