"""numpyro: its models as targets, and families as its distributions and guides."""

import importlib
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.typing import ArrayLike
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.distributions.transforms import biject_to
from numpyro.infer import Predictive, init_to_uniform, log_likelihood
from numpyro.infer.autoguide import AutoGuide
from numpyro.infer.util import log_density as joint_log_density
from numpyro.primitives import Messenger

from flowvi.checks import require, shown
from flowvi.families import Family, iaf
from flowvi.interop import require_library
from flowvi.interop.model import Draws, Model
from flowvi.layouts import Theta, as_layout
from flowvi.params import Array, PyTree, Shape, combine, partition
from flowvi.supports import Interval, as_support

__all__ = ["AutoFlow", "FlowDistribution"]

Site = dict[str, Any]
Trace = dict[str, Site]

#: Keys that do not matter: of models whose latent variables are given.
_KEYS = (0, 1)


class NumpyroModel(Model):
    """A model of numpyro with its arguments.

    Args:
        model: a function with numpyro's primitives.
        args: its arguments.
        kwargs: its named arguments.
    """

    def __init__(
        self, model: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object]
    ):
        rule = "`model` must be a function with numpyro's primitives"
        require(callable(model), rule, model, error=TypeError, say=shown)
        self._model = model
        self._args, self._kwargs = jax.tree.map(_in_precision, (args, dict(kwargs)))
        first, second = (self._prototype(jax.random.key(key)) for key in _KEYS)
        latent = {n: s for n, s in first.items() if s["type"] == "sample" and not s["is_observed"]}
        self._sites = first
        self._discrete = [name for name, site in latent.items() if _is_discrete(site)]
        self._names = [name for name in latent if name not in self._discrete]
        if not self._names:
            rule = "`model` must have a latent site of real numbers"
            raise ValueError(f"{rule}; got {', '.join(latent) or 'no latent site'}.")
        _check_sites(first)
        self._enumerated = self._prepared()
        #: Sites whose support varies with other sites, or is none of ours: numpyro maps these.
        self._mapped: list[str] = []
        self.parameters = {}
        for name in self._names:
            self.parameters[name] = self._parameter(name, latent[name], second[name])
        self._rows_plate = self._find_rows()
        self.num_rows = None if self._rows_plate is None else self._rows_plate[1]
        self._check_improper(latent, second)
        self._derived = self._find_derived()
        self.names = (*self._names, *self._derived)
        self.event_dims = {name: latent[name]["fn"].event_dim for name in self._names}
        self.dims = {n: d for n, site in first.items() if (d := _dims(site, first))}
        self.coords = {}

    # ------------------------------------------------------------------------------- structure

    def _prototype(self, key: Array) -> Trace:
        """What the model does at a random point."""
        inner = handlers.seed(self._model, key)
        model = handlers.substitute(inner, substitute_fn=init_to_uniform)
        try:
            return handlers.trace(model).get_trace(*self._args, **self._kwargs)
        except Exception as error:
            words = " ".join(str(error).split())
            rule = "`model` must run with the arguments that are given"
            got = f"{type(error).__name__}: {words}"
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{rule}; got {got}") from error

    def _parameter(self, name: str, site: Site, other: Site) -> tuple[Shape, object]:
        """The shape and the support of what stands for a site."""
        shape, support = tuple(jnp.shape(site["value"])), site["fn"].support
        if _same(support, other["fn"].support):
            try:
                as_support(support, shape).bijector()
            except (TypeError, ValueError):
                pass  # numpyro may have a map
            else:
                return shape, as_support(support, shape)
        self._mapped.append(name)
        try:
            return tuple(biject_to(support).inverse_shape(shape)), "real"
        except NotImplementedError:
            rule = f"site {name!r} of `model` must have a support with a map from the reals"
            raise ValueError(f"{rule}; got {shown(support)}.") from None

    def _find_rows(self) -> tuple[str, int] | None:
        """The plate that takes a subsample, and its size."""
        plates = [site for site in self._sites.values() if site["type"] == "plate"]
        taken = [site for site in plates if (site["args"][1] or site["args"][0]) < site["args"][0]]
        if not taken:
            return None
        names = ", ".join(site["name"] for site in taken)
        rule = "`model` must have at most one plate with a subsample"
        require(len(taken) == 1, rule, names, "Perhaps leave out `subsample_size`?", say=str)
        name = taken[0]["name"]
        inside = [n for n in (*self._names, *self._discrete) if name in _plates(self._sites[n])]
        rule = f"`model` must have no latent site in the plate {name!r}, which takes a subsample"
        fix = "Perhaps leave out `subsample_size`?"
        require(not inside, rule, ", ".join(inside), fix, say=str)
        return name, taken[0]["args"][0]

    def _find_derived(self) -> list[str]:
        """Deterministic sites, but for those of what is summed out."""
        names = [n for n, site in self._sites.items() if site["type"] == "deterministic"]
        if not self._discrete or not names:
            return names
        traces = []
        for key in _KEYS:  # discrete sites are drawn anew
            values = {name: self._sites[name]["value"] for name in self._names}
            model = handlers.seed(handlers.substitute(self._model, values), jax.random.key(key))
            traces.append(handlers.trace(model).get_trace(*self._args, **self._kwargs))
        one, two = traces
        return [n for n in names if np.array_equal(one[n]["value"], two[n]["value"])]

    def _check_improper(self, latent: Trace, second: Trace) -> None:
        """Refuses a site without a prior, of which nothing depends at two random points."""
        improper = [n for n in self._names if isinstance(_base(latent[n]["fn"]), _IMPROPER)]
        if not improper:
            return
        moves = dict.fromkeys(improper, False)
        slopes_at = jax.jit(jax.grad(self.log_density))
        for sites in (self._sites, second):
            theta = self.parameters_of({n: jnp.asarray(sites[n]["value"]) for n in self._names})
            slopes = slopes_at(theta)
            moves = {n: moves[n] | (np.asarray(slopes[n]) != 0) for n in improper}
        for name in improper:
            rule = f"site {name!r} of `model` must have a proper prior, or data that depend on it"
            got = "an improper uniform one, and none"
            require(name in self._mapped or np.all(moves[name]), rule, got, say=str)

    def _prepared(self) -> Callable[..., object]:
        """The model with discrete sites summed out where it has them."""
        # Keys are for what is random but no latent site; densities do not depend on them.
        model = handlers.seed(self._model, jax.random.key(_KEYS[0]))
        if not self._discrete:
            return model
        for name in self._discrete:
            fn = self._sites[name]["fn"]
            rule = f"site {name!r} of `model` must be one that numpyro can enumerate"
            fix = "Perhaps sum it out by hand, and add it with `numpyro.factor`?"
            require(fn.has_enumerate_support, rule, shown(_base(fn)), fix, say=str)
        require_library("funsor", "fv.Target.from_numpyro")  # for discrete sites alone
        funsor = importlib.import_module("numpyro.contrib.funsor")
        depth = max((-f.dim for s in self._sites.values() for f in _frames(s)), default=0)
        return funsor.enum(funsor.config_enumerate(model), -depth - 1)

    # --------------------------------------------------------------------------------- density

    def _at(
        self, theta: Theta, rows: Array | None = None, model: Callable[..., object] | None = None
    ) -> Callable[..., object]:
        """The model, summed out by default, at parameters and at rows of the plate of rows."""

        def value(site: Site) -> Array | None:
            name = site["name"]
            if name not in self._names or site["type"] != "sample":
                return None
            if name not in self._mapped:
                return theta[name]
            return _mapped(site, theta[name])

        model = self._enumerated if model is None else model
        model = handlers.substitute(model, substitute_fn=value)
        if self._rows_plate is None:
            return model
        name, count = self._rows_plate
        return _Rows(model, name, jnp.arange(count) if rows is None else jnp.asarray(rows))

    def _trace(self, theta: Theta, rows: Array | None = None) -> Trace:
        return handlers.trace(self._at(theta, rows)).get_trace(*self._args, **self._kwargs)

    def log_density(self, theta: Theta) -> Array:
        function = joint_log_density
        if self._discrete:
            function = importlib.import_module("numpyro.contrib.funsor.infer_util").log_density
        value, _ = function(self._at(theta), self._args, self._kwargs, {})
        return jnp.asarray(value, jnp.result_type(float))

    def log_prior(self, theta: Theta) -> Array:
        name = self._rows_plate[0] if self._rows_plate else ""
        # One row is enough: none of the rows counts.
        sites = self._trace(theta, jnp.arange(1)).values()
        terms = [_term(s) for s in sites if s["type"] == "sample" and name not in _plates(s)]
        return sum((jnp.sum(term) for term in terms), start=jnp.zeros(()))

    def log_likelihood(self, theta: Theta, rows: Array) -> Array:
        if self._rows_plate is None:
            raise NotImplementedError
        name, count = self._rows_plate
        total = jnp.zeros(len(rows))
        for site in self._trace(theta, rows).values():
            if site["type"] != "sample" or name not in _plates(site):
                continue
            (frame,) = (frame for frame in _frames(site) if frame.name == name)
            # The plate's own factor makes up for the rows that are left out.
            each = jnp.moveaxis(_term(site) * (len(rows) / count), frame.dim, 0)
            total += each.reshape(len(rows), -1).sum(-1)
        return total

    # ---------------------------------------------------------------------------------- values

    def values(self, theta: Theta) -> dict[str, Array]:
        if not (self._mapped or self._derived):
            return dict(theta)
        return self._values_and_log_det(theta)[0]

    def _values_and_log_det(self, theta: Theta) -> tuple[dict[str, Array], Array]:
        """Values, and the log-determinants of numpyro's own maps."""
        seeded = handlers.seed(self._model, jax.random.key(_KEYS[0]))
        with handlers.block():  # in a guide its sites are no sites of the guide
            model = self._at(theta, model=seeded)
            sites = handlers.trace(model).get_trace(*self._args, **self._kwargs)
        values = {name: sites[name]["value"] for name in (*self._names, *self._derived)}
        terms = [jnp.sum(_term(sites[_factor_name(name)])) for name in self._mapped]
        return values, sum(terms, start=jnp.zeros(()))

    def parameters_of(self, values: Mapping[str, Array]) -> Theta:
        missing = [name for name in self._names if name not in values]
        rule = f"`parameters` must have the names {', '.join(self._names)}"
        require(not missing, rule, ", ".join(map(str, values)) or "none", say=str)
        theta = {name: values[name] for name in self._names}
        if self._mapped:
            model = handlers.seed(
                handlers.substitute(self._model, dict(theta)), jax.random.key(_KEYS[0])
            )
            sites = handlers.trace(model).get_trace(*self._args, **self._kwargs)
            for name in self._mapped:
                theta[name] = biject_to(sites[name]["fn"].support).inv(theta[name])
        return theta

    # ------------------------------------------------------------------------------- inference

    @property
    def _observed(self) -> list[str]:
        return [n for n, s in self._sites.items() if _is_data(s)]

    def _whole(self) -> Callable[..., object]:
        """The model over all rows."""
        if self._rows_plate is None:
            return self._model
        name, count = self._rows_plate
        return _Rows(self._model, name, jnp.arange(count))

    def observed_data(self) -> dict[str, np.ndarray]:
        model = handlers.substitute(
            handlers.seed(self._whole(), jax.random.key(_KEYS[0])), substitute_fn=init_to_uniform
        )
        sites = handlers.trace(model).get_trace(*self._args, **self._kwargs)
        return {name: np.asarray(sites[name]["value"]) for name in self._observed}

    def pointwise(self, draws: Draws) -> dict[str, np.ndarray]:
        if self._discrete:  # their values would have to be known
            return {}
        model = handlers.seed(self._whole(), jax.random.key(_KEYS[0]))
        given = {name: jnp.asarray(draws[name]) for name in self._names}
        found = log_likelihood(model, given, *self._args, **self._kwargs)
        return {name: np.asarray(found[name]) for name in self._observed}

    def posterior_predictive(self, key: Array, draws: Draws) -> dict[str, np.ndarray]:
        given = {name: jnp.asarray(draws[name]) for name in self._names}
        key, discrete_key = jax.random.split(key)
        if self._discrete:  # what was summed out is drawn given the data
            options: dict[str, Any] = {"infer_discrete": True, "return_sites": self._discrete}
            predictive = Predictive(self._whole(), given, **options)
            given |= predictive(discrete_key, *self._args, **self._kwargs)
        return self._predict(key, self._observed, posterior_samples=given)

    def prior(self, key: Array, num_draws: int) -> tuple[Draws, Draws]:
        if any(isinstance(_base(self._sites[n]["fn"]), _IMPROPER) for n in self._names):
            return {}, {}
        names = [*self._names, *self._derived]
        found = self._predict(key, [*names, *self._observed], num_samples=num_draws)
        return {n: found[n] for n in names}, {n: found[n] for n in self._observed}

    def _predict(self, key: Array, names: list[str], **options: Any) -> dict[str, np.ndarray]:
        if not names:
            return {}
        model = _Unobserved(self._whole())
        predictive = Predictive(model, return_sites=names, **options)
        found = predictive(key, *self._args, **self._kwargs)
        return {name: np.asarray(found[name]) for name in names}


class _Rows(Messenger):
    """A model whose plate of a name holds some rows."""

    def __init__(self, fn: Callable[..., object], name: str, rows: Array):
        super().__init__(fn)
        self._name, self._rows = name, rows

    def process_message(self, msg: Site) -> None:
        if msg["type"] == "plate" and msg["name"] == self._name:
            msg["value"], msg["args"] = self._rows, (msg["args"][0], len(self._rows))


class _Unobserved(handlers.uncondition):
    """A model whose data are drawn anew, in their own shape where no plate says how many."""

    def process_message(self, msg: Site) -> None:
        if msg["type"] != "sample" or not _is_data(msg):
            return
        fn, shape = msg["fn"], jnp.shape(msg["value"])
        batch = np.broadcast_shapes(fn.batch_shape, shape[: len(shape) - fn.event_dim])
        msg["fn"] = fn if tuple(fn.batch_shape) == batch else fn.expand(batch)
        super().process_message(msg)


def _in_precision(value: object) -> object:
    """Arrays of floats of numpy's in the precision of JAX, in which numpyro does not mix them."""
    if isinstance(value, np.ndarray) and value.dtype == np.float64:
        return value.astype(jnp.result_type(float))
    return value


_IMPROPER = dist.ImproperUniform


def _base(fn: Any) -> Any:
    """The distribution inside of one that is expanded, masked or made of independent ones."""
    while isinstance(fn, dist.ExpandedDistribution | dist.MaskedDistribution | dist.Independent):
        fn = fn.base_dist
    return fn


def _is_discrete(site: Site) -> bool:
    return bool(site["fn"].support.is_discrete)


def _is_data(site: Site) -> bool:
    """Whether a site holds data: no latent one, and no factor."""
    return (
        site["type"] == "sample"
        and site["is_observed"]
        and not isinstance(_base(site["fn"]), dist.Unit)
    )


def _frames(site: Site) -> list[Any]:
    return site.get("cond_indep_stack", []) if site["type"] != "plate" else []


def _plates(site: Site) -> list[str]:
    return [frame.name for frame in _frames(site)]


def _term(site: Site) -> Array:
    """The log density of a site, scaled."""
    if site["intermediates"]:
        value = site["fn"].log_prob(site["value"], site["intermediates"])
    else:
        value = site["fn"].log_prob(site["value"])
    return value if site["scale"] is None else site["scale"] * value


def _factor_name(name: str) -> str:
    return f"_{name}_log_det"


def _mapped(site: Site, u: Array) -> Array:
    """A value by numpyro's own map, whose log-determinant becomes a factor."""
    transform = biject_to(site["fn"].support)
    value = transform(u)
    log_det = transform.log_abs_det_jacobian(u, value)
    # One for each of the plates' places, for plates around the site hold for the factor too.
    extra = jnp.ndim(log_det) - jnp.ndim(value) + len(site["fn"].event_shape)
    log_det = jnp.sum(log_det, tuple(range(-extra, 0)))
    numpyro.factor(_factor_name(site["name"]), log_det)
    return value


def _same(one: constraints.Constraint, two: constraints.Constraint) -> bool:
    """Whether two supports are of one kind, with equal bounds."""
    (a, first), (b, second) = jax.tree.flatten(one), jax.tree.flatten(two)
    return repr(first) == repr(second) and all(map(np.array_equal, a, b))


def _dims(site: Site, sites: Trace) -> tuple[str, ...]:
    """The names of the axes of a site: those of its plates, and more; none where it has no axes."""
    if site["type"] not in ("sample", "deterministic"):
        return ()
    rank, name = jnp.ndim(site["value"]), site["name"]
    names = [f"{name}_dim_{axis}" for axis in range(rank)]
    events = 0 if site["type"] == "deterministic" else site["fn"].event_dim
    for frame in _frames(site):
        place = rank - events + frame.dim
        if place >= 0 and jnp.shape(site["value"])[place] == frame.size:
            # An axis must not be called as a variable is.
            taken = frame.name in sites and sites[frame.name]["type"] != "plate"
            names[place] = f"{frame.name}_dim" if taken else frame.name
    return tuple(names)


def _check_sites(sites: Trace) -> None:
    """Refuses what a target has no place for, and data of the wrong shape."""
    for name, site in sites.items():
        rule = f"`model` must have no parameter without a prior, as `numpyro.param` {name!r} is"
        fix = "Perhaps take `numpyro.sample` with `dist.ImproperUniform`?"
        require(site["type"] != "param", rule, "one", fix, say=str)
        if not _is_data(site):
            continue
        got, wanted = jnp.shape(site["value"]), tuple(site["fn"].shape())
        rule = f"data of site {name!r} of `model` must have the shape of its distribution, {wanted}"
        try:
            both = np.broadcast_shapes(got, wanted)
        except ValueError:
            both = None
        require(both in (got, wanted), rule, f"shape {got}", say=str)


# ------------------------------------------------------------------- families in numpyro's forms


class FlowDistribution(dist.Distribution):
    """A family at its parameters as a distribution of numpyro, of real vectors.

    Args:
        family: a family without a context.
        params: its parameters, such as `posterior.params` or `density.params`.

    Example:
        >>> import jax, numpyro
        >>> import flowvi as fv
        >>> from flowvi.interop.numpyro import FlowDistribution
        >>> family = fv.iaf(2)
        >>> prior = FlowDistribution(family, family.init(jax.random.key(0)))
        >>> prior.sample(jax.random.key(1), (5,)).shape
        (5, 2)
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    pytree_data_fields = ("params",)
    pytree_aux_fields = ("family",)
    reparametrized_params = ("params",)

    def __init__(self, family: Family, params: PyTree, *, validate_args: bool | None = None):
        rule = "`family` must be a family, such as `fv.iaf(2)`"
        require(isinstance(family, Family), rule, family, error=TypeError)
        require(family.context_shape is None, "`family` must take no context", family)
        self.family, self.params = family, params
        super().__init__((), family.event_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        support = self.family.support
        if support.is_real:
            return constraints.independent(constraints.real, len(self.event_shape))
        rule = "`family` must have a support of real numbers between bounds"
        require(isinstance(support, Interval), rule, support)
        bounds = cast(Interval, support).bounds()
        return constraints.independent(constraints.interval(*bounds), len(self.event_shape))

    def sample(self, key: Array, sample_shape: Shape = ()) -> Array:
        made = self.family.distribution(self.params)
        return made.sample(seed=key, sample_shape=sample_shape)

    def log_prob(self, value: ArrayLike) -> Array:
        return self.family.distribution(self.params).log_prob(value)


class AutoFlow(AutoGuide):
    """A guide for `numpyro.infer.SVI` whose latent vector has the distribution of a family.

    The vector is that of `fv.Target.from_numpyro`, so a posterior that `fit_posterior` gave is a
    guide: `AutoFlow(model, posterior.family, posterior.params)`.

    Args:
        model: a model of numpyro.
        family: a family of real vectors; by default an inverse autoregressive flow.
        params: where its parameters start; fresh ones by default.
        prefix: of the names of the guide's sites.

    Example:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from flowvi.interop.numpyro import AutoFlow
        >>> def model():
        ...     numpyro.sample("tau", dist.HalfNormal(1.0))
        >>> guide = AutoFlow(model)
        >>> svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO())
        >>> state = svi.init(jax.random.key(0))
        >>> guide.sample_posterior(jax.random.key(1), svi.get_params(state))["tau"].shape
        ()
    """

    def __init__(
        self,
        model: Callable[..., object],
        family: Family | None = None,
        params: PyTree = None,
        *,
        prefix: str = "auto",
    ):
        super().__init__(model, prefix=prefix)
        self._family, self._params = family, params
        self._found: NumpyroModel | None = None

    def _setup(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> NumpyroModel:
        """The structure of the model, at the first call, and parameters to start from."""
        if self._found is None:
            with handlers.block():
                self._found = NumpyroModel(self.model, args, kwargs)
            self._layout = as_layout(self._found.parameters)
            size = self._layout.event_size
            family = iaf(size, transformer="affine") if self._family is None else self._family
            rule = f"`family` must have event shape {(size,)}, that of the model's vector"
            require(family.event_shape == (size,), rule, family.event_shape)
            if self._params is None:
                self._params = family.init(numpyro.prng_key())
            self._family = family
        return self._found

    def _distribution(self) -> FlowDistribution:
        trainable, fixed = partition(self._params)
        count = itertools.count()
        name = lambda: f"{self.prefix}_flow_{next(count)}"  # noqa: E731
        moved = jax.tree.map(lambda leaf: numpyro.param(name(), leaf), trainable)
        return FlowDistribution(cast(Family, self._family), combine(moved, fixed))

    def __call__(self, *args: object, **kwargs: object) -> dict[str, Array]:
        model = self._setup(args, kwargs)
        u = numpyro.sample(
            f"_{self.prefix}_latent", self._distribution(), infer={"is_auxiliary": True}
        )
        theta, log_det = self._layout.constrain_and_log_det(u)
        values, more = model._values_and_log_det(theta)
        result, change = {}, -(log_det + more)
        for name in model._names:
            events = model.event_dims[name]
            batch = jnp.shape(values[name])[: jnp.ndim(values[name]) - events]
            # The Jacobian belongs to all sites; the batch of the first one sums to it.
            share = jnp.broadcast_to(change / math.prod(batch), batch)
            delta = dist.Delta(values[name], share, event_dim=events)
            result[name], change = numpyro.sample(name, delta), jnp.zeros(())
        return result

    def sample_posterior(
        self,
        rng_key: Array,
        params: Mapping[str, Array],
        *args: object,
        sample_shape: Shape = (),
        **kwargs: object,
    ) -> dict[str, Array]:
        """Draws of the sites, deterministic ones included: {name: [*sample_shape, *shape]}."""
        model = self._setup(args, kwargs)
        q = handlers.substitute(self._distribution, dict(params))()
        u = q.sample(rng_key, (math.prod(sample_shape),))
        values = jax.vmap(model.values)(self._layout.constrain_and_log_det(u)[0])
        return {n: v.reshape(*sample_shape, *v.shape[1:]) for n, v in values.items()}
