"""The yardstick: one dense masked pass of an affine autoregressive layer, in plain jax.numpy.

    h_1 = silu(x (W_1 * M_1) + b_1),  h_l = silu(h_{l-1} (W_l * M_l) + b_l)
    (m, r) = h_L (W * M) + b
    y_k = x_k exp(tanh(r_k)) + m_k,   log |det J| = sum_k tanh(r_k)

Measured times are quoted in multiples of it, so this file is frozen: it does not follow the
library, uses nothing of it, and is never made faster or slower.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np


def masks(event_size, hidden_sizes):
    """A 0/1 matrix for each layer, as numpy arrays of shape [in, out]."""
    inputs = np.arange(1, event_size + 1)
    degrees = [inputs]
    for size in hidden_sizes:
        degrees.append(1 + np.arange(size) * max(event_size - 1, 1) // size)
    result = [
        (below[:, None] <= above[None, :]).astype(np.float32)
        for below, above in itertools.pairwise(degrees)
    ]
    last = (degrees[-1][:, None] < inputs[None, :]).astype(np.float32)
    result.append(np.concatenate([last, last], axis=1))
    return result


def init(key, event_size, hidden_sizes):
    """Weights and biases of each layer, in single precision."""
    sizes = [event_size, *hidden_sizes, 2 * event_size]
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        (jax.random.normal(k, (a, b), jnp.float32) / a**0.5, jnp.zeros(b, jnp.float32))
        for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def forward(params, layer_masks, x):
    """y of shape [n, D] and the log-determinant of shape [n]."""
    h = x
    for index, ((w, b), mask) in enumerate(zip(params, layer_masks, strict=True)):
        h = h if index == 0 else jax.nn.silu(h)
        h = h @ (w * mask) + b
    shift, raw = jnp.split(h, 2, axis=-1)
    log_scale = jnp.tanh(raw)
    return x * jnp.exp(log_scale) + shift, log_scale.sum(-1)


def loss(y, log_det):
    """The scalar whose gradient is measured."""
    return jnp.mean(jnp.sum(y**2, axis=-1)) - jnp.mean(log_det)
