"""Fitting a density to data, with no settings needed, and what that gives."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Unpack

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from flowvi import checks, files, plotting
from flowvi.compiling import compiled
from flowvi.families import Family, Standardized, as_array, check_key, check_params, standardized
from flowvi.objectives import NegativeLogLikelihood
from flowvi.params import Origin, PyTree
from flowvi.supports import SupportLike
from flowvi.training import Fitted, TrainingOptions, check_names, fit
from flowvi.training.order import Order
from flowvi.training.sources import LazyRows, check_batch_size, check_finite

if TYPE_CHECKING:
    from flowvi.plotting.curves import Figure

Array = jax.Array
Data = dict[str, np.ndarray]

#: Rows of a batch, where there are as many.
BATCH_SIZE = 256

#: Steps: so many epochs, but within these bounds.
EPOCHS, MIN_STEPS, MAX_STEPS = 80, 1_000, 20_000

#: The decay of the parameters' average, whose memory is some hundred steps.
AVERAGING = 0.995

#: Rows that are held out at most.
MAX_HELD_OUT = 20_000

#: Validations over the length of a fit, and how many without a new best end it.
VALIDATIONS, PATIENCE = 50, 15

#: So few rows are warned of.
FEW_ROWS = 20

FIX = "Perhaps drop or fill in those rows?"


@dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Density(Fitted):
    """A density that was fitted to data: it scores, samples and draws pictures, in their units.

    Attributes:
        family: the family, in the units of the data; with `params` it is all that a jitted function
            of one's own needs, as in `family.log_prob(params, x)`.
        dtype: the type of numbers that the data had, which draws have too.
        num_rows: how many rows it was fitted to.
    """

    family: Family
    dtype: str
    num_rows: int

    def __repr__(self) -> str:
        return f"Density({self.family!r}, num_rows={self.num_rows}, {self.result.summary()})"

    def distribution(self, context: ArrayLike | None = None) -> distrax.Distribution:
        """The Distrax distribution, with the batch shape of the context."""
        return self.family.distribution(self.params, context)

    def log_prob(self, x: ArrayLike, context: ArrayLike | None = None) -> Array:
        """Log density in nats, of shape [...] for x of shape [..., *event_shape].

        Raises:
            ValueError: if `x` or `context` has the wrong shape.
        """
        return self.family.log_prob(self.params, x, context)

    def sample(
        self,
        key: Array,
        sample_shape: int | tuple[int, ...] = (),
        context: ArrayLike | None = None,
    ) -> np.ndarray:
        """Draws [*sample_shape, *batch, *event_shape], a numpy array of the type of the data."""
        return self.sample_and_log_prob(key, sample_shape, context)[0]

    def sample_and_log_prob(
        self,
        key: Array,
        sample_shape: int | tuple[int, ...] = (),
        context: ArrayLike | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draws as `sample` gives them, and their log densities, for the price of the draws."""
        if not isinstance(self.family, Standardized):
            draws = self.family.sample_and_log_prob(self.params, key, sample_shape, context)
            return np.asarray(draws[0]), np.asarray(draws[1])
        family, inner = self.family, self.params["family"]
        context = None if context is None else as_array("context", context)
        family.check_context(context)
        with jax.enable_x64(True):  # or contexts that are far from zero would lose what they say
            features = family.features(self.params, context)
        features = None if features is None else np.asarray(features)
        y, log_prob = family.family.sample_and_log_prob(inner, key, sample_shape, features)
        # Units are put on in double precision, as they were taken off.
        x = family.unstandardize(self.params, y)
        log_det = family.standardize(self.params, x)[1]
        return x.astype(self.dtype), np.asarray(log_prob + log_det.astype(log_prob.dtype))

    def plot(
        self,
        x: ArrayLike | None = None,
        *,
        context: ArrayLike | None = None,
        names: Sequence[str] | None = None,
        key: Array | None = None,
    ) -> "Figure":
        """A picture of the density, or at one context of p(x | context), over data where given.

        Args:
            x: data of shape [n, D], or None.
            context: of shape [*context_shape], where the family takes one.
            names: names of the columns.
            key: a random key for the draws.

        See `flowvi.plotting.density`.
        """
        return plotting.density(_At(self, context), x, columns=names, key=key)


@dataclasses.dataclass(frozen=True)
class _At:
    """A density at one context."""

    density: Density
    context: ArrayLike | None

    def sample(self, key: Array, num_samples: int) -> Array:
        return jnp.asarray(self.density.sample(key, num_samples, self.context))

    def log_prob(self, x: ArrayLike) -> Array:
        return self.density.log_prob(x, self.context)


@dataclasses.dataclass(frozen=True)
class _Loss:
    """The negative log likelihood in the units of the data, of rows that are standardised."""

    likelihood: NegativeLogLikelihood

    def __call__(self, params: PyTree, key: Array, batch: dict[str, Array]) -> Array | tuple:
        rows = {name: batch[name] for name in batch if name != "log_det"}
        output = self.likelihood(params, key, rows)
        shift = jnp.mean(batch["log_det"])
        return (output[0] - shift, *output[1:]) if isinstance(output, tuple) else output - shift


def fit_density(
    family: Family,
    x: ArrayLike,
    *,
    key: Array,
    context: ArrayLike | None = None,
    support: SupportLike = None,
    params: PyTree = None,
    validation_fraction: float = 0.1,
    patience: int | None = PATIENCE,
    **options: Unpack[TrainingOptions],
) -> Density:
    """Fits a family to data by maximum likelihood.

    Minimises the mean negative log likelihood -1/n sum_i log p(x_i | context_i; params) of the
    training rows. A random tenth of the rows, at most 20,000, is held out: the result holds the
    parameters that score best on it, and training ends early when it stops improving.

    A family over the reals is placed in the data's own units first, as by `fv.standardized`: in
    their support, with mean and standard deviation of the training rows, and a floating context
    likewise. Data are standardised in double precision, before JAX sees them.

    Args:
        family: any family. Of a conditional one the fit is p(x | context).
        x: array-like of shape [num_rows, *event_shape] of finite numbers. An `np.memmap` may be
            larger than memory: its rows are read as they are needed.
        key: a random key.
        context: array-like of shape [num_rows, *context_shape], where the family takes one.
        support: where draws may lie: None or "real"; "positive"; (low, high), of which either may
            be None or infinite; or a sequence of these, one for each column. Short for
            `fv.standardized(family, support)`.
        params: parameters to start from, such as an earlier density's, which keep their units.
        validation_fraction: the part of the rows to hold out, of 20,000 at most; 0 for none.
            Without it the result holds the last parameters.
        patience: end training when so many validations in a row brought no new best; None for
            never. There are 50 over the length of a fit.
        **options: see `TrainingOptions`. By default 80 epochs, but at least 1000 steps and at most
            20,000; batches of 256 rows; Adam with a learning rate that rises over the first steps
            to 0.01 and falls to zero with the last, and gradients clipped to norm 10; averaging
            with decay 0.995.

    Returns:
        A `Density`, whose losses are in nats a row, in the units of `x`.

    Raises:
        TypeError: if data are not floating numbers, or an argument is of the wrong kind.
        ValueError: if data have the wrong shape, hold NaN or infinity, are constant in a column or
            lie outside the support; or sizes do not go together.
        TrainingDiverged: as in `fit`.

    Example:
        >>> import jax
        >>> import flowvi as fv
        >>> x = 5.0 + jax.random.normal(jax.random.key(0), (500, 2))
        >>> family = fv.maf(2, num_layers=1, hidden_sizes=[8])
        >>> density = fv.fit_density(family, x, key=jax.random.key(1), num_steps=50, progress=False)
        >>> density.log_prob(x).shape, density.sample(jax.random.key(2), 3).shape
        ((500,), (3, 2))
    """
    if not isinstance(family, Family):
        raise TypeError(f"`family` must be a family, such as `fv.maf(2)`; got {family!r}.")
    check_key(key)
    check_names(options)
    own = _placed_family(family, support)
    rows = check_x(family, x)
    context_rows = check_context(family, context, rows)
    own.check_support(rows)
    num_held_out = _num_held_out(validation_fraction, len(rows))
    num_rows = len(rows) - num_held_out
    batch_size = options.get("batch_size")
    if batch_size is None:
        batch_size = min(BATCH_SIZE, num_rows)
    batch_size = check_batch_size(batch_size, num_rows) or num_rows
    if patience is not None:
        checks.positive_int("patience", patience)
    steps = options.get("num_steps")
    if steps is None:
        steps = int(np.clip(EPOCHS * num_rows // batch_size, MIN_STEPS, MAX_STEPS))
    steps = checks.positive_int("num_steps", steps)

    init_key, split_key, fit_key = jax.random.split(key, 3)
    split = _Split(rows, context_rows, split_key, num_held_out)
    params = _start(own, family, params, init_key, split)
    if len(rows) < FEW_ROWS:
        warnings.warn(
            f"`x` has {len(rows)} rows, which are too few to fit a density to and to know how good "
            "it is.",
            RuntimeWarning,
            stacklevel=2,
        )
    standardize = functools.partial(_standardize, own, params)
    inner, inner_params = own, params
    if isinstance(own, Standardized):
        inner, inner_params = own.family, params["family"]
    validation: dict[str, Any] = {}
    if num_held_out:
        validation = {
            "validate": _Loss(NegativeLogLikelihood(inner, training=False)),
            "validation_data": standardize(split.held_out()),
            "validate_every": max(steps // VALIDATIONS, 1),
            "patience": patience,
        }
    given = {name: value for name, value in options.items() if value is not None}
    settings: dict[str, Any] = {
        "optimizer": default_optimizer(steps),
        "averaging": options.get("averaging", AVERAGING),
        **given,
        "num_steps": steps,
        "batch_size": batch_size,
    }
    # The default schedule and the moments of validations depend on the number of steps.
    schedule = {"num_steps": str(steps)} if num_held_out or "optimizer" not in given else {}
    result = fit(
        _Loss(NegativeLogLikelihood(inner)),
        inner_params,
        settings.pop("optimizer"),
        key=fit_key,
        data=split.training(standardize),
        check_finite=False,  # they have been looked at
        configuration={**schedule, **files.describe("family", own)},
        **settings,
        **validation,
    )
    if isinstance(own, Standardized):
        whole = [{**params, "family": each} for each in (result.params, result.last_params)]
        result = dataclasses.replace(result, params=whole[0], last_params=whole[1])
    dtype = rows.dtype if jnp.issubdtype(rows.dtype, jnp.floating) else np.dtype(np.float32)
    return Density(result=result, family=own, dtype=dtype.name, num_rows=num_rows)


def _placed_family(family: Family, support: SupportLike) -> Family:
    """The family in units of its own, where it can have them."""
    if isinstance(family, Standardized) or not family.support.is_real:
        if support is not None:
            raise ValueError(
                f"`support` must be None for a family that has one of its own; got {support!r} for "
                f"{family!r}."
            )
        return family
    return standardized(family, support)


def _start(own: Family, family: Family, params: PyTree, key: Array, split: "_Split") -> PyTree:
    """The parameters to begin with, in the units of the training rows."""
    if params is None:
        params = _init(own, key)
    elif _origin(params) == family != own:
        inner = {name: params[name] for name in params if name != "origin"}
        params = {**_init(own, key), "family": inner}
    else:
        check_params(own, params)
        return params  # with units of their own
    return own.place(params, *split.whole_training()) if isinstance(own, Standardized) else params


def _origin(params: PyTree) -> Family | None:
    origin = params.get("origin") if isinstance(params, dict) else None
    return origin.family if isinstance(origin, Origin) else None


@compiled()
def _init(family: Family, key: Array) -> PyTree:
    return family.init(key)


def _standardize(family: Family, params: PyTree, rows: Data) -> Data:
    """Rows as the inner family sees them, with the log-determinant of the way there."""
    x, context = rows["x"], rows.get("context")
    if isinstance(family, Standardized):
        x, log_det, context = family.standardize(params, x, context)
    else:
        log_det = np.zeros(len(x))
    dtype = jnp.result_type(float)
    result = {"x": x, "log_det": log_det} | ({} if context is None else {"context": context})
    return {
        name: each.astype(dtype) if jnp.issubdtype(each.dtype, jnp.floating) else each
        for name, each in result.items()
    }


class _Split:
    """Some random rows of data to be held out, and the rest of them, to be trained on.

    The rows of a memory map stay where they are.
    """

    def __init__(self, x: np.ndarray, context: np.ndarray | None, key: Array, num_held_out: int):
        self._data: Data = {"x": x} if context is None else {"x": x, "context": context}
        self._held_out = np.sort(Order(key, len(x)).rows(0, num_held_out))
        self._num_rows = len(x) - num_held_out
        self._mapped = any(isinstance(array, np.memmap) for array in self._data.values())

    def _take(self, rows: np.ndarray) -> Data:
        return {name: np.asarray(array[rows]) for name, array in self._data.items()}

    def _take_training(self, numbers: np.ndarray) -> Data:
        """The rows of these numbers among those that are not held out."""
        before = self._held_out - np.arange(len(self._held_out))
        return self._take(numbers + np.searchsorted(before, numbers, side="right"))

    def held_out(self) -> Data:
        """The rows that are held out."""
        return self._take(self._held_out)

    def whole_training(self) -> tuple[np.ndarray, np.ndarray | None]:
        """(x, context) from which units are taken; of a memory map all rows, as they lie there."""
        data = self._data if self._mapped else self._take_training(np.arange(self._num_rows))
        return data["x"], data.get("context")

    def training(self, standardize: Callable[[Data], Data]) -> Data | LazyRows:
        """The rows to train on, standardised; those of a memory map when they are needed."""
        if not self._mapped:
            return standardize(self._take_training(np.arange(self._num_rows)))
        return LazyRows(lambda rows: standardize(self._take_training(rows)), self._num_rows)


# The same object for the same length, so that a second fit compiles nothing.
@functools.lru_cache(maxsize=64)
def default_optimizer(
    num_steps: int, learning_rate: float = 1e-2, max_norm: float = 10.0
) -> optax.GradientTransformation:
    """Adam with clipped gradients, a short warm-up and a cosine decay to zero."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=learning_rate / 10,
        peak_value=learning_rate,
        warmup_steps=min(num_steps // 10, 100),
        decay_steps=num_steps,
    )
    return optax.chain(optax.clip_by_global_norm(max_norm), optax.adam(schedule))


def check_x(family: Family, x: ArrayLike) -> np.ndarray:
    """`x` as a numpy array of shape [num_rows, *event_shape] of finite numbers.

    Raises:
        TypeError: if it does not hold floating numbers.
        ValueError: if it has another shape, no rows, or an entry that is not finite.
    """
    x = _numbers("x", x, integers=not family.support.is_real)
    shape = ", ".join(["num_rows", *map(str, family.event_shape)])
    if x.ndim != 1 + len(family.event_shape) or x.shape[1:] != family.event_shape:
        fix = ""
        if x.ndim == 1 and family.event_shape == (1,):
            fix = " Perhaps give it a second axis with `x[:, None]`?"
        elif x.ndim == 2 and len(family.event_shape) == 1:
            fix = f" Perhaps build the family with event size {x.shape[1]}?"
        raise ValueError(
            f"`x` must have shape [{shape}], one event of {family!r} in each row; got shape "
            f"{x.shape}.{fix}"
        )
    if x.shape[0] == 0:
        raise ValueError(f"`x` must have at least one row; got shape {x.shape}.")
    check_finite("x", x, FIX)
    return x


def check_context(family: Family, context: ArrayLike | None, x: np.ndarray) -> np.ndarray | None:
    """`context` as a numpy array of shape [num_rows, *context_shape], or None.

    Raises:
        TypeError: if it does not hold numbers.
        ValueError: if it is missing, superfluous, of another shape, or not finite.
    """
    if context is None or family.context_shape is None:
        family.check_context(context)
        return None
    context = _numbers("context", context, integers=True)
    if context.shape != (len(x), *family.context_shape):
        shape = ", ".join(["num_rows", *map(str, family.context_shape)])
        raise ValueError(
            f"`context` must have shape [{shape}], a row for each of the {len(x)} rows of `x`; got "
            f"shape {context.shape}."
        )
    family.check_context(context[:1])
    check_finite("context", context, FIX)
    return context


def _numbers(name: str, value: ArrayLike, integers: bool) -> np.ndarray:
    array = as_array(name, value)
    # `np.asarray` would hide that it is mapped.
    array = array if isinstance(array, np.memmap) else np.asarray(array)
    whole = array.dtype.kind in "iub"
    if not (jnp.issubdtype(array.dtype, jnp.floating) or (whole and integers)):
        fix = f" Perhaps convert it with `{name}.astype(float)`?" if whole else ""
        kind = "numbers" if integers else "floating numbers"
        raise TypeError(f"`{name}` must hold {kind}; got dtype {array.dtype}.{fix}")
    return array


def _num_held_out(fraction: float, num_rows: int) -> int:
    if isinstance(fraction, bool) or not isinstance(fraction, int | float):
        raise TypeError(f"`validation_fraction` must be a number; got {fraction!r}.")
    if not 0 <= fraction < 1:
        raise ValueError(f"`validation_fraction` must be at least 0 and below 1; got {fraction}.")
    return min(int(fraction * num_rows), MAX_HELD_OUT)
