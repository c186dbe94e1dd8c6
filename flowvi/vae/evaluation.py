"""What a model makes of rows of data, in bounded memory at any number of draws.

Rows go through in chunks, and so do the draws of a row. The draws of row i depend on the key and on
i alone, and the first K of them are the same whatever comes after: no result depends on the chunks,
nor on which other rows there are.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import distrax
import jax
import jax.numpy as jnp
import numpy as np

from flowvi.compiling import compiled
from flowvi.families import Family
from flowvi.objectives import closed_form

Array = jax.Array

#: Evaluations of the decoder that are in memory together.
CHUNK = 4096

#: Draws of one row that are, at most.
DRAWS = 64

KL_RULES = ("auto", "analytic", "sampled")


class Model(Protocol):
    """The three families, hashable."""

    @property
    def prior(self) -> Family:
        """p(z)."""

    @property
    def likelihood(self) -> Family:
        """p(x | z)."""

    @property
    def posterior(self) -> Family:
        """q(z | x)."""

    @property
    def is_local(self) -> bool:
        """Whether each row has its own posterior, whose context is the row's number."""

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one x."""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one z."""


class Evaluation(NamedTuple):
    """What K draws of q(z | x) say about each row, in nats.

    Attributes:
        elbo: the evidence lower bound, -rate - distortion.
        rate: KL(q(z | x) || p(z)).
        distortion: -E_q log p(x | z).
        log_likelihood: log (1/K sum_k p(x, z_k) / q(z_k | x)), at most log p(x) in expectation.
    """

    elbo: Any
    rate: Any
    distortion: Any
    log_likelihood: Any


class Terms(NamedTuple):
    """Log densities at one draw.

    Attributes:
        prior: log p(z).
        likelihood: log p(x | z).
        posterior: log q(z | x).
    """

    prior: Array
    likelihood: Array
    posterior: Array


class _Sums(NamedTuple):
    """What is kept of the draws of a row: sums of terms, and of weights relative to the largest."""

    terms: Terms
    largest: Array
    weights: Array


def log_likelihood_of(likelihood: Family, params: Any, x: Array, z: Array) -> Array:
    """log p(x | z) of shape [*batch], for x of shape [*batch, *event] and z likewise."""
    return likelihood.distribution(params["likelihood"], z).log_prob(x)


def row_keys(key: Array, num_rows: int) -> Array:
    """A key for each row."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(num_rows))


def draw_keys(row_key: Array, first: Array, count: int) -> Array:
    """The keys of draws number first, ..., first + count - 1 of a row."""
    return jax.vmap(functools.partial(jax.random.fold_in, row_key))(first + jnp.arange(count))


def over_rows(function: Callable[..., Any], rows: Any, draws: int, chunk_size: int = CHUNK) -> Any:
    """`function` of each row, as many rows together as chunk_size evaluations of `draws` allow."""
    num_rows = jax.tree.leaves(rows)[0].shape[0]
    together = max(1, min(num_rows, chunk_size // draws))
    return jax.lax.map(lambda row: function(*row), rows, batch_size=together)


def _draw_terms(model: Model, params: Any, q: Any, x: Array, key: Array) -> Terms:
    z, log_q = q.sample_and_log_prob(seed=key)
    return Terms(
        model.prior.distribution(params["prior"]).log_prob(z),
        log_likelihood_of(model.likelihood, params, x, z),
        log_q,
    )


def _add(sums: _Sums, terms: Terms, counts: Array) -> _Sums:
    """Takes in a chunk of draws; `counts` says which of them."""
    total = jax.tree.map(
        lambda old, new: old + jnp.sum(jnp.where(counts, new, 0)), sums.terms, terms
    )
    log_weights = jnp.where(counts, terms.prior + terms.likelihood - terms.posterior, -jnp.inf)
    largest = jnp.maximum(sums.largest, jnp.max(log_weights))
    # Where no draw has had a weight yet there is nothing to subtract.
    middle = jnp.where(jnp.isneginf(largest), 0, largest)
    weights = sums.weights * jnp.exp(sums.largest - middle)
    return _Sums(total, largest, weights + jnp.sum(jnp.exp(log_weights - middle)))


def closed_rate(model: Model, params: Any, q: distrax.Distribution, kl: str) -> Array | None:
    """KL(q || p(z)) where it has a closed form and is to be taken; else None."""
    if kl == "sampled":
        return None
    try:
        return closed_form.kl_divergence(q, model.prior.distribution(params["prior"]))
    except NotImplementedError:
        if kl == "analytic":
            raise
        return None


@compiled(static_argnums=(6, 7, 8))
def evaluate(
    model: Model,
    params: Any,
    key: Array,
    x: Array,
    context: Array,
    num_samples: Array | np.int32,
    draws: int,
    kl: str,
    chunk_size: int,
) -> Evaluation:
    """The evaluation of rows x of shape [N, *event]: arrays of shape [N].

    Args:
        model: the three families.
        params: their parameters.
        key: a random key.
        x: the rows.
        context: the context of the posterior for each: x itself, or the row's number.
        num_samples: K, traced: one program serves any number.
        draws: draws of a row that are in memory together.
        kl: the rule for the rate.
        chunk_size: evaluations of the decoder that are in memory together.
    """

    def of_row(key: Array, x: Array, context: Array) -> Evaluation:
        q = model.posterior.distribution(params["posterior"], context)

        def chunk(index: Array, sums: _Sums) -> _Sums:
            keys = draw_keys(key, index * draws, draws)
            terms = jax.vmap(functools.partial(_draw_terms, model, params, q, x))(keys)
            return _add(sums, terms, index * draws + jnp.arange(draws) < num_samples)

        shapes = jax.eval_shape(functools.partial(_draw_terms, model, params, q, x), key)
        dtype = jnp.result_type(*shapes)
        zero = Terms(*(jnp.zeros((), shape.dtype) for shape in shapes))
        start = _Sums(zero, jnp.full((), -jnp.inf, dtype), jnp.zeros((), dtype))
        sums = jax.lax.fori_loop(0, -(-num_samples // draws), chunk, start)
        mean = jax.tree.map(lambda total: total / num_samples, sums.terms)
        rate = closed_rate(model, params, q, kl)
        rate = mean.posterior - mean.prior if rate is None else rate
        return Evaluation(
            elbo=mean.likelihood - rate,
            rate=rate,
            distortion=-mean.likelihood,
            log_likelihood=sums.largest + jnp.log(sums.weights / num_samples),
        )

    return over_rows(of_row, (row_keys(key, x.shape[0]), x, context), draws, chunk_size)


@compiled(static_argnums=(5, 6, 7))
def log_weights(
    model: Model,
    params: Any,
    key: Array,
    x: Array,
    context: Array,
    num_samples: int,
    draws: int,
    chunk_size: int,
) -> Array:
    """log p(x, z_k) - log q(z_k | x) of shape [K, N], at the draws that `evaluate` takes."""
    num_chunks = -(-num_samples // draws)

    def of_row(key: Array, x: Array, context: Array) -> Array:
        q = model.posterior.distribution(params["posterior"], context)

        def chunk(index: Array) -> Array:
            keys = draw_keys(key, index * draws, draws)
            terms = jax.vmap(functools.partial(_draw_terms, model, params, q, x))(keys)
            return terms.prior + terms.likelihood - terms.posterior

        return jax.lax.map(chunk, jnp.arange(num_chunks)).reshape(-1)[:num_samples]

    rows = over_rows(of_row, (row_keys(key, x.shape[0]), x, context), draws, chunk_size)
    return rows.T


@compiled(static_argnums=(5, 6))
def prior_bound(
    model: Model,
    params: Any,
    key: Array,
    x: Array,
    num_samples: Array | np.int32,
    draws: int,
    chunk_size: int,
) -> Array:
    """log (1/K sum_k p(x | z_k)) of shape [N], with draws of the prior that all rows share."""
    prior = model.prior.distribution(params["prior"])
    together = max(1, chunk_size // draws)

    def of_rows(x: Array) -> Array:
        def chunk(index: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            keys = draw_keys(key, index * draws, draws)
            z = jax.vmap(lambda key: prior.sample(seed=key))(keys)
            # The decoder sees each draw once, whatever the number of rows.
            p = model.likelihood.distribution(params["likelihood"], z)
            terms = jax.vmap(lambda x: p.log_prob(jnp.broadcast_to(x, (draws, *x.shape))))(x)
            counts = index * draws + jnp.arange(draws) < num_samples
            terms = jnp.where(counts, terms, -jnp.inf)
            largest = jnp.maximum(sums[0], terms.max(-1))
            middle = jnp.where(jnp.isneginf(largest), 0, largest)
            old = sums[1] * jnp.exp(sums[0] - middle)
            return largest, old + jnp.sum(jnp.exp(terms - middle[:, None]), -1)

        lowest = jnp.full(x.shape[0], -jnp.inf, jnp.result_type(float))
        start = (lowest, jnp.zeros_like(lowest))
        largest, total = jax.lax.fori_loop(0, -(-num_samples // draws), chunk, start)
        return largest + jnp.log(total / num_samples)

    return map_blocks(of_rows, x, together)


def map_blocks(function: Callable[[Array], Array], x: Array, size: int) -> Array:
    """`function` of blocks of rows, put together again."""
    num_rows = x.shape[0]
    size = min(size, num_rows)
    whole = num_rows - num_rows % size
    parts = []
    if whole:
        blocks = jax.lax.map(function, x[:whole].reshape(-1, size, *x.shape[1:]))
        parts.append(blocks.reshape(-1))
    if whole < num_rows:
        parts.append(function(x[whole:]))
    return jnp.concatenate(parts)
