"""Networks from anywhere, made to look the same to a family."""

import functools
from collections.abc import Callable

import haiku as hk

from flowvi import checks
from flowvi.networks import foreign
from flowvi.networks.equinox import EquinoxNetwork
from flowvi.networks.flax import LinenNetwork, NNXNetwork
from flowvi.networks.foreign import ForeignNetwork
from flowvi.networks.network import Network, Shape
from flowvi.params import PyTree


def _kept(module: PyTree) -> Callable[..., PyTree]:
    """A constructor that returns a module that there is already; equal to nothing but itself."""
    constructor = lambda **unused: module  # noqa: E731
    kind = type(module[0] if isinstance(module, tuple) else module)
    constructor.__qualname__ = f"a {kind.__qualname__}"
    return constructor


def as_network(
    network: PyTree, input_shape: int | Shape | None = None, *, train_flag: str | None = None
) -> Network:
    """A network in the form that families use.

    | what to pass | for |
    |---|---|
    | a `flowvi.networks.Network`, such as `MLP` | networks of this library |
    | `hk.transform(f)`, `hk.transform_with_state(f)` | Haiku |
    | a module | `flax.linen` |
    | a function (rngs) -> module, or a module | `flax.nnx` |
    | a function (key) -> module, or a module | Equinox |
    | `eqx.nn.make_with_state(...)` of such a function, or what it returns | Equinox, with state |
    | (init, apply), or an object that has both | see `PlainNetwork` |

    Of a module of nnx or Equinox that there is already, the parameters are those that it has,
    whatever the key. A function makes fresh ones; its parameter must be called `rngs` or `key`.

    All are called with one leading axis of rows, except modules of Equinox, which see one row.
    Dropout and batch statistics follow the training form of the family: by the module's own switch
    (nnx, Equinox), or by an argument called `train`, `training`, `is_training`, `deterministic`,
    `inference` or `use_running_average`.

    Args:
        network: one of these.
        input_shape: the shape of one input; needed where the network does not know it.
        train_flag: the name of an argument that is True in training, where it is none of the above.

    Raises:
        TypeError: if it is no network of these kinds.
        ValueError: if it is not hashable, or its input shape is unknown and not given.

    Example:
        >>> import haiku as hk, jax
        >>> from flowvi.networks import as_network
        >>> network = as_network(hk.transform(lambda x: hk.nets.MLP([32, 4])(x)), (10,))
        >>> params = network.init(jax.random.key(0))
        >>> network.apply(params, jax.numpy.ones((3, 5, 10))).shape
        (3, 5, 4)
    """
    own = getattr(network, "input_shape", None)
    if own is not None and input_shape is not None:
        own, input_shape = (checks.shape("context_shape", each) for each in (own, input_shape))
        rule = f"`context_shape` must be {own}, the input shape of {network!r}"
        checks.require(own == input_shape, rule, input_shape)
    if isinstance(network, Network):
        return network
    input_shape = own if input_shape is None else input_shape
    kind, source = _recognise(network)
    if kind is None:
        rule = "have `init` and `apply`, or be a module of Flax or Equinox, or make a module"
        fix = "Perhaps wrap a Haiku function in `hk.transform`?"
        raise TypeError(f"`network` must {rule}; got {network!r}. {fix}")
    if input_shape is None:
        rule = "`context_shape` must be given for a network that does not know its input shape"
        raise ValueError(f"{rule}; got None for {network!r}.")
    result = kind(source, checks.shape("context_shape", input_shape), train_flag)
    try:
        hash(result)
    except TypeError as error:
        got = f"{foreign.describe(network)}. Perhaps give it tuples in place of lists?"
        raise ValueError(f"`network` must be hashable; got {got}") from error
    return result


#: Libraries whose modules have their arrays inside.
MADE_BY: dict[str, type[ForeignNetwork]] = {"flax.nnx": NNXNetwork, "equinox": EquinoxNetwork}
LINEN = "flax.linen"


def _recognise(network: PyTree) -> tuple[type[ForeignNetwork] | None, PyTree]:
    """The adapter for a network, and its source."""
    # Equinox gives a module and its state as a pair.
    first = network[0] if type(network) is tuple and network else network
    library = None if isinstance(first, type) else _library(type(first))
    if isinstance(network, hk.Transformed | hk.TransformedWithState):
        return foreign.HaikuNetwork, network
    if library is not None:
        return (LinenNetwork, network) if library == LINEN else (MADE_BY[library], _kept(network))
    if isinstance(network, tuple) and len(network) == 2 and all(map(callable, network)):
        return foreign.PlainNetwork, network
    if not isinstance(network, type) and hasattr(network, "init") and hasattr(network, "apply"):
        return foreign.PlainNetwork, (network.init, network.apply)
    return MADE_BY.get(_library_made(network)), network


def _library(kind: type) -> str | None:
    """The library to which a class belongs, told by name: none is imported for it."""
    modules = [base.__module__ + "." for base in kind.__mro__]
    known = (each for each in (LINEN, *MADE_BY) if any(m.startswith(f"{each}.") for m in modules))
    return next(known, None)


def _library_made(function: PyTree) -> str:
    """The library whose modules a function makes."""
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, type):
        return _library(function) or ""
    if not callable(function):
        return ""
    names = foreign.parameters_of(function)
    # `eqx.nn.make_with_state` does not tell the parameters of what it returns.
    if "key" in names or getattr(function, "__module__", "").startswith("equinox."):
        return "equinox"
    return "flax.nnx" if "rngs" in names else ""
