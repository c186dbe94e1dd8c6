"""Autoregressive bijectors: one map, and the same map turned round."""

from collections.abc import Callable

import distrax
import jax
import jax.numpy as jnp

from flowvi import checks, triangular
from flowvi.bijectors.score import through_inverse
from flowvi.masked import Conditioner
from flowvi.params import Array
from flowvi.transformers import Affine, Transformer

ConditionerFn = Callable[[Array], Array]
TransformerFn = Callable[[Array], distrax.Bijector]


class IAF(distrax.Bijector):
    """Inverse autoregressive flow: y_i = t(x_i; theta_i), theta = conditioner(x).

    theta_i may depend on coordinates that stand before i in the conditioner's input order, so the
    Jacobian is triangular in that order and

        log |det J(x)| = sum_i log |dt/dx (x_i; theta_i)|.

    `forward` is one pass of the conditioner. `inverse` costs about as much where the conditioner's
    weights can be seen (see `flowvi.triangular`): where it is a `flowvi.MADE`, or what `MADE.bind`
    and the families give, or takes a coordinate at a time (`flowvi.triangular.Tokens`), with a
    transformer that knows its `num_params` and is hashable. For any other callable it costs D
    passes.

    Args:
        conditioner: a callable from x of shape [..., D] to theta of shape [..., D, P] that is
            autoregressive; also a Haiku module inside `hk.transform`.
        transformer: a callable from theta of shape [..., P] to a scalar bijector, such as
            `flowvi.transformers.Affine()`, which is the default, or `Spline()`.

    Raises:
        TypeError: if `conditioner` or `transformer` is not callable.

    Source: Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling, "Improving Variational Inference
    with Inverse Autoregressive Flow", 2016.

    Example:
        >>> import jax.numpy as jnp
        >>> import flowvi as fv
        >>> before = lambda x: jnp.roll(x, 1, -1).at[..., 0].set(0)
        >>> layer = fv.IAF(lambda x: jnp.stack([before(x), 0 * x], -1))
        >>> y, log_det = layer.forward_and_log_det(jnp.array([1.0, 2.0]))
        >>> layer.inverse(y)
        Array([1., 2.], dtype=float32)
    """

    def __init__(self, conditioner: ConditionerFn, transformer: TransformerFn | None = None):
        self.conditioner = conditioner
        self.transformer = Affine() if transformer is None else transformer
        for name in ("conditioner", "transformer"):
            if not callable(value := getattr(self, name)):
                raise TypeError(f"`{name}` must be callable; got {checks.shown(value)}.")
        super().__init__(event_ndims_in=1)

    def __repr__(self) -> str:
        return f"IAF({checks.shown(self.conditioner)}, {checks.shown(self.transformer)})"

    def _scalar_bijector(self, x: Array) -> distrax.Bijector:
        return self.transformer(checked_theta(self.conditioner, self.transformer, x))

    def forward_and_log_det(self, x: Array) -> tuple[Array, Array]:
        self._check_forward_input_shape(x)
        y, log_det = self._scalar_bijector(x).forward_and_log_det(x)
        return y, log_det.sum(-1)

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        self._check_inverse_input_shape(y)
        y = jnp.asarray(y)
        known = self._masked("y", y)
        if isinstance(self.conditioner, triangular.Tokens) and isinstance(
            self.transformer, Transformer
        ):
            return triangular.inverse_by_tokens(self.conditioner, self.transformer, y)
        if known is None:
            return invert_by_passes(self._scalar_bijector, y)
        return triangular.inverse_and_log_det(*known, y)

    def forward_with_score(self, x: Array, score: Array) -> tuple[Array, Array, Array]:
        self._check_forward_input_shape(x)
        known = self._masked("x", x)
        if known is None:
            return through_inverse(self, x, score)
        return triangular.forward_with_score(*known, x, score)

    def _masked(self, name: str, x: Array) -> tuple[Conditioner, Transformer] | None:
        """Conditioner and transformer, if their weights and configuration are visible."""
        # A module such as `flowvi.MADE` shows its weights when it is bound.
        bind = getattr(self.conditioner, "bind", None)
        conditioner = self.conditioner if bind is None else bind()
        if isinstance(conditioner, Conditioner) and isinstance(self.transformer, Transformer):
            checks.trailing_shape(name, x, (conditioner.network.event_size,), self.name)
            return conditioner, self.transformer
        return None

    def same_as(self, other: distrax.Bijector) -> bool:
        return (
            isinstance(other, IAF)
            and self.conditioner is other.conditioner
            and self.transformer == other.transformer
        )


class MAF(distrax.Inverse):
    """Masked autoregressive flow: the inverse of `IAF` with the same arguments.

        x_i = t^{-1}(y_i; theta_i),  theta = conditioner(y),  for x -> y the inverse direction.

    `inverse` is one pass of the conditioner: the density is cheap. `forward` finds y_1, ..., y_D
    one after the other.

    Args:
        conditioner: as in `IAF`; it sees the data side of the map.
        transformer: as in `IAF`; it maps the data side to the base side.

    Source: Papamakarios, Pavlakou, Murray, "Masked Autoregressive Flow for Density Estimation",
    2017.

    Example:
        >>> import jax.numpy as jnp
        >>> import flowvi as fv
        >>> shift = lambda y: jnp.stack([jnp.roll(y, 1, -1).at[..., 0].set(0), 0 * y], -1)
        >>> fv.MAF(shift).forward(jnp.array([1.0, 2.0]))
        Array([1., 1.], dtype=float32)
    """

    def __init__(self, conditioner: ConditionerFn, transformer: TransformerFn | None = None):
        super().__init__(IAF(conditioner, transformer))

    def __repr__(self) -> str:
        inner = self.bijector
        return f"MAF({checks.shown(inner.conditioner)}, {checks.shown(inner.transformer)})"

    @property
    def name(self) -> str:
        return type(self).__name__

    def same_as(self, other: distrax.Bijector) -> bool:
        return isinstance(other, distrax.Inverse) and self.bijector.same_as(other.bijector)


def checked_theta(conditioner: ConditionerFn, transformer: TransformerFn, x: Array) -> Array:
    """conditioner(x), after a check that it is of shape [..., size of x, P]."""
    theta = conditioner(x)
    num_params = getattr(transformer, "num_params", None)
    size, shape = jnp.shape(x)[-1], jnp.shape(theta)
    if len(shape) < 2 or shape[-2] != size or num_params not in (None, shape[-1]):
        wanted = f"[..., {size}, {'P' if num_params is None else num_params}]"
        given = f"x of shape {jnp.shape(x)} and transformer {checks.shown(transformer)}"
        rule = f"`conditioner` must return an array of shape {wanted} for {given}"
        raise ValueError(f"{rule}; got shape {shape}.")
    return theta


def invert_by_passes(
    scalar_bijector: Callable[[Array], distrax.Bijector], y: Array
) -> tuple[Array, Array]:
    """(x, log_det) of an autoregressive map of unknown order, by D passes of the conditioner.

    Pass k computes every coordinate from the values of pass k - 1. Coordinate k is right from pass
    k on, whatever stood in those behind it.
    """
    # The first pass stands outside of the loop: it fixes the shapes, and a Haiku module may create
    # its parameters there, which it may not inside of a scan.
    first = scalar_bijector(jnp.zeros_like(y)).inverse_and_log_det(y)

    def one_pass(state: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        # What is not determined yet may overflow, and zero weights times infinity is NaN.
        x = jnp.where(jnp.isfinite(state[0]), state[0], 0)
        return scalar_bijector(x).inverse_and_log_det(y), None

    (x, log_det), _ = jax.lax.scan(one_pass, first, None, length=y.shape[-1] - 1)
    return x, log_det.sum(-1)
