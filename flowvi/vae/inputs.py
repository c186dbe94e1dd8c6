"""What the methods of a model are given, checked and in one form."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowvi import checks
from flowvi.vae.batches import as_float
from flowvi.vae.evaluation import DRAWS, Model

Array = jax.Array
Params = dict[str, Any]
Shape = tuple[int, ...]

#: The keys of a model's parameters.
NAMES = ("prior", "likelihood", "posterior")


def check_x(vae: Model, x: Any) -> Array:
    """x of shape [*batch, *event].

    Raises:
        ValueError: if it has another shape.
    """
    checks.trailing_shape("x", x, vae.event_shape, f"the likelihood {vae.likelihood!r}")
    return jnp.asarray(x)


def check_z(vae: Model, z: Any) -> Array:
    """z of shape [*batch, *latent].

    Raises:
        ValueError: if it has another shape.
    """
    checks.trailing_shape("z", z, vae.latent_shape, f"the prior {vae.prior!r}")
    return jnp.asarray(z)


def as_rows(vae: Model, x: Any) -> tuple[Array, Shape]:
    """x with one axis of rows, and the axes it had."""
    x = check_x(vae, x)
    return x.reshape(-1, *vae.event_shape), x.shape[: x.ndim - len(vae.event_shape)]


def context(vae: Model, x: Any, rows: Any) -> Array:
    """The context of the posterior: x, or the numbers of its rows, of shape [*batch, *context].

    Raises:
        TypeError: if rows are no integers.
        ValueError: if rows are out of range, not as many as those of x, or superfluous.
    """
    x = check_x(vae, x)
    if not vae.is_local:
        if rows is not None:
            raise ValueError(
                "`rows` must be None for an amortized posterior, which needs x alone; got rows for "
                f"{vae.posterior!r}."
            )
        return as_float(x)
    batch_shape = x.shape[: x.ndim - len(vae.event_shape)]
    if rows is None:
        rows = np.arange(math.prod(batch_shape)).reshape(batch_shape)
    elif np.shape(rows) != batch_shape:
        raise ValueError(
            f"`rows` must have shape {batch_shape}, that of the rows of `x`; got shape "
            f"{np.shape(rows)}."
        )
    vae.posterior.check_context(rows)
    return jnp.asarray(rows)


def with_context(vae: Model, x: Any, rows: Any) -> tuple[Array, Array, Shape]:
    """x and the posterior's context with one axis of rows, and the axes they had; see `context`."""
    given = context(vae, x, rows)
    x, batch_shape = as_rows(vae, x)
    return x, given.reshape(-1, *vae.posterior.context_shape), batch_shape


def as_shape(sample_shape: Any) -> Shape:
    """A shape, from a shape or an integer."""
    return (int(sample_shape),) if np.ndim(sample_shape) == 0 else tuple(sample_shape)


def own(params: Params) -> Params:
    """The model's own parameters: a fit's may hold the state of an objective beside them."""
    return {name: params[name] for name in NAMES}


def counts(num_samples: int, chunk_size: int) -> tuple[int, int, int]:
    """(draws, draws of a row in memory together, chunk size)."""
    num_samples = checks.positive_int("num_samples", num_samples)
    chunk_size = checks.positive_int("chunk_size", chunk_size)
    # Powers of two, so that there are few programs.
    draws = min(1 << (num_samples - 1).bit_length(), DRAWS, 1 << (chunk_size.bit_length() - 1))
    return num_samples, draws, chunk_size
