"""What networks of other libraries have in common."""

import abc
import functools
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flowvi.networks.network import Network
from flowvi.params import Fixed

Array = jax.Array

#: Arguments by which networks are told training from evaluation, and their values in training.
FLAGS = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "inference": False,
    "use_running_average": False,
}
#: Arguments by which networks are given random numbers.
KEYS = ("key", "rng")


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a function by name; none where it does not tell."""
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return {}


def describe(value: Any) -> str:
    """The name of a function, or what an object says of itself, without its place in memory."""
    while isinstance(value, functools.partial):
        value = value.func
    name = getattr(value, "__qualname__", None)
    return re.sub(" at 0x[0-9a-f]+", "", " ".join(repr(value).split())) if name is None else name


class ForeignNetwork(Network):
    """A network of another library, whose parameters are {"params": ..., "state": Fixed(...)}.

    "params" are those of the library; "state" is what else it keeps, such as batch statistics.

    Attributes:
        train_flag: the name of an argument that is True in training, where it is none of `FLAGS`.
    """

    train_flag: Any

    def __repr__(self) -> str:
        # The same from one run of a program to the next: it serves as a fingerprint too.
        words = [describe(self.subject), f"input_shape={self.input_shape}"]
        if self.train_flag is not None:
            words.append(f"train_flag={self.train_flag!r}")
        return f"{type(self).__name__}({', '.join(words)})"

    @property
    @abc.abstractmethod
    def subject(self) -> Any:
        """What of it has a name."""

    @abc.abstractmethod
    def begin(self, key: Array, x: Array) -> tuple[Any, Any]:
        """Fresh (params, state), for an input x of shape [1, *input_shape]."""

    @abc.abstractmethod
    def call(self, params: Any, state: Any, x: Array, key: Array | None) -> tuple[Any, Any]:
        """(output, state) for x of shape [n, *input_shape]; in training where there is a key."""

    def flags(self, function: Callable[..., Any], training: bool) -> dict[str, bool]:
        """The arguments of a function that say "training", or "evaluation"."""
        known = parameters_of(function)
        named = {name: value is training for name, value in FLAGS.items() if name in known}
        return named if self.train_flag is None else {**named, self.train_flag: training}

    def init(self, key: Array) -> Any:
        """See `Network.init`."""
        params, state = self.begin(key, jnp.zeros((1, *self.input_shape)))
        return {"params": params, "state": Fixed(state)}

    def apply(self, params: Any, x: Array) -> Any:
        """See `Network.apply`."""
        return self._run(params, x, None)[0]

    def train_apply(self, params: Any, key: Array, x: Array) -> tuple[Any, Any]:
        """See `Network.train_apply`."""
        output, state = self._run(params, x, key)
        if not jax.tree.leaves(state):
            return output, params
        return output, {**params, "state": Fixed(jax.lax.stop_gradient(state))}

    def _run(self, params: Any, x: Array, key: Array | None) -> tuple[Any, Any]:
        batch_shape = x.shape[: x.ndim - len(self.input_shape)]
        num_rows = math.prod(batch_shape)
        rows = x.reshape(num_rows, *self.input_shape)
        output, state = self.call(params["params"], params["state"].value, rows, key)

        def restore(each: Array) -> Array:
            if jnp.shape(each)[:1] != (num_rows,):
                raise ValueError(
                    f"`network` must keep the leading axis of its input, of shape {rows.shape}; "
                    f"got an output of shape {jnp.shape(each)} from {self!r}."
                )
            return each.reshape(batch_shape + each.shape[1:])

        return jax.tree.map(restore, output), state
