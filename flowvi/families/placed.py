"""Families in the data's own units, support, marginals and correlations."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from distrax import Bijector, Chain, Distribution
from jax.typing import ArrayLike, DTypeLike

from flowvi.bijectors import Dense, Marginal, Units
from flowvi.compiling import compiled
from flowvi.distributions import FlowDistribution
from flowvi.families import marginals
from flowvi.families.contexts import Local
from flowvi.families.family import (
    Composed,
    Family,
    Params,
    SampleShape,
    as_array,
    as_family,
    shown,
)
from flowvi.params import Fixed, PyTree
from flowvi.supports import Interval, Support, SupportLike, as_support, chunks, on_host

#: Bins of the maps of a context.
CONTEXT_BINS = 8

#: Rows that go through maps on the host together.
BLOCK_ROWS = 2048


def pushed(inner: Distribution, bijectors: list[Bijector], dtype: jnp.dtype) -> FlowDistribution:
    """The distribution of f(x), x from `inner`: one flow where that is a flow itself."""
    batch_shape, dtype = inner.batch_shape, jnp.promote_types(inner.dtype, dtype)
    if isinstance(inner, FlowDistribution):
        inner, bijectors = inner.distribution, [*bijectors, inner.bijector]
    bijector = bijectors[0] if len(bijectors) == 1 else Chain(bijectors)
    return FlowDistribution(inner, bijector, batch_shape=batch_shape, dtype=dtype)


@dataclasses.dataclass(frozen=True, repr=False)
class Standardized(Composed):
    """A family in the data's own units and support; see `standardized`.

    Its parameters are {"family", "units"}, and "context_units" where a context is of real numbers.
    """

    family: Family
    support: Interval = dataclasses.field()

    def __repr__(self) -> str:
        support = None if self.support.is_real else self.support
        return shown("standardized", self.family, support=support)

    def own(self, key: jax.Array) -> dict[str, Params]:
        own = {"units": _units(np.zeros(self.event_shape), 1.0)}
        if self.context_shape is not None and not _takes_rows(self.family):
            own["context_units"] = _units(np.zeros(self.context_shape), 1.0)
        return own

    def features(self, params: Params, context: PyTree) -> PyTree:
        if context is None or "context_units" not in params:
            return context
        self.check_context(context)
        units = params["context_units"].value
        return (jnp.asarray(context) - units["shift"]) / units["scale"]

    def push(self, params: Params, inner: Distribution, context: PyTree) -> FlowDistribution:
        units = Units(**params["units"].value)
        dtype = params["units"].value["shift"].dtype
        bound = self.support.bijector(dtype)
        return pushed(inner, [units] if bound is None else [bound, units], dtype)

    def log_prob(self, params: Params, x: ArrayLike, context: PyTree = None) -> jax.Array:
        x, context = self._check_data(params, x, context)
        x = self.support.moved_inside(x)
        is_double = [isinstance(a, np.ndarray) and a.dtype == np.float64 for a in (x, context)]
        if jnp.result_type(float) == np.float64 or not any(is_double):
            return super().log_prob(params, x, context)
        # Of numbers that are far from zero, single precision would keep too little.
        y, log_det, context = self.standardize(params, x, context)
        return self.family.log_prob(params["family"], y, context) + log_det.astype(np.float32)

    def sample_exactly(
        self, params: Params, key: jax.Array, sample_shape: SampleShape = (), context: PyTree = None
    ) -> tuple[np.ndarray, np.ndarray]:
        features = self._features_on_host(params, context)
        y, log_prob = self.family.sample_and_log_prob(params["family"], key, sample_shape, features)
        # Units are put on in double precision, as they were taken off.
        x = self.unstandardize(params, y)
        log_det = self.standardize(params, x)[1]
        return x, np.asarray(log_prob + log_det.astype(log_prob.dtype))

    def sample_alike(
        self, params: Params, key: jax.Array, num_samples: int, context: ArrayLike
    ) -> np.ndarray:
        features = self._features_on_host(params, context)
        y = self.family.sample_alike(params["family"], key, num_samples, features)
        return self.unstandardize(params, y)

    def _features_on_host(self, params: Params, context: PyTree) -> PyTree:
        context = None if context is None else as_array("context", context)
        self.check_context(context)
        with jax.enable_x64(True):  # or contexts that are far from zero would lose what they say
            features = None if context is None else _features(self, _own(params), context)
        return None if features is None else np.asarray(features)

    def place(
        self,
        params: Params,
        x: ArrayLike,
        context: ArrayLike | None = None,
        weights: np.ndarray | None = None,
    ) -> Params:
        """Parameters in the units of data: the mean and the standard deviation of each column.

        Moments are taken in double precision, in one pass over all rows of an array or memory map;
        of the data as the support maps them to the real line. A context of integers is left alone.
        `weights`, of shape [num_rows], say how much each row counts.

        Raises:
            ValueError: if a column of x is constant.
        """
        array = on_host(x)
        shift, scale, constant = _moments(array, self.support, weights)
        check_varies(array, constant)
        placed = {"units": _units(shift, scale, params["units"])}
        seen = None if context is None or "context_units" not in params else on_host(context)
        if seen is not None and jnp.issubdtype(seen.dtype, jnp.floating):
            shift, scale, constant = _moments(seen, None, weights)
            scale = np.where(constant, 1, scale)
            placed["context_units"] = _units(shift, scale, params["context_units"])
        return {**params, **placed}

    def standardize(
        self, params: Params, x: ArrayLike, context: ArrayLike | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Data as the inner family sees them, in double precision on the host.

            y = (support_map^-1(x) - shift) / scale

        Of data that are far from zero nothing is lost, as it would be in single precision. It
        returns (y, log |dy / dx| of shape [*rows], the standardised context).
        """
        shift, scale = _host_units(params["units"])
        values, log_det = _to_reals(self.support, as_array("x", x))
        log_det = log_det - np.log(scale).sum()
        if context is not None and "context_units" in params:
            mean, sd = _host_units(params["context_units"])
            if np.any(mean != 0) or np.any(sd != 1):
                context = (np.asarray(context, np.float64) - mean) / sd
        context = None if context is None else np.asarray(context)
        return (values - shift) / scale, log_det, context

    def unstandardize(self, params: Params, y: ArrayLike) -> np.ndarray:
        """The inverse of `standardize`: x = support_map(shift + scale y)."""
        shift, scale = _host_units(params["units"])
        values = shift + scale * np.asarray(y, np.float64)
        if self.support.is_real:
            return values
        with jax.enable_x64(True):
            return np.asarray(_forward(self.support, jnp.asarray(values)))


@dataclasses.dataclass(frozen=True, repr=False)
class Gaussianized(Standardized):
    """A family under the marginals and the correlations of data; see `gaussianized`.

    Its parameters are {"family", "units", "whitening"}, "marginals" where columns have maps of
    their own, and "context_units" and "context_marginals" where a context is of real numbers.
    """

    num_bins: int | None = None

    def __repr__(self) -> str:
        support = None if self.support.is_real else self.support
        return shown("gaussianized", self.family, support=support, num_bins=self.num_bins)

    def own(self, key: jax.Array) -> dict[str, Params]:
        size = self.event_shape[0]
        own = super().own(key)
        own["whitening"] = _dense(np.zeros(size), np.eye(size))
        if self.num_bins is not None:
            own["marginals"] = _tables([marginals.identity(self.num_bins)] * size)
        if "context_units" in own:
            columns = [marginals.identity(CONTEXT_BINS)] * math.prod(self.context_shape or ())
            own["context_marginals"] = _tables(columns)
        return own

    def features(self, params: Params, context: PyTree) -> PyTree:
        features = super().features(params, context)
        if features is None or "context_marginals" not in params:
            return features
        flat = features.reshape(*self.check_context(context), -1)
        marginal = Marginal(**_cast(params["context_marginals"].value, features.dtype))
        return marginal.inverse(flat).reshape(features.shape)

    def push(self, params: Params, inner: Distribution, context: PyTree) -> FlowDistribution:
        dtype = params["units"].value["shift"].dtype
        return pushed(inner, _maps(params, dtype), dtype)

    def place(
        self,
        params: Params,
        x: ArrayLike,
        context: ArrayLike | None = None,
        weights: np.ndarray | None = None,
    ) -> Params:
        """Parameters with the marginals and the covariance of data, in double precision."""
        array = np.asarray(on_host(x), np.float64)
        lower, upper = self.support.bounds()
        flat = np.stack([marginals.equally_weighted(column, weights) for column in array.T], 1)
        units = [marginals.units(*each) for each in zip(flat.T, lower, upper, strict=True)]
        shift, scale = np.array(units).T
        params = {**params, "units": _units(shift, scale, params["units"])}
        shift, scale = _host_units(params["units"])
        z = (array - shift) / scale
        if self.num_bins is not None:
            ends = zip((lower - shift) / scale, (upper - shift) / scale, strict=True)
            columns = zip(((flat - shift) / scale).T, ends, strict=True)
            tables = [marginals.fitted(column, self.num_bins, *end) for column, end in columns]
            params["marginals"] = _tables(tables)
            bare = {**params, "whitening": _dense(np.zeros(len(shift)), np.eye(len(shift)))}
            z = self.standardize(bare, array)[0]
        loc = marginals.centered(z, weights)[0]
        params["whitening"] = _dense(loc, marginals.covariance(z, weights))
        if context is None or "context_marginals" not in params:
            return params
        seen = np.asarray(on_host(context))
        if jnp.issubdtype(seen.dtype, jnp.floating):
            seen = seen.astype(np.float64).reshape(len(seen), -1)
            each = [marginals.equally_weighted(column, weights) for column in seen.T]
            seen = np.stack(each, 1) if each else seen
            shift, scale = np.array([marginals.units(column) for column in seen.T]).T
            place = {"shift": shift, "scale": scale}
            shaped = {name: each.reshape(self.context_shape) for name, each in place.items()}
            params["context_units"] = _units(**shaped, old=params["context_units"])
            shift, scale = map(np.ravel, _host_units(params["context_units"]))
            columns = ((seen - shift) / scale).T
            params["context_marginals"] = _tables(
                [marginals.fitted(column, CONTEXT_BINS) for column in columns]
            )
        return params

    def standardize(
        self, params: Params, x: ArrayLike, context: ArrayLike | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        array = np.asarray(as_array("x", x), np.float64)
        y, log_det = _in_blocks(_to_inner, _own(params), array)
        if context is None or "context_marginals" not in params:
            return y, log_det, None if context is None else np.asarray(context)
        with jax.enable_x64(True):
            seen = jnp.asarray(np.asarray(context, np.float64))
            return y, log_det, np.asarray(_features(self, _own(params), seen))

    def unstandardize(self, params: Params, y: ArrayLike) -> np.ndarray:
        return _in_blocks(_from_inner, _own(params), np.asarray(y, np.float64))[0]


def _own(params: Params) -> Params:
    return {name: params[name] for name in params if name not in ("family", "origin")}


def _cast(arrays: Mapping[str, ArrayLike], dtype: DTypeLike) -> dict[str, jax.Array]:
    return {name: jnp.asarray(array, dtype) for name, array in arrays.items()}


def _tables(columns: Sequence[marginals.Tables]) -> Fixed:
    tables = {name: np.stack([each[name] for each in columns]) for name in columns[0]}
    return Fixed(_cast(tables, jnp.result_type(float)))


def _dense(loc: np.ndarray, covariance: np.ndarray) -> Fixed:
    factor = np.linalg.cholesky(covariance)
    inverse, log_det = np.linalg.inv(factor), np.log(np.diag(factor)).sum()
    arrays = {"loc": loc, "matrix": factor, "inverse": inverse, "log_det": log_det}
    return Fixed(_cast(arrays, jnp.result_type(float)))


def _maps(params: Params, dtype: DTypeLike) -> list[Bijector]:
    """The maps of a `Gaussianized` from the inner family to the data, the last one first."""
    dense = Dense(**_cast(params["whitening"].value, dtype))
    bijectors: list[Bijector] = [Units(**_cast(params["units"].value, dtype)), dense]
    if "marginals" in params:
        bijectors.insert(1, Marginal(**_cast(params["marginals"].value, dtype)))
    return bijectors


def _in_blocks(
    function: Callable[[Params, jax.Array], tuple[jax.Array, ...]], own: Params, x: np.ndarray
) -> tuple[np.ndarray, ...]:
    """A compiled function of rows [*rows, D] in double precision, by blocks of one size.

    So it is compiled once, whatever the number of rows.
    """
    rows = x.reshape(-1, x.shape[-1])
    num_blocks = max(-(-len(rows) // BLOCK_ROWS), 1)
    filler = rows[-1:] if len(rows) else np.zeros((1, x.shape[-1]))
    filler = np.repeat(filler, num_blocks * BLOCK_ROWS - len(rows), 0)
    found = []
    with jax.enable_x64(True):
        for block in np.split(np.concatenate([rows, filler]), num_blocks):
            found.append([np.asarray(each) for each in function(own, jnp.asarray(block))])
    each = [np.concatenate(parts)[: len(rows)] for parts in zip(*found, strict=True)]
    return tuple(part.reshape(x.shape[:-1] + part.shape[1:]) for part in each)


@compiled(0)
def _to_inner(own: Params, x: jax.Array) -> tuple[jax.Array, ...]:
    return Chain(_maps(own, x.dtype)).inverse_and_log_det(x)


@compiled(0)
def _from_inner(own: Params, y: jax.Array) -> tuple[jax.Array, ...]:
    return (Chain(_maps(own, y.dtype)).forward(y),)


@compiled()
def _features(family: Standardized, own: Params, context: PyTree) -> PyTree:
    return family.features(own, context)


def gaussianized(
    family: Family, support: SupportLike = None, *, num_bins: int | None = 16
) -> Gaussianized:
    """A family under the marginals and the correlations of data.

        x_i = Q_i(z_i),   z = loc + L y,   y from the family

    Q_i is a monotone spline with a Pareto, a normal or a bounded tail on each side, loc and L the
    mean and the Cholesky factor of the covariance. All are `Fixed` parameters that `place` takes
    from data; of a new family they are the identity.

    Args:
        family: a family over real vectors.
        support: as in `standardized`.
        num_bins: bins of each spline; None for no marginal maps, where the support is real.

    Raises:
        ValueError: if the family is not over vectors, or bins are missing for a bounded
            support.

    Source: Chen, Gopinath, "Gaussianization", 2000.

    Example:
        >>> import jax, jax.numpy as jnp, flowvi as fv
        >>> family = fv.gaussianized(fv.standard_normal(2))
        >>> family.log_prob(family.init(jax.random.key(0)), jnp.zeros((5, 2))).shape
        (5,)
    """
    inner = standardized(family, support)
    if len(inner.event_shape) != 1:
        raise ValueError(f"`family` must be over vectors; got event shape {inner.event_shape}.")
    if num_bins is None and not inner.support.is_real:
        raise ValueError(f"`num_bins` must be a number for a support {inner.support!r}; got None.")
    return Gaussianized(inner.family, inner.support, num_bins)


def _takes_rows(family: Family) -> bool:
    """Whether the context of a family is the number of a row."""
    while isinstance(family, Composed) and not isinstance(family, Local):
        if family.context_shape != family.family.context_shape:
            return False
        family = family.family
    return isinstance(family, Local)


def check_varies(array: np.ndarray, constant: np.ndarray) -> None:
    """Checks that no column is constant."""
    if constant.any():
        place = tuple(map(int, np.argwhere(constant)[0]))
        got = f"{array[0][place]!s} in column {place[0] if len(place) == 1 else place}"
        rule = "`x` must vary in every column"
        raise ValueError(f"{rule}; got the constant {got}. Perhaps drop that column?")


def _units(shift: np.ndarray, scale: np.ndarray | float, old: Fixed | None = None) -> Fixed:
    """Units in the dtype of the old ones: rounded, but exact from here on."""
    dtype = jnp.result_type(float) if old is None else old.value["shift"].dtype
    scale = np.broadcast_to(scale, shift.shape)
    return Fixed({"shift": jnp.asarray(shift, dtype), "scale": jnp.asarray(scale, dtype)})


def _host_units(units: Fixed) -> tuple[np.ndarray, np.ndarray]:
    shift, scale = (np.asarray(units.value[name], np.float64) for name in ("shift", "scale"))
    return shift, scale


def _to_reals(support: Support, x: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of the support's map, and its log-determinant for each row, on the host."""
    values = np.asarray(x, np.float64)
    if support.is_real:
        return values, np.zeros(values.shape[: values.ndim - len(support.event_shape)])
    with jax.enable_x64(True):
        inverse, log_det = _inverse(support, jnp.asarray(values))
        return np.asarray(inverse), np.asarray(log_det)


@compiled()
def _forward(support: Support, y: jax.Array) -> jax.Array:
    return support.bijector(y.dtype).forward(y)  # type: ignore[union-attr]


@compiled()
def _inverse(support: Support, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return support.bijector(x.dtype).inverse_and_log_det(x)  # type: ignore[union-attr]


def _moments(
    array: np.ndarray, support: Support | None = None, weights: np.ndarray | None = None
) -> tuple[np.ndarray, ...]:
    """Mean and standard deviation of each column, and whether its values are all the same."""
    weights = np.ones(len(array)) if weights is None else weights
    count, mean, squares = 0.0, np.zeros(array.shape[1:]), np.zeros(array.shape[1:])
    low, high = np.full(array.shape[1:], np.inf), np.full(array.shape[1:], -np.inf)
    for chunk in chunks(array):
        values = np.asarray(array[chunk], np.float64)
        values = values if support is None else _to_reals(support, values)[0]
        low, high = np.minimum(low, values.min(0)), np.maximum(high, values.max(0))
        # Chan, Golub, LeVeque, "Updating Formulae ... for Computing Sample Variances", 1979.
        each = weights[chunk].reshape(-1, *[1] * (values.ndim - 1))
        some = each.sum()
        if not some > 0:
            continue
        loc = (each * values).sum(0) / some
        delta, total = loc - mean, count + some
        squares += (each * (values - loc) ** 2).sum(0) + delta**2 * (count * some / total)
        mean += delta * (some / total)
        count = total
    return mean, np.sqrt(squares / count), low == high


def standardized(family: Family, support: SupportLike = None) -> Standardized:
    """A family in the data's own units and support, with a standardised context.

        x = support_map(shift + scale * y),   y from the family at (context - mean) / sd

    The support map is the identity for real numbers, lower + exp or upper - exp beside one bound,
    and a sigmoid between two. Units are `Fixed` parameters: the identity at first, and what `place`
    takes from data, as `fv.fit_density` does.

    Args:
        family: a family over all real numbers.
        support: where x may lie: None or "real"; "positive"; (low, high), of which either may be
            None or infinite; or a sequence of these, one for each column.

    Raises:
        ValueError: if the family has units of its own, or is bounded.
        TypeError: if `support` describes none of numbers between bounds.

    Source: Kucukelbir, Tran, Ranganath, Gelman, Blei, "Automatic Differentiation Variational
    Inference", 2017, for the maps of bounded coordinates.

    Example:
        >>> import jax
        >>> import numpy as np
        >>> import flowvi as fv
        >>> family = fv.standardized(fv.standard_normal(1), "positive")
        >>> x = np.exp(500.0 + 2.0 * np.array([[-1.0], [1.0]]))
        >>> params = family.place(family.init(jax.random.key(0)), x)
        >>> family.standardize(params, x)[0].ravel().tolist()
        [-1.0, 1.0]
    """
    if isinstance(as_family(family), Standardized):
        raise ValueError(f"`family` must have no units of its own; got {family!r}, which has some.")
    if not family.support.is_real:
        got = f"{family!r}, whose events lie in {family.support!r}"
        raise ValueError(f"`family` must be over all real numbers; got {got}.")
    described = as_support(support, family.event_shape)
    if not isinstance(described, Interval):
        rule = "`support` must be one of real numbers between bounds"
        raise TypeError(f"{rule}; got {described!r}.")
    return Standardized(family, described)
