"""Families whose context is computed: by a network, from a table, or a parameter of its own."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from flowvi import checks
from flowvi.families.family import Array, Composed, Context, Family, Params, Shape, shown
from flowvi.families.parametric import Parametric
from flowvi.networks import Network, as_network
from flowvi.params import Fixed, Origin, PerRow, PyTree


def _check_family(family: Family, what: str = "") -> None:
    if not isinstance(family, Family):
        raise TypeError(f"`family` must be a family, such as `fv.gaussian(2)`; got {family!r}.")
    if family.context_shape is None:
        raise ValueError(
            f"`family` must take a context{what}; got {family!r}, which takes none. Perhaps give "
            "it a `context_size`, or use `fv.gaussian(...)`, whose context are its parameters?"
        )


# --------------------------------------------------------------------------------- by a network


@dataclasses.dataclass(frozen=True, repr=False)
class Conditional(Composed):
    """A family at context network(context), {"family", "network"}; see `conditional`."""

    family: Family
    network: Network

    def __repr__(self) -> str:
        return shown("conditional", self.family, self.network)

    @property
    def context_shape(self) -> Shape:
        """The network's input shape."""
        return self.network.input_shape

    def own(self, key: Array) -> dict[str, Params]:
        return {"network": self.network.init(key)}

    def features(self, params: Params, context: Context) -> Context:
        """What the network makes of the context: the context of the inner family."""
        self.check_context(context)
        return self.network.apply(params["network"], jnp.asarray(context))

    def train_features(
        self, params: Params, key: Array, context: Context
    ) -> tuple[Context, dict[str, Params]]:
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
        network: a network of Haiku, Flax, Equinox or of this library, or a pair of functions; see
            `flowvi.networks.as_network` for what to pass. It returns the context of the family: an
            array, or a dict where the family has named arguments. Its parameters are part of the
            family's.
        context_shape: the shape of one input of the network, or its size; needed where the network
            does not know it. The input may have any leading axes.

    Raises:
        TypeError: if one of them is not of this kind.
        ValueError: if the family takes no context, the network does not take inputs of this
            shape, or its output is not the context of the family.

    Example:
        >>> import jax
        >>> import flowvi as fv
        >>> from flowvi.networks import MLP
        >>> family = fv.conditional(fv.maf(2, context_size=4), MLP(10, (32,), 4))
        >>> params = family.init(jax.random.key(0))
        >>> family.sample(params, jax.random.key(1), context=jax.numpy.ones((5, 10))).shape
        (5, 2)
    """
    _check_family(family)
    network = as_network(network, context_shape)
    inputs = jax.ShapeDtypeStruct((*_BATCH, *network.input_shape), jnp.zeros(()).dtype)
    try:
        params = jax.eval_shape(network.init, jax.random.key(0))
        output = jax.eval_shape(network.apply, params, inputs)
    except Exception as error:
        raise ValueError(
            f"`network` must map inputs of shape {network.input_shape} in evaluation; {network!r} "
            f"raised {type(error).__name__}: {error}. Perhaps it draws random numbers, and wants a "
            "flag such as `is_training` to know when not to?"
        ) from error
    _check_output(family, network, output)
    trained = jax.eval_shape(network.train_apply, params, jax.random.key(0), inputs)
    _check_training(network, (output, params), trained)
    return Conditional(family, network)


#: Leading axes of the input with which a network is tried.
_BATCH = (2, 3)


def _check_training(network: Network, evaluation: PyTree, training: PyTree) -> None:
    """Checks that training gives outputs and parameters of the shapes that evaluation has."""
    kinds = [
        {
            jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(each)
        }
        for each in (evaluation, training)
    ]
    for name in sorted(kinds[0].keys() | kinds[1].keys()):
        there, here = (kind.get(name, "nothing") for kind in kinds)
        if there != here:
            raise ValueError(
                "`network` must return outputs and parameters of the same shapes in training as in "
                f"evaluation; got {here} for {there} from {network!r}."
            )


def _check_output(family: Family, network: Network, output: PyTree) -> None:
    """Checks that the output of a network can be the context of a family."""
    arguments = family.arguments if isinstance(family, Parametric) else None
    wanted = f"an array of shape {family.context_shape}, the context shape of {family!r}"
    if arguments is not None:
        named = ", ".join(f'"{name}": {shape}' for name, shape in arguments.items())
        wanted = f"{wanted}, or a dict of arrays of shapes {{{named}}}"
    got = jax.tree.map(lambda a: tuple(a.shape), output)
    expected: PyTree = _BATCH + (family.context_shape or ())
    if isinstance(output, Mapping) and arguments is not None:
        expected = {name: _BATCH + shape for name, shape in arguments.items()}
    if got != expected:
        inner = jax.tree.map(lambda a: a.shape[len(_BATCH) :], output)
        raise ValueError(f"`network` must return {wanted}; got {inner} from {network!r}.")


# --------------------------------------------------------------------------------- from a table


@dataclasses.dataclass(frozen=True, repr=False)
class Local(Composed):
    """A family whose context stands in a table, {"family", "rows"}; see `local`."""

    family: Family
    num_rows: int

    def __repr__(self) -> str:
        return shown("local", self.family, self.num_rows)

    @property
    def context_shape(self) -> Shape:
        """(), for the number of a row."""
        return ()

    def own(self, key: Array) -> dict[str, Params]:
        del key
        return {"rows": PerRow(jnp.zeros((self.num_rows, *(self.family.context_shape or ()))))}

    def with_rows(self, params: Params, rows: PyTree) -> Params:
        """Parameters with other rows.

        Args:
            params: parameters as `init` returns them, or others with "family" in them.
            rows: the context of the inner family for each row, of shape [num_rows, *context].
        """
        return {"family": params["family"], "rows": PerRow(rows), "origin": Origin(self)}

    def features(self, params: Params, context: Context) -> Context:
        """The rows of the table; those that are out of range are NaN."""
        self.check_context(context)
        return params["rows"].take(context)

    def check_context(self, context: Context) -> Shape:
        """The batch shape that `context` stands for.

        Raises:
            TypeError: if the context does not hold integers.
            ValueError: also if a row is out of range, which can be told outside of `jit` only.
        """
        shape = super().check_context(context)
        dtype = jnp.result_type(context)
        if not jnp.issubdtype(dtype, jnp.integer):
            raise TypeError(
                f"`context` must hold numbers of rows, integers, for {self!r}; got dtype {dtype}."
            )
        if not isinstance(context, jax.core.Tracer):
            rows = np.asarray(context)
            bad = rows[(rows < 0) | (rows >= self.num_rows)]
            if bad.size:
                raise ValueError(
                    f"`context` must hold numbers of rows from 0 to {self.num_rows - 1}, those "
                    f"that {self!r} has parameters for; got {bad[0]}. Perhaps fit new rows with "
                    "`fv.fit_rows`?"
                )
        return shape


def local(family: Family, num_rows: int) -> Local:
    """An unamortized family: each row of the data has parameters of its own, shared by no network.

        q_i = family at context c_i,   c_i a parameter of row i

    Its context is the number of the row. As a posterior it is that of a model without an encoder:
    each observation has its own parameters of q(z), such as the location and the scale of
    `fv.gaussian`. What else the inner family has for parameters, such as the layers of a flow with
    a context, all rows share.

    `fv.fit` moves just the rows of a batch, and just their part of the optimizer's state; a step
    costs the same at any number of rows. The batch says under "row" which they are, as in
    `data={"x": x, "row": jnp.arange(len(x))}`, and `fv.fit_vae` adds that by itself. New rows are
    fitted against a frozen model by `fv.fit_rows`.

    Args:
        family: a family with a context. All rows begin at the context 0: a standard normal, of a
            normal.
        num_rows: the number of rows.

    Raises:
        TypeError: if `family` is no family, or `num_rows` no integer.
        ValueError: if the family takes no context, or `num_rows` is below 1.

    Source: Hoffman, Blei, Wang, Paisley, "Stochastic Variational Inference", 2013.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import flowvi as fv
        >>> family = fv.local(fv.gaussian(3), 100)
        >>> params = family.init(jax.random.key(0))
        >>> params["rows"].value.shape
        (100, 6)
        >>> family.sample(params, jax.random.key(1), context=jnp.array([5, 0, 99])).shape
        (3, 3)
    """
    _check_family(family, ", which each row then has for itself")
    return Local(family, checks.positive_int("num_rows", num_rows))


# ---------------------------------------------------------------------- a parameter of its own


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
        own = params["context"]
        return own.value if isinstance(own, Fixed) else own


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
    _check_family(family)
    return Unconditional(family, bool(learned))
