"""The block neural autoregressive map: one network whose blocks along the diagonal increase."""

from collections.abc import Sequence

import distrax
import jax
import jax.numpy as jnp
import numpy as np

from flowvi.params import Array
from flowvi.roots import root
from flowvi.smooth import bounded

#: Of one coordinate: the weights of its own block and what all others add, by layer; its log-scale.
Own = tuple[tuple[Array, ...], tuple[Array, ...], Array]


class _Column:
    """y = exp(s) x + the network of one coordinate's own units, others known."""

    def evaluate(self, theta: Own, x: Array) -> tuple[Array, Array]:
        weights, others, log_scale = theta
        h, slope = x[..., None], jnp.ones((1,), x.dtype)
        for index, (w, other) in enumerate(zip(weights, others, strict=True)):
            z, slope = h @ w.T + other, slope @ w.T
            h = z if index == len(weights) - 1 else jnp.tanh(z)
            slope = slope if index == len(weights) - 1 else slope * (1 - h * h)
        scale = jnp.exp(log_scale)
        return scale * x + h[..., 0], scale + slope[..., 0]

    def bracket(self, theta: Own, y: Array) -> tuple[Array, Array]:
        # Units lie between -1 and 1.
        weights, others, log_scale = theta
        middle, reach = y - others[-1][..., 0], weights[-1].sum()
        scale = jnp.exp(-log_scale)
        return scale * (middle - reach), scale * (middle + reach)


COLUMN = _Column()


class BlockAutoregressive(distrax.Bijector):
    """y_d = exp(s_d) x_d + f_d(x_1, ..., x_d), f_d increasing in x_d: a network of blocks.

        h_l = tanh(W_l h_{l-1} + b_l),   f = W_o h_L + b_o

    Each coordinate has K_l units in layer l. Blocks of W from earlier coordinates are free, those
    of a coordinate to itself are positive, and later ones are zero. So the Jacobian is triangular,
    its diagonal is a product of the blocks, and `forward` is one pass. `inverse` walks over the
    coordinates: each is one root of its own small network, to which the earlier ones add what they
    have computed, so that all networks together cost about one pass beside the searches.

    Args:
        weights: raw, by layer, the last one that of the outputs: of shape [D, K_l, D, K_{l-1}],
            with K_0 = 1 and one output a coordinate. Those of own blocks are logarithms.
        biases: of shape [..., D, K_l].
        log_scale: s, of shape [D]; bounded by 5.

    Source: De Cao, Aziz, Titov, "Block Neural Autoregressive Flow", 2019.
    """

    def __init__(self, weights: Sequence[Array], biases: Sequence[Array], log_scale: Array):
        super().__init__(event_ndims_in=1)
        self._log_scale = bounded(log_scale, 5.0)
        self._biases = list(biases)
        self._own: list[Array] = []  # [D, K_l, K_{l-1}]
        self._earlier: list[Array] = []
        places = np.arange(log_scale.shape[-1])
        for raw in weights:
            own = jnp.exp(bounded(raw[places, :, places, :], 5.0)) / raw.shape[-1]
            self._own.append(own)
            is_earlier = (places[:, None] > places)[:, None, :, None]
            seen = (np.maximum(places, 1) * raw.shape[-1])[:, None, None, None]
            self._earlier.append(jnp.where(is_earlier, raw * jnp.asarray(seen**-0.5, raw.dtype), 0))

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        self._check_forward_input_shape(x)
        h, others = x[..., None], []
        for index, (earlier, own) in enumerate(zip(self._earlier, self._own, strict=True)):
            others.append(jnp.einsum("...ei,dkei->...dk", h, earlier) + self._biases[index])
            h = jnp.tanh(jnp.einsum("...di,dki->...dk", h, own) + others[-1])
        theta = (tuple(self._own), tuple(others), self._log_scale)
        axes = (0, tuple(jnp.ndim(other) - 2 for other in others), 0)
        of_all = jax.vmap(COLUMN.evaluate, in_axes=(axes, x.ndim - 1), out_axes=-1)
        y, slope = of_all(theta, x)
        return y, jnp.log(slope).sum(-1)

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        self._check_inverse_input_shape(y)
        lead = jnp.broadcast_shapes(y.shape[:-1], *(b.shape[:-2] for b in self._biases))
        size, dtype = y.shape[-1], jnp.result_type(y, *self._own)
        hs = [jnp.zeros((*lead, size, own.shape[-1]), dtype) for own in self._own]
        y = jnp.broadcast_to(y, (*lead, size))

        def step(hs: list[Array], d: Array) -> tuple[list[Array], tuple[Array, Array]]:
            of = lambda array, axis: jnp.take(array, d, axis=axis)  # noqa: E731
            own = tuple(of(each, 0) for each in self._own)
            others = []
            for h, earlier, bias in zip(hs, self._earlier, self._biases, strict=True):
                others.append(jnp.einsum("...ei,kei->...k", h, of(earlier, 0)) + of(bias, -2))
            theta = (own, tuple(others), of(self._log_scale, -1))
            x = root(COLUMN, theta, of(y, -1))
            slope, h, new = COLUMN.evaluate(theta, x)[1], x[..., None], []
            here = (jnp.arange(size) == d)[:, None]
            for old, w, other in zip(hs, own, others, strict=True):
                new.append(jnp.where(here, h[..., None, :], old))
                h = jnp.tanh(h @ w.T + other)
            return new, (x, -jnp.log(slope))

        _, (x, log_det) = jax.lax.scan(step, hs, jnp.arange(size))
        return jnp.moveaxis(x, 0, -1), log_det.sum(0)

    def same_as(self, other: distrax.Bijector) -> bool:
        return self is other
