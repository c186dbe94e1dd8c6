"""The compiled functions of a model, in bounded memory at any number of draws and rows.

Rows go through in chunks, and so do the draws of a row. The draws of row i depend on the key and on
i alone, and the first K of them are the same whatever comes after: no result depends on the chunks,
nor on which other rows there are.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import distrax
import jax
import jax.numpy as jnp
import numpy as np

from flowvi import devices
from flowvi.compiling import compiled
from flowvi.families import Labelled
from flowvi.objectives import closed_form
from flowvi.objectives.bounds import KLRule
from flowvi.objectives.variational import Params
from flowvi.params import Array, PyTree
from flowvi.vae.families import NAMES, Families, Rows

Count = Array | np.int32
Terms = tuple[tuple[Array, ...], Array]

#: Evaluations of the decoder that are in memory together, and draws of one row at most.
CHUNK, DRAWS = 4096, 64


class Evaluation(NamedTuple):
    """What K draws of q(z | x) say about each row, in nats.

    Attributes:
        elbo: the evidence lower bound, -rate - distortion.
        rate: KL(q(z | x) || p(z)).
        distortion: -E_q log p(x | z).
        log_likelihood: log (1/K sum_k p(x, z_k) / q(z_k | x)), at most log p(x) in expectation.
    """

    elbo: Array
    rate: Array
    distortion: Array
    log_likelihood: Array


class Chunks(NamedTuple):
    """Draws of a row, and evaluations of the decoder, that are in memory together."""

    draws: int
    size: int = CHUNK


def num_rows(rows: PyTree) -> int:
    """The number of rows that arrays have in common."""
    return len(jax.tree.leaves(rows)[0])


def _keys(key: Array, first: Array | int, count: int) -> Array:
    """The keys of rows, or of draws, number first, ..., first + count - 1."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(first + jnp.arange(count))


def over_rows(function: Callable[..., PyTree], rows: tuple[PyTree, ...], chunks: Chunks) -> PyTree:
    """`function` of each row; what is the same for rows of a chunk is computed once in it."""
    together = max(1, min(num_rows(rows), chunks.size // chunks.draws))
    return devices.in_chunks(lambda chunk: jax.vmap(function)(*chunk), rows, together)


def _over_draws(of_draws: Callable[[Array], Terms], key: Array, count: Count, draws: int) -> Terms:
    """The means of terms that `of_draws` makes from keys, and the logarithm of the mean weight."""

    def chunk(index: Array, sums: tuple[PyTree, Array, Array]) -> tuple[PyTree, Array, Array]:
        terms, log_weights = of_draws(_keys(key, index * draws, draws))
        total, largest, weight = sums
        counts = index * draws + jnp.arange(draws) < count
        total = jax.tree.map(lambda old, x: old + jnp.sum(jnp.where(counts, x, 0)), total, terms)
        # Sums of weights are relative to the largest so far.
        log_weights = jnp.where(counts, log_weights, -jnp.inf)
        new = jnp.maximum(largest, jnp.max(log_weights))
        # Where no draw has had a weight yet there is nothing to subtract.
        middle = jnp.where(jnp.isneginf(new), 0, new)
        weight = weight * jnp.exp(largest - middle) + jnp.sum(jnp.exp(log_weights - middle))
        return total, new, weight

    terms, log_weights = jax.eval_shape(of_draws, _keys(key, 0, draws))
    zero, none = jnp.zeros((), log_weights.dtype), jnp.array(-jnp.inf, log_weights.dtype)
    start = jax.tree.map(lambda term: jnp.zeros((), term.dtype), terms), none, zero
    total, largest, weight = jax.lax.fori_loop(0, -(-count // draws), chunk, start)
    return jax.tree.map(lambda term: term / count, total), largest + jnp.log(weight / count)


def _terms(vae: Families, params: Params, q: distrax.Distribution, row: Rows, key: Array) -> Terms:
    """log p(z), log p(x | z), log q(z | x) of a draw of z, and its log weight."""
    z, log_q = q.sample_and_log_prob(seed=key)
    likelihood = vae.distribution("likelihood", params, {**row, "z": z}).log_prob(row["x"])
    prior = vae.distribution("prior", params, row).log_prob(z)
    return (prior, likelihood, log_q), prior + likelihood - log_q


@compiled(static_argnums=(5, 6))
def evaluate(
    vae: Families, params: Params, key: Array, rows: Rows, count: Count, chunks: Chunks, kl: KLRule
) -> Evaluation:
    """The evaluation of rows: one program for any number of draws."""

    def of_row(key: Array, row: Rows) -> Evaluation:
        q = vae.distribution("posterior", params, row)
        of_draws = jax.vmap(functools.partial(_terms, vae, params, q, row))
        means, log_mean = _over_draws(of_draws, key, count, chunks.draws)
        prior, likelihood, posterior = means
        rate = posterior - prior
        if kl != "sampled":
            try:
                p = vae.distribution("prior", params, row)
                rate = closed_form.kl_divergence(q, p)
            except NotImplementedError:
                if kl == "analytic":
                    raise
        return Evaluation(likelihood - rate, rate, -likelihood, log_mean)

    return over_rows(of_row, (_keys(key, 0, num_rows(rows)), rows), chunks)


@compiled(static_argnums=(4, 5))
def log_weights(
    vae: Families, params: Params, key: Array, rows: Rows, count: int, chunks: Chunks
) -> Array:
    """log p(x, z_k) - log q(z_k | x) of shape [K, N], at the draws that `evaluate` takes."""

    def of_row(key: Array, row: Rows) -> Array:
        q = vae.distribution("posterior", params, row)
        keys, together = _keys(key, 0, count), min(count, chunks.draws)
        of_draw = functools.partial(_terms, vae, params, q, row)
        return jax.lax.map(lambda key: of_draw(key)[1], keys, batch_size=together)

    return over_rows(of_row, (_keys(key, 0, num_rows(rows)), rows), chunks).T


@compiled(static_argnums=(5,))
def prior_bound(
    vae: Families, params: Params, key: Array, rows: Rows, num_samples: Count, chunks: Chunks
) -> Array:
    """log (1/K sum_k p(x | z_k)) of shape [N], with draws of the prior whose noise rows share."""

    def of_row(row: Rows) -> Array:
        prior = vae.distribution("prior", params, row)

        def of_draws(keys: Array) -> Terms:
            z = jax.vmap(lambda key: prior.sample(seed=key))(keys)
            p = vae.distribution("likelihood", params, {**row, "z": z})
            return (), p.log_prob(jnp.broadcast_to(row["x"], (len(keys), *row["x"].shape)))

        return _over_draws(of_draws, key, num_samples, chunks.draws)[1]

    return over_rows(of_row, (rows,), chunks)


@compiled()
def init(vae: Families, key: Array) -> Params:
    """Fresh parameters."""
    keys = zip(NAMES, jax.random.split(key, 3), strict=True)
    return {name: getattr(vae, name).init(key) for name, key in keys}


@compiled()
def classify(posterior: Labelled, params: Params, x: Array) -> Array:
    """log q(y | x) of every class."""
    return jax.nn.log_softmax(posterior.classifier.distribution(params["families"][0], x).logits)


@compiled()
def decode(vae: Families, params: Params, given: Rows) -> Array:
    """The mean of p(x | z)."""
    return vae.distribution("likelihood", params, given).mean()
