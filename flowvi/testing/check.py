"""`check_bijector`: the properties, applied; and badly conditioned parameters to apply them to."""

from collections.abc import Callable, Iterable, Sequence

import distrax
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from flowvi import checks
from flowvi.params import Fixed, PyTree
from flowvi.testing.properties import EVALUATIONS, PROPERTIES, shape
from flowvi.testing.trial import BrokenError, Trial


def check_bijector(
    bijector: distrax.Bijector | Callable[[jax.Array], jax.Array],
    x: ArrayLike,
    *,
    order: Sequence[int] | None = None,
    batch_shape: Sequence[int] = (),
    properties: Iterable[str] | None = None,
    tolerance: float | None = None,
    max_autodiff_size: int = 33,
) -> None:
    """Checks that a bijector has the properties of a bijector, on a batch of events.

    With f the bijector, J its Jacobian at a row of x, y = f(x), and t the tolerance, the
    properties are

    | name | property |
    |---|---|
    | `shape` | y, x are batches of events of the right rank; log-dets have the shape of the batch |
    | `dtype` | results have the dtype of the input, also 32-bit input while 64-bit is enabled |
    | `finite` | finite inputs give finite outputs |
    | `methods` | the methods that return one result agree with those that return both |
    | `round_trip` | f(f^-1(y)) = y up to t scale(y), and f^-1(f(x)) = x up to
      t (scale(x) + abs(J^-1) scale(y)) |
    | `log_det` | the forward log-det is log abs(det J), with J by automatic differentiation |
    | `inverse_log_det` | the log-det of the inverse at y is minus the forward one at f^-1(y) |
    | `inverse_jacobian` | the derivatives of the inverse at y undo those of f at x; up to sqrt(t) |
    | `constant_jacobian` | the Jacobian is the same at all rows, and the log-det does not move,
      where the bijector claims so |
    | `triangular` | where an order is claimed, output order[k] depends on inputs
      order[: k + 1] only, and on order[k] |
    | `batch` | a batch equals its rows alone; further leading axes and an empty batch work |
    | `jit` | rebuilt from its leaves it gives the same results, and is not traced again |
    | `eager` | results without compilation equal those with it |

    Here scale(v) is abs(v), or where that is larger the largest abs(v) of the same coordinate in
    the batch, up to 1. An error in x is judged by the conditioning of the inverse, so that a steep
    map is not blamed for what no floating-point inverse could deliver, nor a flat one forgiven.

    Args:
        bijector: a `distrax.Bijector`, or what `distrax.as_bijector` converts to one.
        x: events in the domain of the bijector, float32 or float64, of shape
            [..., *batch_shape, *event_shape], where the leading axes hold at least one event.
        order: order[k] is the coordinate that stands at position k. None claims no structure.
        batch_shape: the bijector's own batch shape, such as that of a batch of contexts.
        properties: the names of the properties to check; None is all.
        tolerance: t; by default 1e-9 in float64 and 1e-4 in float32.
        max_autodiff_size: `log_det` is skipped for events with more coordinates than this, and
            conditioning is then estimated from a few random directions.

    Raises:
        AssertionError: if a property is broken. The message names each broken one, where it
            broke, by how much, and what was allowed.

    Source: Claessen, Hughes, "QuickCheck", 2000, for properties in the place of examples.

    Example:
        >>> import distrax
        >>> import jax
        >>> from flowvi.testing import check_bijector
        >>> x = jax.random.normal(jax.random.key(0), (5, 3))
        >>> check_bijector(distrax.Block(distrax.Tanh(), 1), x, order=(0, 1, 2))
        >>> class Wrong(distrax.ScalarAffine):
        ...     def forward_and_log_det(self, x):
        ...         y, log_det = super().forward_and_log_det(x)
        ...         return y, -log_det
        >>> check_bijector(Wrong(shift=0.0, scale=2.0), x, properties=["log_det"])
        Traceback (most recent call last):
            ...
        AssertionError: Wrong breaks 1 of 1 properties:
          log_det: the forward log-det against autodiff at row 0: got -0.693..., expected 0.693...
    """
    checks.positive_int("max_autodiff_size", max_autodiff_size)
    names = PROPERTIES if properties is None else properties
    names = {names} if isinstance(names, str) else set(names)
    for name in names - set(PROPERTIES):
        raise ValueError(f"`properties` must be out of {', '.join(PROPERTIES)}; got {name!r}.")
    chosen = [holds for name, holds in PROPERTIES.items() if name in names]
    evaluations = {evaluation for holds in chosen for evaluation in EVALUATIONS[holds]}
    trial = Trial(bijector, x, order, batch_shape, tolerance, max_autodiff_size, evaluations)
    complaints: dict[str, str] = {}
    cause: Exception | None = None
    try:
        _ = trial.compiled
    except BrokenError as error:
        # Without results nothing can be compared.
        complaints, cause, chosen = {str(error): _culprit(trial)}, error, []
    for holds in chosen:
        # One error can stop many properties, and is told once.
        try:
            for complaint in holds(trial):
                complaints.setdefault(complaint, holds.__name__)
        except Exception as error:
            cause = cause or error
            broken = error if isinstance(error, BrokenError) else BrokenError("", error)
            complaints.setdefault(str(broken), holds.__name__)
        if holds is shape and complaints:
            break
    if complaints:
        broken_names = set(complaints.values())
        title = f"{trial.bijector.name} breaks {len(broken_names)} of {len(names)} properties:"
        lines = [f"  {name}: {complaint}" for complaint, name in complaints.items()]
        raise AssertionError("\n".join([title, *lines])) from cause


def _culprit(trial: Trial) -> str:
    """The property to blame for an error in the compiled bijector."""
    try:
        y, _ = trial.bijector.forward_and_log_det(trial.x)
        trial.bijector.inverse_and_log_det(y)
    except Exception:
        return "shape"
    return "jit"


def perturbed(params: PyTree, scale: float, seed: int) -> PyTree:
    """Adds scale * N(0, 1) to every float leaf outside `flowvi.Fixed`.

    A new flow is the identity, which has every property. Perturbed by 0.3 it is a rugged map, and
    by 10 or more its transformers stand at their bounds. The noise of a leaf depends on the seed
    and not on its dtype.

    Args:
        params: parameters, whose `Fixed` leaves stay.
        scale: the standard deviation of what is added.
        seed: of numpy's generator.

    Example:
        >>> from flowvi.testing import perturbed
        >>> print(f"{perturbed(1.0, scale=0.1, seed=0):.3f}")
        1.013
    """
    rng = np.random.default_rng(seed)

    def noisy(node: PyTree) -> PyTree:
        if isinstance(node, Fixed) or not jnp.issubdtype(jnp.result_type(node), jnp.floating):
            return node
        noise = scale * rng.standard_normal(jnp.shape(node))
        # In numpy where it can be, for JAX would compile a program for every shape.
        node = node if isinstance(node, jax.core.Tracer) else np.asarray(node)
        return jnp.asarray(node + noise.astype(node.dtype))

    return jax.tree.map(noisy, params, is_leaf=lambda node: isinstance(node, Fixed))
