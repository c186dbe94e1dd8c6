"""Families whose context is computed: by a network, from a table, or a parameter of its own."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from flowvi import checks
from flowvi.families.family import Array, Composed, Context, Family, Params, Shape, as_family, shown
from flowvi.families.parametric import Parametric
from flowvi.networks import Network, as_network
from flowvi.params import Fixed, Origin, PerRow, PyTree

#: Leading axes of the input with which a network is tried.
_BATCH = (2, 3)


def _with_context(family: Family, what: str = "") -> Family:
    """A family that takes a context."""
    if as_family(family).context_shape is None:
        fix = "Perhaps give it a `context_size`, or use `fv.gaussian(...)`?"
        raise ValueError(f"`family` must take a context{what}; got {family!r}. {fix}")
    return family


@dataclasses.dataclass(frozen=True, repr=False)
class Conditional(Composed):
    """A family at context network(context), {"family", "network"}; see `conditional`."""

    family: Family
    network: Network

    def __repr__(self) -> str:
        return shown("conditional", self.family, self.network)

    @property
    def context_shape(self) -> Shape:
        return self.network.input_shape

    def own(self, key: Array) -> dict[str, Params]:
        return {"network": self.network.init(key)}

    def features(self, params: Params, context: Context) -> Context:
        self.check_context(context)
        return self.network.apply(params["network"], jnp.asarray(context))

    def train_features(
        self, params: Params, key: Array, context: Context
    ) -> tuple[Context, Params]:
        self.check_context(context)
        own = params["network"]
        features, new = self.network.train_apply(own, key, jnp.asarray(context))
        return features, {"network": new}


def conditional(
    family: Family, network: PyTree, *, context_shape: int | Shape | None = None
) -> Conditional:
    """A family whose context goes through a network first.

    Args:
        family: a family with a context; its context is the network's output.
        network: one of Haiku, Flax, Equinox or of this library, or a pair of functions; see
            `flowvi.networks.as_network`. It returns the context of the family: an array, or a dict
            where the family has named arguments. Its parameters are part of the family's.
        context_shape: the shape of one input of the network, or its size; needed where the network
            does not know it.

    Raises:
        TypeError: if `network` is none that `flowvi.networks.as_network` takes.
        ValueError: if its output is not of the shape of the family's context.

    Source: Sohn, Lee, Yan, "Learning Structured Output Representation using Deep Conditional
    Generative Models", 2015.

    Example:
        >>> import jax
        >>> import flowvi as fv
        >>> from flowvi.networks import MLP
        >>> family = fv.conditional(fv.maf(2, context_size=4), MLP(10, (32,), 4))
        >>> key, context = jax.random.key(0), jax.numpy.ones((5, 10))
        >>> family.sample(family.init(key), key, context=context).shape
        (5, 2)
    """
    family, network = _with_context(family), as_network(network, context_shape)
    inputs = jax.ShapeDtypeStruct((*_BATCH, *network.input_shape), jnp.zeros(()).dtype)
    try:
        params = jax.eval_shape(network.init, jax.random.key(0))
        output = jax.eval_shape(network.apply, params, inputs)
    except Exception as error:
        rule = f"`network` must map inputs of shape {network.input_shape} in evaluation"
        got = f"{network!r} raised {type(error).__name__}: {error}"
        fix = "Perhaps it draws random numbers, and wants a flag such as `is_training`?"
        raise ValueError(f"{rule}; {got}. {fix}") from error
    _check_output(family, network, output)
    trained = jax.eval_shape(network.train_apply, params, jax.random.key(0), inputs)
    leaves = jax.tree_util.tree_leaves_with_path
    found = [{str(k): leaf for k, leaf in leaves(each)} for each in (trained, (output, params))]
    for name in sorted(found[0].keys() | found[1].keys()):
        here, there = (str(each.get(name, "nothing")) for each in found)
        if there != here:
            rule = "outputs and parameters of the same shapes in training as in evaluation"
            got = f"{here} for {there} of {network!r}"
            raise ValueError(f"`network` must return {rule}; got {got}.")
    return Conditional(family, network)


def _check_output(family: Family, network: Network, output: PyTree) -> None:
    """Checks that the output of a network can be the context of a family."""
    arguments = family.arguments if isinstance(family, Parametric) else {}
    expected: PyTree = _BATCH + (family.context_shape or ())
    if isinstance(output, Mapping) and arguments:
        expected = {name: _BATCH + shape for name, shape in arguments.items()}
    if jax.tree.map(lambda a: tuple(a.shape), output) == expected:
        return
    wanted = f"an array of shape {family.context_shape}, the context shape of {family!r}"
    wanted += f", or a dict of arrays of shapes {arguments}" if arguments else ""
    got = jax.tree.map(lambda a: a.shape[len(_BATCH) :], output)
    raise ValueError(f"`network` must return {wanted}; got {got} from {network!r}.")


@dataclasses.dataclass(frozen=True, repr=False)
class Local(Composed):
    """A family whose context stands in a table, {"family", "rows"}; see `local`."""

    family: Family
    num_rows: int

    def __repr__(self) -> str:
        return shown("local", self.family, self.num_rows)

    @property
    def context_shape(self) -> Shape:
        return ()

    def own(self, key: Array) -> dict[str, Params]:
        return {"rows": PerRow(jnp.zeros((self.num_rows, *(self.family.context_shape or ()))))}

    def with_rows(self, params: Params, rows: PyTree) -> Params:
        """Parameters with other rows: the context of each, of shape [num_rows, *context]."""
        return {"family": params["family"], "rows": PerRow(rows), "origin": Origin(self)}

    def features(self, params: Params, context: Context) -> Context:
        """The rows of the table; those that are out of range are NaN."""
        self.check_context(context)
        return params["rows"].take(context)

    def check_context(self, context: Context) -> Shape:
        """The batch shape; rows that are out of range are an error outside of `jit` only."""
        shape = super().check_context(context)
        rule, dtype = "`context` must hold numbers of rows", jnp.result_type(context)
        if not jnp.issubdtype(dtype, jnp.integer):
            raise TypeError(f"{rule}, integers, for {self!r}; got dtype {dtype}.")
        if not isinstance(context, jax.core.Tracer):
            rows, last = np.asarray(context), self.num_rows - 1
            bad = rows[(rows < 0) | (rows > last)]
            if bad.size:
                fix = "Perhaps fit new rows with `fv.fit_rows`?"
                raise ValueError(f"{rule} from 0 to {last}, for {self!r}; got {bad[0]}. {fix}")
        return shape


def local(family: Family, num_rows: int) -> Local:
    """An unamortized family: each row of the data has parameters of its own, shared by no network.

        q_i = family at context c_i,   c_i a parameter of row i

    Its context is the number of the row. As a posterior it is that of a model without an encoder.
    All rows share what else the inner family has for parameters, such as the layers of a flow.

    `fv.fit` moves just the rows of a batch, and just their part of the optimizer's state; a step
    costs the same at any number of rows. The batch says under "row" which they are, as in
    `data={"x": x, "row": jnp.arange(len(x))}`, and `fv.fit_vae` adds that by itself. New rows are
    fitted against a frozen model by `fv.fit_rows`.

    Args:
        family: a family with a context, 0 at first: a standard normal, of a normal.
        num_rows: the number of rows.

    Raises:
        ValueError: if the family takes no context, or `num_rows` is not positive.

    Source: Hoffman, Blei, Wang, Paisley, "Stochastic Variational Inference", 2013.

    Example:
        >>> import jax, jax.numpy as jnp, flowvi as fv
        >>> family = fv.local(fv.gaussian(2), num_rows=100)
        >>> params = family.init(jax.random.key(0))
        >>> family.distribution(params, jnp.array([3, 7])).batch_shape
        (2,)
    """
    family = _with_context(family, ", which each row then has for itself")
    return Local(family, checks.positive_int("num_rows", num_rows))


@dataclasses.dataclass(frozen=True, repr=False)
class Unconditional(Composed):
    """A family at one context, {"family", "context"}; see `unconditional`."""

    family: Family
    learned: bool = True
    context_shape: None = dataclasses.field(default=None, init=False)

    def __repr__(self) -> str:
        inner = repr(self.family)
        if self.learned and inner.startswith("mixture("):
            return inner.replace(", components='predicted'", "")
        return shown("unconditional", inner, learned=None if self.learned else False)

    def own(self, key: Array) -> dict[str, Params]:
        context: Context = jnp.zeros(self.family.context_shape or ())
        if isinstance(self.family, Parametric):
            context = self.family.initial_arguments(key)
        return {"context": context if self.learned else Fixed(context)}

    def features(self, params: Params, context: Context) -> Context:
        self.check_context(context)
        return params["context"] if self.learned else params["context"].value


def unconditional(family: Family, *, learned: bool = True) -> Unconditional:
    """A family whose context is a parameter of its own: what `fv.conditional` is not.

    It makes a prior of a family that takes its parameters as context. Contexts start at zero, for
    which coins are fair and classes equally likely; of a mixture the locations start at random.

    Args:
        family: a family with a context.
        learned: whether an optimizer moves the context; if not it stays as it starts.

    Raises:
        TypeError: if `learned` is not True or False.
        ValueError: if the family takes no context.

    Source: Chen et al., "Variational Lossy Autoencoder", 2017, for priors that are learned.

    Example:
        >>> import jax, flowvi as fv
        >>> prior = fv.unconditional(fv.bernoulli(8))
        >>> prior.sample(prior.init(jax.random.key(0)), jax.random.key(1), (5,)).shape
        (5, 8)
    """
    if not isinstance(learned, bool):
        raise TypeError(f"`learned` must be True or False; got {learned!r}.")
    return Unconditional(_with_context(family), learned)
