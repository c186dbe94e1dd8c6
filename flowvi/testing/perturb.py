"""Badly conditioned parameters."""

import jax
import jax.numpy as jnp
import numpy as np

from flowvi.params import Fixed, PyTree


def perturbed(params: PyTree, scale: float, seed: int) -> PyTree:
    """Adds scale * N(0, 1) to every float leaf outside `flowvi.Fixed`.

    A new flow is the identity, which has every property. Perturbed by 0.3 it is a rugged map, and
    by 10 or more its transformers stand at their bounds.

    Args:
        params: any pytree of arrays.
        scale: the standard deviation of the noise.
        seed: the seed of the noise; the noise of a leaf does not depend on its dtype.

    Returns:
        A pytree of the same structure, shapes and dtypes.

    Example:
        >>> import jax
        >>> import flowvi as fv
        >>> family = fv.maf(2, num_layers=1, hidden_sizes=[8])
        >>> params = perturbed(family.init(jax.random.key(0)), scale=0.3, seed=0)
        >>> bool(family.log_prob(params, jax.numpy.zeros(2)) != -jax.numpy.log(2 * jax.numpy.pi))
        True
    """
    rng = np.random.default_rng(seed)
    is_leaf = lambda node: isinstance(node, Fixed)  # noqa: E731
    return jax.tree.map(lambda node: _noisy(node, scale, rng), params, is_leaf=is_leaf)


def _noisy(node: PyTree, scale: float, rng: np.random.Generator) -> PyTree:
    if isinstance(node, Fixed) or not jnp.issubdtype(jnp.result_type(node), jnp.floating):
        return node
    noise = scale * rng.standard_normal(jnp.shape(node))
    # In numpy where it can be, for JAX would compile a program for every shape.
    node = node if isinstance(node, jax.core.Tracer) else np.asarray(node)
    return jnp.asarray(node + noise.astype(node.dtype))
