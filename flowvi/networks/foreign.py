"""Networks of Haiku, of two functions, and what those of all other libraries have in common."""

import abc
import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Callable

import haiku as hk
import jax
import jax.numpy as jnp

from flowvi.networks.network import Array, Network, Pair, Shape
from flowvi.params import Fixed, PyTree

#: Arguments by which networks are told training from evaluation, and their values in training.
FLAGS = dict.fromkeys(("train", "training", "is_training"), True)
FLAGS |= dict.fromkeys(("deterministic", "inference", "use_running_average"), False)
#: Arguments by which networks are given random numbers.
KEYS = {"key", "rng"}


def parameters_of(function: Callable[..., PyTree]) -> dict[str, inspect.Parameter]:
    """The parameters of a function by name; none where it does not tell."""
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return {}


def describe(value: object) -> str:
    """The name of a function, or what an object says of itself, without its place in memory."""
    while isinstance(value, functools.partial):
        value = value.func
    name = getattr(value, "__qualname__", None)
    return re.sub(" at 0x[0-9a-f]+", "", " ".join(repr(value).split())) if name is None else name


@dataclasses.dataclass(frozen=True, repr=False)
class ForeignNetwork(Network):
    """A network of another library, whose parameters are {"params": ..., "state": Fixed(...)}.

    `source` is what `as_network` was given, or what makes a module; `train_flag` an argument that
    is True in training, where it is none of `FLAGS`. State is such as batch statistics.
    """

    source: PyTree
    input_shape: Shape
    train_flag: str | None = None
    name: str = ""

    def __post_init__(self) -> None:
        # The same from one run of a program to the next: files tell networks apart by it.
        object.__setattr__(self, "name", describe(self.subject))

    def __repr__(self) -> str:
        flag = "" if self.train_flag is None else f", train_flag={self.train_flag!r}"
        return f"{type(self).__name__}({self.name}, input_shape={self.input_shape}{flag})"

    @property
    def subject(self) -> PyTree:
        """What of it has a name."""
        return self.source

    @abc.abstractmethod
    def begin(self, key: Array, x: Array) -> Pair:
        """Fresh (params, state), for an input x of shape [1, *input_shape]."""

    @abc.abstractmethod
    def call(self, params: PyTree, state: PyTree, x: Array, key: Array | None) -> Pair:
        """(output, state) for x of shape [n, *input_shape]; in training where there is a key."""

    def flags(self, function: Callable[..., PyTree], training: bool) -> dict[str, PyTree]:
        """The arguments of a function that say "training", or "evaluation"."""
        known = parameters_of(function)
        named = {name: value is training for name, value in FLAGS.items() if name in known}
        return named if self.train_flag is None else {**named, self.train_flag: training}

    def init(self, key: Array) -> PyTree:
        params, state = self.begin(key, jnp.zeros((1, *self.input_shape)))
        return {"params": params, "state": Fixed(state)}

    def apply(self, params: PyTree, x: Array) -> PyTree:
        return self._run(params, x, None)[0]

    def train_apply(self, params: PyTree, key: Array, x: Array) -> Pair:
        output, state = self._run(params, x, key)
        if not jax.tree.leaves(state):
            return output, params
        return output, {**params, "state": Fixed(jax.lax.stop_gradient(state))}

    def _run(self, params: PyTree, x: Array, key: Array | None) -> Pair:
        batch_shape = x.shape[: x.ndim - len(self.input_shape)]
        num_rows = math.prod(batch_shape)
        rows = x.reshape(num_rows, *self.input_shape)
        output, state = self.call(params["params"], params["state"].value, rows, key)

        def restore(each: Array) -> Array:
            if each.shape[:1] != (num_rows,):
                rule = f"`network` must keep the leading axis of its input, of shape {rows.shape}"
                raise ValueError(f"{rule}; got an output of shape {each.shape} from {self!r}.")
            return each.reshape(batch_shape + each.shape[1:])

        return jax.tree.map(restore, output), state


class HaikuNetwork(ForeignNetwork):
    """A transformed Haiku function of one input, and maybe of a flag such as `is_training`."""

    @property
    def subject(self) -> PyTree:
        return getattr(self.source.init, "_original_fn", self.source.init)

    def begin(self, key: Array, x: Array) -> Pair:
        result = self.source.init(key, x, **self.flags(self.subject, True))
        return result if isinstance(self.source, hk.TransformedWithState) else (result, {})

    def call(self, params: PyTree, state: PyTree, x: Array, key: Array | None) -> Pair:
        # `hk.without_apply_rng` leaves the type as it is and takes the argument away.
        inputs = [key, x] if "rng" in parameters_of(self.source.apply) else [x]
        flags = self.flags(self.subject, key is not None)
        if isinstance(self.source, hk.TransformedWithState):
            return self.source.apply(params, state, *inputs, **flags)
        return self.source.apply(params, *inputs, **flags), {}


class PlainNetwork(ForeignNetwork):
    """Two functions, `init(key, x) -> params` and `apply(params, x) -> output`.

    x is of shape [n, *input_shape]; `init` may also take the key alone. Further parameters of
    `apply`, in any place, are known by name: `state`, where `init` returns (params, state), and
    `apply` (output, state); `key` or `rng`, random numbers in training and None in evaluation; a
    flag such as `train`, `is_training` or `deterministic`. `source` is the pair of them.
    """

    @property
    def subject(self) -> PyTree:
        return self.source[1]

    def begin(self, key: Array, x: Array) -> Pair:
        init = self.source[0]
        result = init(key) if len(parameters_of(init)) == 1 else init(key, x)
        return result if "state" in parameters_of(self.subject) else (result, {})

    def call(self, params: PyTree, state: PyTree, x: Array, key: Array | None) -> Pair:
        takes = parameters_of(self.subject)
        known = {"state": state, **dict.fromkeys(KEYS, key)}
        named = self.flags(self.subject, key is not None)
        named |= {name: value for name, value in known.items() if name in takes}
        plain = inspect.Parameter.POSITIONAL_OR_KEYWORD
        free = [n for n, each in takes.items() if n not in named and each.kind is plain]
        if len(free) < 2:
            output = self.subject(params, x, **named)
        else:
            output = self.subject(**{free[0]: params, free[1]: x}, **named)
        return output if "state" in takes else (output, {})
