"""Networks that are two functions."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from flowvi.networks.foreign import KEYS, ForeignNetwork, parameters_of

Array = jax.Array


@dataclasses.dataclass(frozen=True, repr=False)
class PlainNetwork(ForeignNetwork):
    """Two functions, `init(key, x) -> params` and `apply(params, x) -> output`.

    x is of shape [n, *input_shape]. Further parameters of `apply`, in any place, are known by name:

    - `state`: then `init` returns (params, state), and `apply` returns (output, state);
    - `key` or `rng`: random numbers in training, None in evaluation;
    - a flag such as `train`, `is_training` or `deterministic`.

    Attributes:
        init_fn: `init`, which may also take the key alone.
        apply_fn: `apply`.
        input_shape: the shape of one input.
        train_flag: see `ForeignNetwork`.
    """

    init_fn: Callable[..., Any]
    apply_fn: Callable[..., Any]
    input_shape: tuple[int, ...]
    train_flag: str | None = None

    @property
    def subject(self) -> Any:
        """`apply`."""
        return self.apply_fn

    def begin(self, key: Array, x: Array) -> tuple[Any, Any]:
        """See `ForeignNetwork.begin`."""
        result = (
            self.init_fn(key) if len(parameters_of(self.init_fn)) == 1 else self.init_fn(key, x)
        )
        return result if "state" in parameters_of(self.apply_fn) else (result, {})

    def call(self, params: Any, state: Any, x: Array, key: Array | None) -> tuple[Any, Any]:
        """See `ForeignNetwork.call`."""
        takes = parameters_of(self.apply_fn)
        known = {"state": state, **dict.fromkeys(KEYS, key)}
        named: dict[str, Any] = self.flags(self.apply_fn, key is not None)
        named |= {name: value for name, value in known.items() if name in takes}
        free = [
            name
            for name, parameter in takes.items()
            if name not in named and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        if len(free) < 2:
            output = self.apply_fn(params, x, **named)
        else:
            output = self.apply_fn(**{free[0]: params, free[1]: x}, **named)
        return output if "state" in takes else (output, {})
