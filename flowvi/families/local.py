"""A family whose parameters each row of the data has for itself."""

import dataclasses
from typing import Any

import distrax
import jax
import jax.numpy as jnp
import numpy as np

from flowvi import checks
from flowvi.families.family import Array, Family, Params, Wrapper
from flowvi.params import Origin, PerRow


@dataclasses.dataclass(frozen=True)
class Local(Wrapper):
    """A family whose context stands in a table, row by row; see `local`."""

    family: Family
    num_rows: int

    @property
    def context_shape(self) -> tuple[int, ...]:
        """(), for the number of a row."""
        return ()

    def init(self, key: Array) -> Params:
        """{"family", "rows", "origin"}: parameters that rows share, and those they have not."""
        shape = (self.num_rows, *self.family.context_shape)
        return self.with_rows({"family": self.family.init(key)}, jnp.zeros(shape))

    def with_rows(self, params: Params, rows: Any) -> Params:
        """Parameters with other rows.

        Args:
            params: parameters as `init` returns them.
            rows: the context of the inner family for each row, of shape [num_rows, *context].
        """
        return {"family": params["family"], "rows": PerRow(rows), "origin": Origin(self)}

    def distribution(self, params: Params, context: Array | None = None) -> distrax.Distribution:
        """See `Family.distribution`; a row that is out of range has NaN for parameters."""
        self.check_context(context)
        return self.family.distribution(params["family"], params["rows"].take(context))

    def train_distribution(
        self, params: Params, key: Array, context: Array | None = None
    ) -> tuple[distrax.Distribution, Params]:
        """See `Family.train_distribution`."""
        self.check_context(context)
        own = params["family"]
        inner, new = self.family.train_distribution(own, key, params["rows"].take(context))
        return inner, params if new is own else {**params, "family": new}

    def check_support(self, x: Any, name: str = "x") -> None:
        """See `Family.check_support`."""
        self.family.check_support(x, name)

    def check_context(self, context: Any) -> tuple[int, ...]:
        """See `Family.check_context`.

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
    """A family whose parameters each row of the data has for itself, not shared by a network.

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
    if not isinstance(family, Family):
        raise TypeError(f"`family` must be a family, such as `fv.gaussian(2)`; got {family!r}.")
    if family.context_shape is None:
        raise ValueError(
            "`family` must take a context, which each row then has for itself; got "
            f"{family!r}. Perhaps use `fv.gaussian(...)`, whose context are its parameters?"
        )
    return Local(family, checks.positive_int("num_rows", num_rows))
