"""The model: three families, its losses, and what it makes of data."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, TypedDict, Unpack, cast

import distrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from flowvi import checks
from flowvi.checks import require
from flowvi.families import Family, Labelled, as_array, check_key
from flowvi.families.parts import Parts, fitting
from flowvi.objectives import ELBO, Enumeration, Joint, Variational
from flowvi.objectives.bounds import KLRule, check_kl_rule
from flowvi.objectives.variational import Batch, DensityAndState, Params
from flowvi.params import Array, Origin, Shape
from flowvi.vae import evaluation
from flowvi.vae.evaluation import CHUNK, DRAWS, NAMES, Chunks, Evaluation, Rows

Data = ArrayLike
Size = int | Sequence[int]
#: How much the classification of known labels counts beside the bound; see `VAE.loss`.
LABEL_WEIGHT = 1.0

#: The families of the joint density p(x, z).
JOINT = ("prior", "likelihood")

#: What only some models take.
Given = ArrayLike | None


class Options(TypedDict, total=False):
    """The options of `VAE.evaluate`."""

    context: Given
    rows: Given
    kl: KLRule
    chunk_size: int


@dataclasses.dataclass(frozen=True)
class VAE:
    """A latent-variable model p(z) p(x | z) with a posterior q(z | x): three families.

    With covariates y it is p(z | y) p(x | z, y), with q(z | x, y). `context_shape` is the shape of
    one y, and each family sees y where its own context has room for it: the prior's is then y, the
    likelihood's z and y in one vector, the posterior's x and y in one vector. All methods take y as
    `context`, of shape [*batch, *context_shape].

    The posterior is amortized, a family whose context is x, such as `fv.conditional` of an encoder;
    or each row of the data has its own, a family whose context is the number of the row, such as
    `fv.local`. Then x[i] is row i in all methods, or that of their `rows`.

    Its parameters are a dict with the keys "prior", "likelihood" and "posterior". All methods are
    compiled, take x with any leading axes, and give one number a row in nats, or draws with those
    axes. Memory is bounded; the draws of a row depend on the key and the row's place only.

    Attributes:
        prior: the family of p(z); it takes no context, or y.
        likelihood: the family of p(x | z); its context is z, or z and y.
        posterior: the family of q(z | x); its context is x, or x and y, or of shape () the number
            of a row.
        context_shape: the shape of one y, or its size; None if there are no covariates.

    `fit_vae` has an example without covariates; with a y of ten numbers, for 64 pixels:

        >>> import jax, flowvi as fv
        >>> from flowvi.networks import MLP
        >>> vae = fv.VAE(
        ...     prior=fv.standard_normal(2),
        ...     likelihood=fv.conditional(fv.bernoulli(64), MLP(2 + 10, (16,), 64)),
        ...     posterior=fv.conditional(fv.gaussian(2), MLP(64 + 10, (16,), 4)),
        ...     context_shape=10,
        ... )
        >>> params, y = vae.init(jax.random.key(0)), jax.numpy.eye(10)
        >>> vae.sample(params, jax.random.key(1), 3, context=y).shape
        (3, 10, 64)

    Source: Kingma, Welling, "Auto-Encoding Variational Bayes", 2014; Rezende, Mohamed, "Variational
    Inference with Normalizing Flows", 2015; with covariates, Sohn, Lee, Yan, "Learning Structured
    Output Representation using Deep Conditional Generative Models", 2015.
    """

    prior: Family
    likelihood: Family
    posterior: Family
    context_shape: int | Shape | None = None

    def __post_init__(self) -> None:
        for name in NAMES:
            family, rule = getattr(self, name), "must be a family, such as `fv.standard_normal(2)`"
            require(isinstance(family, Family), f"`{name}` {rule}", family, error=TypeError)
        if self.context_shape is not None:
            shape = checks.shape("context_shape", self.context_shape)
            object.__setattr__(self, "context_shape", shape)
        sees = any("context" in parts for parts in self.parts.values())
        rule = "`context_shape` must be None where no family has room for the context"
        require(sees or self.context_shape is None, rule, self.context_shape)
        latent, found = self.latent_shape, self.posterior.event_shape
        rule = f"`posterior` must have event shape {latent}, that of the prior {self.prior!r},"
        require(found == latent, f"{rule} rather than {found}", self.posterior)

    @functools.cached_property
    def shapes(self) -> dict[str, Shape]:
        """The shapes of what a family may see: "x", "z", "row", and "context" if there is one."""
        shapes: dict[str, Shape] = {"x": self.event_shape, "z": self.latent_shape, "row": ()}
        if self.context_shape is not None:
            shapes["context"] = checks.shape("context_shape", self.context_shape)
        return shapes

    @functools.cached_property
    def parts(self) -> dict[str, Parts]:
        """What each family sees of x, z, "context" and "row", by the name of the family."""
        return {name: self._parts(name) for name in NAMES}

    def _parts(self, name: str) -> Parts:
        family, shapes = getattr(self, name), self.shapes
        always = {"prior": (), "likelihood": ("z",), "posterior": ("x",)}[name]
        choices = [always, ("row",)] if name == "posterior" else [always]
        also = "context" in shapes
        choices += [(*always, "context")] if also else []
        if (parts := fitting(family.context_shape, shapes, choices)) is not None:
            return parts
        with_y = f", or {Parts.of(shapes, choices[-1]).shape} with the context" if also else ""
        if name == "prior":
            raise ValueError(f"`prior` must take no context{with_y}; got {family!r}.")
        source = "z of the prior" if name == "likelihood" else "x of the likelihood"
        owner = getattr(self, source.split()[-1])
        rule = f"`{name}` must take {source} {owner!r}, of shape {shapes[always[0]]}{with_y}, "
        fix = "It takes none. Perhaps use `fv.conditional(family, network)`?"
        require(family.context_shape is not None, f"{rule}as context", family, fix)
        rule += f"as context rather than one of shape {family.context_shape}"
        raise ValueError(f"{rule}; got {family!r}.")

    @property
    def is_unamortized(self) -> bool:
        """Whether each row has its own posterior, whose context is the row's number."""
        return "row" in self.parts["posterior"]

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of one x."""
        return self.likelihood.event_shape

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one z."""
        return self.prior.event_shape

    def init(self, key: Array) -> Params:
        """Fresh parameters: {"prior", "likelihood", "posterior"}."""
        check_key(key)
        return evaluation.init(self, key)

    def loss(
        self,
        objective: type[Variational] | None = None,
        *,
        label_weight: float = LABEL_WEIGHT,
        **options: Any,
    ) -> Variational:
        """A loss of this model for `fit` and `fit_vae`, over batches {"x": [B, *event]}.

        Where there are covariates a batch also has them as "context", of shape [B, *context_shape],
        and where each row has its own posterior the numbers of its rows as "row". The `init` of the
        loss makes what stands beside the model's parameters.

        Args:
            objective: one of `fv.objectives`: `ELBO`, `IWELBO`, `Renyi`, `CUBO`, `ForwardKL`,
                `ScoreFunction` or `Enumeration`. `ELBO` and `IWELBO` train all of the model;
                `ForwardKL` gives prior and likelihood no gradient, and `CUBO` is an upper bound,
                which they would lower: both are for the posterior of a frozen model, by
                `optax.multi_transform` with `optax.set_to_zero()`. By default it is `ELBO`, or
                `Enumeration` with a posterior by `fv.labelled`, whose classes are then summed out.
            label_weight: with such a posterior the loss and its distortion get this weight times
                the mean of -log q(y | x) over the rows of a batch whose label is known, without
                which those rows would teach the classifier nothing.
            **options: of the objective, such as `num_samples`; of `ELBO` also `kl_weight`,
                `warm_up` and `free_bits`.
        """
        is_labelled = isinstance(self.posterior, Labelled)
        if objective is None:
            objective = Enumeration if is_labelled else ELBO
        is_one = isinstance(objective, type) and issubclass(objective, Variational)
        rule = "`objective` must be an objective, such as `fv.objectives.ELBO`"
        require(is_one, rule, objective, error=TypeError)
        require(label_weight >= 0, "`label_weight` must be at least 0", label_weight)
        plain = Likelihood(self)
        likelihood = Supervised(plain, label_weight) if is_labelled and label_weight else plain
        joint = Joint(self.prior, likelihood, Seen(self, "prior"))
        return objective(self.posterior, joint, context=Seen(self, "posterior"), **options)

    def seen(self, name: str, given: Rows) -> Array | None:
        """The context of a family: what it sees of these arrays, of those in `parts`."""
        floats = {n: a if n == "row" else as_float(a) for n, a in given.items()}
        return self.parts[name](floats)

    def distribution(self, name: str, params: Params, given: Rows) -> distrax.Distribution:
        """The distribution of a family at what it sees of these arrays; see `seen`."""
        return getattr(self, name).distribution(params[name], self.seen(name, given))

    def log_joint(self, params: Params, x: Data, z: Data, *, context: Given = None) -> Array:
        """log p(x, z) = log p(z) + log p(x | z), of shape [...].

        The leading axes of x [..., *event_shape] and z [..., *latent_shape] broadcast, and those of
        the context to theirs.
        """
        own, x, z = own_params(self, params), self.check_x(x), self._z(z)
        rows = jnp.broadcast_shapes(self._axes(x), z.shape[: z.ndim - len(self.latent_shape)])
        given = {**self._given(rows, context), "z": jnp.broadcast_to(z, rows + self.latent_shape)}
        x = jnp.broadcast_to(x, rows + self.event_shape)
        likelihood = self.likelihood.log_prob(own["likelihood"], x, self.seen("likelihood", given))
        return self.prior.log_prob(own["prior"], given["z"], self.seen("prior", given)) + likelihood

    def evaluate(
        self,
        params: Params,
        key: Array,
        x: Data,
        num_samples: int = 1,
        *,
        context: Given = None,
        rows: Given = None,
        kl: KLRule = "auto",
        chunk_size: int = CHUNK,
    ) -> Evaluation:
        """ELBO, rate, distortion and log likelihood of each row, from the same draws of q(z | x).

            rate = KL(q(z | x) || p(z)),   distortion = -E_q log p(x | z),
            elbo = -rate - distortion,
            log_likelihood = log (1/K sum_k p(x, z_k) / q(z_k | x))

        for K = `num_samples` draws: arrays of shape [*batch] for x of shape [*batch, *event_shape].
        All is given y where there is a `context`, whose leading axes broadcast to [*batch]. Where
        each row has its own posterior, `rows`, integers of shape [*batch], say which they are; by
        default 0, 1, 2, ... The rate is that of the draws where `kl` is "sampled", in
        closed form where it is "analytic", and by default where it has one. So many evaluations of
        the decoder as `chunk_size` are in memory together.

        Source: Burda, Grosse, Salakhutdinov, "Importance Weighted Autoencoders", 2016; Alemi,
        Poole, Fischer, Dillon, Saurous, Murphy, "Fixing a Broken ELBO", 2018.
        """
        check_kl_rule(kl)
        count, chunks = _chunks(num_samples, chunk_size)
        flat, batch_shape = self.flat(self._of_rows(x, context, rows))
        own = own_params(self, params, key)
        found = evaluation.evaluate(self, own, key, flat, np.int32(count), chunks, kl)
        return Evaluation(*(each.reshape(batch_shape) for each in found))

    def elbo(
        self, params: Params, key: Array, x: Data, num_samples: int = 1, **options: Unpack[Options]
    ) -> Array:
        """The evidence lower bound E_q [log p(x, z) - log q(z | x)] of each row; see `evaluate`."""
        return self.evaluate(params, key, x, num_samples, **options).elbo

    def rate_and_distortion(
        self, params: Params, key: Array, x: Data, num_samples: int = 1, **options: Unpack[Options]
    ) -> tuple[Array, Array]:
        """KL(q(z | x) || p(z)) and -E_q log p(x | z) of each row; see `evaluate`."""
        found = self.evaluate(params, key, x, num_samples, **options)
        return found.rate, found.distortion

    def log_likelihood(
        self, params: Params, key: Array, x: Data, num_samples: int, **options: Unpack[Options]
    ) -> Array:
        """A lower bound of log p(x) that rises to it with `num_samples`; see `evaluate`."""
        return self.evaluate(params, key, x, num_samples, **options).log_likelihood

    def log_weights(
        self,
        params: Params,
        key: Array,
        x: Data,
        num_samples: int,
        *,
        context: Given = None,
        rows: Given = None,
        chunk_size: int = CHUNK,
    ) -> Array:
        """log p(x, z_k) - log q(z_k | x) of shape [K, *batch], at the draws of `evaluate`."""
        count, chunks = _chunks(num_samples, chunk_size)
        flat, batch_shape = self.flat(self._of_rows(x, context, rows))
        own = own_params(self, params, key)
        found = evaluation.log_weights(self, own, key, flat, count, chunks)
        return found.reshape(count, *batch_shape)

    def prior_bound(
        self,
        params: Params,
        key: Array,
        x: Data,
        num_samples: int,
        *,
        context: Given = None,
        chunk_size: int = CHUNK,
    ) -> Array:
        """log (1/K sum_k p(x | z_k)) of each row, z_k from the prior: the bound that needs no q.

        All rows share the noise of the draws, and K must be very large before it says much.
        """
        count, chunks = _chunks(num_samples, chunk_size)
        flat, batch_shape = self.flat(self.given(x, context))
        own = own_params(self, params, key)
        found = evaluation.prior_bound(self, own, key, flat, np.int32(count), chunks)
        return found.reshape(batch_shape)

    def sample(
        self,
        params: Params,
        key: Array,
        sample_shape: Size = (),
        *,
        context: Given = None,
        num_per_latent: int | None = None,
    ) -> Array:
        """Draws of x, of shape sample_shape + batch + [num_per_latent] + event_shape.

        There are `sample_shape` z for each row of a context [*batch, *context_shape], and
        `num_per_latent` x for each z; None for one, without an axis. With no context batch is ().
        """
        if num_per_latent is not None:
            num_per_latent = checks.positive_int("num_per_latent", num_per_latent)
        shape = _sample_shape(sample_shape, num_per_latent or 1)
        own, (latent_key, key) = own_params(self, params, key), jax.random.split(key)
        z, given = self.sample_latents(own, latent_key, shape, context)
        seen = self.seen("likelihood", {**given, "z": z})
        x = self.likelihood.sample(own["likelihood"], key, num_per_latent or (), seen)
        return x if num_per_latent is None else jnp.moveaxis(x, 0, -1 - len(self.event_shape))

    def sample_latents(
        self, params: Params, key: Array, shape: Shape, context: Given
    ) -> tuple[Array, Rows]:
        """Draws of z from the prior, of shape `shape` + batch + latent_shape; and the context."""
        given = self._given(None, context)
        seen, batch = self.seen("prior", given), shape
        if seen is None and given:
            # A prior that is blind to y draws for each y all the same.
            batch = shape + self._batch_of(given["context"])
        return self.prior.sample(params["prior"], key, batch, seen), given

    def encode(
        self,
        params: Params,
        key: Array,
        x: Data,
        sample_shape: Size = (),
        *,
        context: Given = None,
        rows: Given = None,
    ) -> Array:
        """Draws of z from q(z | x), of shape sample_shape + batch + latent_shape."""
        own, shape = own_params(self, params, key), _sample_shape(sample_shape)
        seen = self.seen("posterior", self._of_rows(x, context, rows))
        return self.posterior.sample(own["posterior"], key, shape, seen)

    def decode(self, params: Params, z: Data, *, context: Given = None) -> Array:
        """The mean of p(x | z), of shape [..., *event_shape], for z [..., *latent_shape].

        The leading axes of z and of the context broadcast.
        """
        given = {**self._given(None, context), "z": self._z(z)}
        return evaluation.decode(self, own_params(self, params), given)

    def reconstruct(
        self,
        params: Params,
        key: Array,
        x: Data,
        num_samples: int = 1,
        *,
        context: Given = None,
        rows: Given = None,
    ) -> Array:
        """The mean of p(x' | z), of the shape of x, averaged over `num_samples` z from q(z | x)."""
        num_samples = checks.positive_int("num_samples", num_samples)
        z = self.encode(params, key, x, num_samples, context=context, rows=rows)
        return self.decode(params, z, context=context).mean(0)

    def sample_given(
        self,
        params: Params,
        key: Array,
        x: Data,
        sample_shape: Size = (),
        *,
        context: Given = None,
        rows: Given = None,
        share_latent: bool = False,
    ) -> Array:
        """Draws x' like x, of shape sample_shape + batch + event_shape: x' given z from q(z | x).

        With `share_latent` all x' of an x come from one z; by default each has its own.
        """
        own, shape = own_params(self, params, key), _sample_shape(sample_shape)
        latent_key, key = jax.random.split(key)
        outer, inner = (shape, ()) if share_latent else ((), shape)
        given = self._of_rows(x, context, rows)
        z = self.posterior.sample(
            own["posterior"], latent_key, inner, self.seen("posterior", given)
        )
        seen = self.seen("likelihood", {**given, "z": z})
        return self.likelihood.sample(own["likelihood"], key, outer, seen)

    def check_x(self, x: Data) -> Array:
        """x of shape [*batch, *event_shape]."""
        x = as_array("x", x)
        checks.trailing_shape("x", x, self.event_shape, f"the likelihood {self.likelihood!r}")
        return jnp.asarray(x)

    def check_context(
        self, context: Given, families: Sequence[str] = NAMES
    ) -> Array | np.ndarray | None:
        """A context of shape [*batch, *context_shape]; None where none of the families needs it."""
        if "context" not in self.shapes:
            fix = "Perhaps give the `VAE` a `context_shape`?"
            rule = "`context` must be None for a model without covariates"
            require(context is None, rule, context, fix, say=checks.shown)
            return None
        shape, owner = self.shapes["context"], "this model"
        if context is None and not any("context" in self.parts[name] for name in families):
            return None
        if context is None:
            rule = f"`context` must have a shape that ends in {shape} for {owner}"
            raise ValueError(f"{rule}; got None.")
        array = as_array("context", context)
        checks.trailing_shape("context", array, shape, owner)
        posterior = self.posterior
        return posterior.check_labels(array) if isinstance(posterior, Labelled) else array

    def _z(self, z: Data) -> Array:
        z = as_array("z", z)
        checks.trailing_shape("z", z, self.latent_shape, f"the prior {self.prior!r}")
        return jnp.asarray(z)

    def _axes(self, x: Array | np.ndarray) -> Shape:
        return x.shape[: x.ndim - len(self.event_shape)]

    def _given(
        self, batch_shape: Shape | None, context: Given, families: Sequence[str] = JOINT
    ) -> Rows:
        """The context by name where there is one, with these leading axes if not None."""
        if (found := self.check_context(context, families)) is None:
            return {}
        own, shape = self._batch_of(found), self.shapes["context"]
        if batch_shape is not None:
            fits = own == batch_shape[len(batch_shape) - len(own) :]
            rule = f"`context` must have the leading axes {batch_shape} of `x`, or the last of them"
            require(fits, rule, own)
            found = jnp.broadcast_to(found, batch_shape + shape)
        return {"context": jnp.asarray(found)}

    def _batch_of(self, context: Array | np.ndarray) -> Shape:
        return context.shape[: context.ndim - len(self.shapes["context"])]

    def given(self, x: Data, context: Given = None, families: Sequence[str] = JOINT) -> Rows:
        """What these families know of each row, by name: x, and the context."""
        x = self.check_x(x)
        return {"x": x, **self._given(self._axes(x), context, families)}

    def _of_rows(self, x: Data, context: Given, rows: Given) -> Rows:
        """What there is of each row, by name: x, the context, the numbers of the rows."""
        given = self.given(x, context, NAMES)
        if not self.is_unamortized:
            rule = "`rows` must be None for an amortized posterior, which needs x alone"
            require(rows is None, rule, rows)
            return given
        shape = self._axes(given["x"])
        count = math.prod(shape)
        rows = np.arange(count).reshape(shape) if rows is None else as_array("rows", rows)
        require(rows.shape == shape, f"`rows` must have shape {shape}, as `x` does", rows.shape)
        self.posterior.check_context(rows)
        return {**given, "row": jnp.asarray(rows)}

    def flat(self, given: Rows) -> tuple[Rows, Shape]:
        """What there is of each row with one axis of rows, and the axes they had."""
        shape = self._axes(given["x"])
        return {n: a.reshape(-1, *a.shape[len(shape) :]) for n, a in given.items()}, shape


def check_vae(vae: VAE) -> None:
    """Checks that this is a model."""
    require(isinstance(vae, VAE), "`vae` must be a `fv.VAE(...)`", vae, error=TypeError)


def own_params(vae: VAE, params: Params, key: Array | None = None) -> Params:
    """The parameters of a model without what may stand beside them; an error for another's."""
    if key is not None:
        check_key(key)
    if not isinstance(params, dict) or any(name not in params for name in NAMES):
        got = sorted(params) if isinstance(params, dict) else type(params).__name__
        fix = " Perhaps use its `.params`?" if hasattr(params, "params") else ""
        rule = "`params` must be a dict with the keys prior, likelihood and posterior, such as"
        raise ValueError(f"{rule} `vae.init(key)`; got {got}.{fix}")
    for name in NAMES:
        family, own = getattr(vae, name), params[name]
        origin = own.get("origin") if isinstance(own, dict) else None
        rule = f'`params["{name}"]` must be those of {family!r}'
        if isinstance(origin, Origin) and origin.family != family:
            raise ValueError(f"{rule}; got those of {origin.family!r}.")
        shapes, expected = [np.shape(leaf) for leaf in jax.tree.leaves(own)], _shapes(family)
        require(shapes == expected, f"{rule}, arrays of shapes {expected}", shapes)
    return {name: params[name] for name in NAMES}


@functools.lru_cache(maxsize=64)
def _shapes(family: Family) -> list[Shape]:
    """The shapes of the leaves of a family's parameters."""
    made = jax.eval_shape(family.init, jax.random.key(0))
    return [leaf.shape for leaf in jax.tree.leaves(made)]


def _sample_shape(sample_shape: int | Sequence[int], others: int = 1) -> Shape:
    shape, most = checks.shape("sample_shape", sample_shape), checks.INT32_MAX
    rule = f"`sample_shape` must be of at most {most:,} draws"
    require(math.prod(shape) * others <= most, rule, sample_shape)
    return shape


def _chunks(num_samples: int, chunk_size: int) -> tuple[int, Chunks]:
    """The number of draws of a row, and the chunks that they go through in."""
    count = checks.positive_int("num_samples", num_samples)
    size = checks.positive_int("chunk_size", chunk_size)
    # Powers of two, so that there are few programs.
    draws = min(1 << (count - 1).bit_length(), DRAWS, 1 << (size.bit_length() - 1))
    return count, Chunks(draws, size)


@dataclasses.dataclass(frozen=True)
class Seen:
    """batch -> the context of one of a model's families."""

    vae: VAE
    name: str

    def __call__(self, batch: Batch) -> Array | None:
        return self.vae.seen(self.name, batch)


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """(params, key, z, batch) -> log p(x | z) of shape [K, B], in its training form."""

    vae: VAE

    @property
    def takes_shared(self) -> bool:
        """Whether z may be of shape [K, 1, *latent], for values that all rows share."""
        return "context" not in self.vae.parts["likelihood"]

    def __call__(self, params: Params, key: Array, z: Array, batch: Batch) -> DensityAndState:
        family, own, x = self.vae.likelihood, params["likelihood"], jnp.asarray(batch["x"])
        shared = z.shape[1] == 1 != len(x)
        context = self.vae.seen("likelihood", {**batch, "z": z[:, 0] if shared else z})
        p, new = family.train_distribution(own, key, context)
        if shared:
            # Mapped over rows, what depends on z alone is computed once.
            shape = (z.shape[0], *family.event_shape)
            log_prob = jax.vmap(lambda row: p.log_prob(jnp.broadcast_to(row, shape)))(x).T
        else:
            leading = z.shape[: z.ndim - len(self.vae.latent_shape)]
            log_prob = p.log_prob(jnp.broadcast_to(x, leading + family.event_shape))
        return log_prob, {} if new is own else {"likelihood": new}


@dataclasses.dataclass(frozen=True)
class Supervised:
    """A log likelihood, and log q(y | x) of the rows whose label is known, as `VAE.loss` says."""

    log_likelihood: Likelihood
    weight: float

    @property
    def takes_shared(self) -> bool:
        """As of the log likelihood."""
        return self.log_likelihood.takes_shared

    def __call__(self, params: Params, key: Array, z: Array, batch: Batch) -> DensityAndState:
        key, label_key = jax.random.split(key)
        terms, new = self.log_likelihood(params, key, z, batch)
        vae = self.log_likelihood.vae
        classes = cast(Labelled, vae.posterior)
        context = vae.seen("posterior", batch)
        log_q, is_known = classes.label_log_prob(params["posterior"], label_key, context)
        share = len(log_q) / jnp.maximum(jnp.sum(is_known), 1)
        return terms + self.weight * share * log_q, new


def weights_of(batch: Batch) -> Array:
    """The weights of a batch's rows."""
    return batch["weight"]


def as_float(x: Data) -> Array:
    """Whole numbers as networks take them; others as they are."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.result_type(float))
