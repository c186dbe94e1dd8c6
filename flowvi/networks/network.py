"""What a family asks of a network."""

import abc
from typing import Any

import jax

Array = jax.Array


class Network(abc.ABC):
    """A function of arrays with parameters: hashable and pure.

    Subclasses are frozen dataclasses, equal when they are configured equally, or else equal only to
    themselves; a network is part of a family, and families are static arguments of `jax.jit`.

    Attributes:
        input_shape: the shape of one input.
    """

    input_shape: Any

    @abc.abstractmethod
    def init(self, key: Array) -> Any:
        """Fresh parameters; what is no parameter, such as batch statistics, is `Fixed`."""

    @abc.abstractmethod
    def apply(self, params: Any, x: Array) -> Any:
        """The output in evaluation: without dropout, and with batch statistics at rest.

        Args:
            params: parameters as `init` returns them.
            x: of shape [*batch, *input_shape], with any number of leading axes.

        Returns:
            An array of shape [*batch, ...], or a dict of such arrays.
        """

    def train_apply(self, params: Any, key: Array, x: Array) -> tuple[Any, Any]:
        """The output in training, and parameters with new `Fixed` leaves.

        Args:
            params: parameters as `init` returns them.
            key: randomness, such as that of dropout.
            x: as in `apply`.

        Returns:
            (output, params). The default is the evaluation form and unchanged parameters.
        """
        del key
        return self.apply(params, x), params
