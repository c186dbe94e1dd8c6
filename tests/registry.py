"""The one registry of bijectors: contracts run over all of it.

A case covers several things at once (a size, a depth, an order, a direction, a transformer), so
that the registry stays small: the price of a case is its compilation.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import optax

import flowvi as fv
from flowvi.bijectors import Units, orthogonal
from flowvi.masked import MaskedNetwork
from flowvi.monotone import UMNN, Bernstein, DeepSigmoid, SumOfSquares
from flowvi.networks import MLP
from flowvi.params import combine, partition
from flowvi.testing import perturbed
from flowvi.transformers import Affine, ScaledSpline, Spline
from tests import tolerances
from tests.small import SMALL, SPLINE, TOKENS

CONDITIONS = ("start", "perturbed", "trained")
NUM_EVENTS = 6
AFFINE = Affine()
NUM_STEPS = 40

Array = jax.Array
Params = Any

# Programs that run once: do not spend time on making them fast.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@dataclasses.dataclass(frozen=True)
class Sample:
    """A bijector at some parameters, events in its domain, and what it claims."""

    bijector: distrax.Bijector
    x: Array
    order: tuple[int, ...] | None
    batch_shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A bijector waiting for parameters.

    `init(key) -> params` and `build(params) -> bijector`; arrays that are no parameters are
    `fv.Fixed` in params. `direct` is the direction that needs no solve, along which training
    is cheap.
    """

    init: Callable[[Array], Params]
    build: Callable[[Params], distrax.Bijector]
    event_size: int
    order: tuple[int, ...] | None = None
    batch_shape: tuple[int, ...] = ()
    direct: str = "forward"
    bound: float = np.inf
    #: In double precision, where the map is computed by steps.
    tolerance: float | None = None

    @property
    def has_params(self) -> bool:
        return bool(jax.tree.leaves(partition(self.params("start"))[0]))

    def make(self, condition: str, dtype: str) -> Sample:
        """The bijector under a condition; float64 needs 64-bit types to be enabled."""
        params, x = self.inputs(condition, dtype)
        return Sample(quick_jit(self.build)(params), x, self.order, self.batch_shape)

    def inputs(self, condition: str, dtype: str) -> tuple[Params, Array]:
        """Parameters under a condition, and events."""
        shape = (NUM_EVENTS, *self.batch_shape, self.event_size)
        # Heavy tails: some coordinates leave the interval of a spline.
        z = np.clip(np.random.default_rng(0).standard_t(4, shape), -self.bound, self.bound)
        return cast(self.params(condition), dtype), jnp.asarray(z, dtype)

    @functools.cache  # noqa: B019 (cases live as long as the tests)
    def params(self, condition: str) -> Params:
        """Parameters at their start, perturbed by 0.3, or after a short training; float32."""
        with jax.enable_x64(False):
            if condition == "start":
                return quick_jit(self.init)(jax.random.key(0, impl="rbg"))
            if condition == "perturbed":
                return perturbed(self.params("start"), scale=0.3, seed=0)
            return self._train(perturbed(self.params("start"), scale=0.03, seed=0))

    def _train(self, params: Params) -> Params:
        """Some steps of Adam from a skewed sample with dependent coordinates to the normal."""
        shape = (NUM_STEPS, 64, *self.batch_shape, self.event_size)
        x = np.random.default_rng(0).gumbel(size=shape)
        batches = jnp.asarray(x + np.sin(2 * np.roll(x, 1, -1)), jnp.float32)
        method = f"{self.direct}_and_log_det"
        optimizer = optax.adam(0.02)

        def train(params: Params, batches: Array) -> Params:
            trainable, fixed = partition(params)

            def loss(trainable: Params, x: Array) -> Array:
                y, log_det = getattr(self.build(combine(trainable, fixed)), method)(x)
                return (0.5 * (y**2).sum(-1) - log_det).mean()

            def step(carry: tuple[Params, Any], x: Array) -> tuple[tuple[Params, Any], None]:
                trainable, state = carry
                updates, state = optimizer.update(jax.grad(loss)(trainable, x), state)
                return (optax.apply_updates(trainable, updates), state), None

            start = trainable, optimizer.init(trainable)
            (trainable, _), _ = jax.lax.scan(step, start, batches)
            return combine(trainable, fixed)

        return quick_jit(train)(params, batches)


def cast(tree: Any, dtype: str) -> Any:
    """Casts all float leaves, in numpy, for JAX would compile a program for every shape."""
    return jax.tree.map(
        lambda a: jnp.asarray(np.asarray(a), dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a,
        tree,
    )


# ------------------------------------------------------------------------------- single layers


def layer(
    kind: str,
    event_size: int,
    hidden_sizes: tuple[int, ...],
    transformer: Any = AFFINE,
    *,
    order: Any = None,
    context_shape: tuple[int, ...] | None = None,
    opaque: bool = False,
) -> Case:
    """One autoregressive layer over a bound masked network."""
    network = MaskedNetwork(
        event_size,
        hidden_sizes,
        transformer.num_params,
        context_size=None if context_shape is None else context_shape[-1],
        order=order,
    )
    bijector = {"iaf": fv.IAF, "maf": fv.MAF}[kind]

    def init(key: Array) -> Params:
        context = None if context_shape is None else jax.random.normal(key, context_shape)
        return {"network": network.init(key), "context": fv.Fixed(context)}

    def build(params: Params) -> distrax.Bijector:
        conditioner = network.bind(params["network"], params["context"].value)
        if opaque:  # A callable whose weights nobody can look at.
            conditioner = jax.tree_util.Partial(_call, conditioner)
        return bijector(conditioner, transformer)

    return Case(
        init,
        build,
        event_size,
        order=tuple(range(event_size)) if order is None else order,
        batch_shape=() if context_shape is None else context_shape[:-1],
        direct="forward" if kind == "iaf" else "inverse",
    )


def _call(conditioner: Any, x: Array) -> Array:
    return conditioner(x)


def shuffled(size: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(int(i) for i in np.random.default_rng(seed).permutation(size))


# ----------------------------------------------------------------------------------- composites


def chain(kind: str, event_size: int, num_layers: int, transformer: Any) -> Case:
    """Layers of one structure, with permutations between them: these are stacked and scanned."""
    one = layer(kind, event_size, (8,), transformer)
    turn = fv.Permutation(shuffled(event_size))

    def build(params: Params) -> distrax.Bijector:
        return fv.Chain([b for p in params for b in (one.build(p), turn)])

    return Case(
        lambda key: [one.init(k) for k in jax.random.split(key, num_layers)],
        build,
        event_size,
        direct=one.direct,
    )


def lu_linear(event_size: int) -> Case:
    def init(key: Array) -> Params:
        del key
        return {"matrix": jnp.zeros((event_size, event_size)), "bias": jnp.zeros(event_size)}

    return Case(init, lambda params: fv.LULinear(**params), event_size)


def linear_maps(event_size: int) -> Case:
    """Learned linear maps one after the other: a diagonal, reflections, QR and singular values."""
    names = ("actnorm", "householder", "qr", "svd")

    def init(key: Array) -> Params:
        del key
        return {name: orthogonal.init_linear(name, event_size) for name in names}

    def build(params: Params) -> distrax.Bijector:
        return distrax.Chain([orthogonal.linear(name, params[name]) for name in names])

    return Case(init, build, event_size)


def fixed_bijector(bijector: distrax.Bijector, event_size: int, **kwargs: Any) -> Case:
    return Case(lambda key: {}, lambda params: bijector, event_size, **kwargs)


UNITS = {
    "shift": np.array([1.0, -2.0, 0.5, 0.0], np.float32),
    "scale": np.array([2.0, 0.5, 1.0, 0.7], np.float32),
    "lower": np.array([-np.inf, 0.0, -np.inf, -1.0], np.float32),
    "upper": np.array([np.inf, np.inf, 3.0, 4.0], np.float32),
}


def units() -> Case:
    """Real, positive, bounded above, and an interval."""

    def init(key: Array) -> Params:
        del key
        return {name: fv.Fixed(jnp.asarray(value)) for name, value in UNITS.items()}

    def build(params: Params) -> distrax.Bijector:
        return Units(**{name: value.value for name, value in params.items()})

    return Case(init, build, 4, order=(0, 1, 2, 3))


def wrapped() -> Case:
    """Distrax's wrappers around ours: Chain, Block and Inverse."""
    inner = layer("maf", 5, (8,))

    def init(key: Array) -> Params:
        return {"inner": inner.init(key), "theta": jnp.zeros((5, 2))}

    def build(params: Params) -> distrax.Bijector:
        scalar = Affine()(params["theta"])
        return distrax.Chain(
            [distrax.Block(scalar, 1), distrax.Inverse(inner.build(params["inner"]))]
        )

    return Case(init, build, 5, order=(0, 1, 2, 3, 4))


# ------------------------------------------------------------------------------------- families


def family(
    make: Any,
    *,
    context_shape: tuple[int, ...] | None = None,
    direct: str = "inverse",
    in_units: bool = False,
    order: Any = None,
    bound: float = np.inf,
) -> Case:
    """The full map of a family."""

    def init(key: Array) -> Params:
        params = make.init(key)
        if in_units:
            units = {name: jnp.asarray(UNITS[name]) for name in ("shift", "scale")}
            params = {**params, "units": fv.Fixed(units)}
        context = None if context_shape is None else jax.random.normal(key, context_shape)
        return {"family": params, "context": fv.Fixed(context)}

    def build(params: Params) -> distrax.Bijector:
        return make.distribution(params["family"], params["context"].value).bijector

    return Case(
        init,
        build,
        make.event_shape[0],
        order=order,
        bound=bound,
        batch_shape=() if context_shape is None else context_shape[:-1],
        direct=direct,
    )


REGISTRY: dict[str, Case] = {
    # One layer: size, depth, width, order, context.
    "iaf_affine_1_no_hidden": layer("iaf", 1, ()),
    "maf_spline_1": layer("maf", 1, (4,), Spline(num_bins=4)),
    "maf_scaled_2": layer("maf", 2, (4,), ScaledSpline(num_bins=4)),
    "maf_umnn_2": layer("maf", 2, (4,), UMNN(2, 12)),
    "iaf_deep_sigmoid_2": layer("iaf", 2, (4,), DeepSigmoid(3)),
    "maf_sum_of_squares_2": layer("maf", 2, (4,), SumOfSquares(2, 2)),
    "maf_bernstein_2": layer("maf", 2, (4,), Bernstein(4)),
    "maf_affine_2_no_hidden": layer("maf", 2, ()),
    "iaf_affine_2": layer("iaf", 2, (8, 8)),
    "iaf_affine_5_narrow_deep": layer("iaf", 5, (3, 2, 3)),
    "maf_affine_5_reversed": layer("maf", 5, (16, 16), order=(4, 3, 2, 1, 0)),
    "iaf_spline_33_shuffled": layer("iaf", 33, (48,), Spline(), order=shuffled(33)),
    "maf_affine_33_narrow": layer("maf", 33, (20, 20)),
    "iaf_affine_128": layer("iaf", 128, (128,)),
    "maf_spline_128_shuffled": layer("maf", 128, (64, 64), SPLINE, order=shuffled(128)),
    "iaf_affine_context": layer("iaf", 3, (8,), context_shape=(2,)),
    "maf_affine_contexts": layer("maf", 3, (8,), context_shape=(4, 2)),
    "iaf_affine_5_opaque": layer("iaf", 5, (8,), order=shuffled(5), opaque=True),
    # Layers together.
    "chain": chain("iaf", 5, 3, Affine()),
    "lu_linear_5": lu_linear(5),
    "lu_linear_128": lu_linear(128),
    "permutation": fixed_bijector(fv.Permutation(shuffled(5)), 5),
    "units": units(),
    "wrapped": wrapped(),
    # Families.
    "iaf_family": family(fv.iaf(5, **{**SMALL, "num_layers": 5}), direct="forward"),
    "maf_family_lu": family(
        fv.maf(3, num_layers=3, hidden_sizes=[8, 8], transformer="affine", mixing="lu")
    ),
    "torus": family(fv.torus(3, num_layers=2, hidden_sizes=[8], num_bins=3), bound=3.1),
    "bnaf_context": family(
        fv.bnaf(3, num_layers=1, hidden_sizes=[3, 2], context_size=2), context_shape=(2, 2)
    ),
    # Of posteriors: the inverse is a root.
    "planar_context": family(
        fv.planar(3, num_layers=1, context_size=2), context_shape=(2, 2), direct="forward"
    ),
    "radial": family(fv.radial(3, num_layers=1), direct="forward"),
    "sylvester_householder": family(fv.sylvester(4, num_layers=1, rank=3), direct="forward"),
    "sylvester_triangular": family(
        fv.sylvester(3, kind="triangular", num_layers=2), direct="forward"
    ),
    # The linear maps beside LU.
    "linear_maps": linear_maps(3),
    "maf_adjacency": family(
        fv.maf(
            4,
            adjacency=[[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]],
            hidden_sizes=[6],
            transformer="affine",
            context_size=2,
        ),
        context_shape=(2, 2),
    ),
    "maf_family_128": family(fv.maf(128, num_layers=2, hidden_sizes=[128], transformer="affine")),
    "maf_family_in_units": family(
        fv.standardized(
            fv.maf(4, num_layers=1, hidden_sizes=[8], transformer="affine"),
            [None, "positive", (None, 3.0), (-1.0, 4.0)],
        ),
        in_units=True,
    ),
    "maf_family_context": family(
        fv.conditional(
            fv.maf(2, num_layers=2, hidden_sizes=[8], transformer="affine", context_size=3),
            MLP(5, (4,), 3),
        ),
        context_shape=(4, 5),
    ),
    "coupling_affine": family(fv.coupling(4, num_layers=3, hidden_sizes=[8], transformer="affine")),
    "coupling_spline": family(fv.coupling(5, num_layers=3, hidden_sizes=[8])),
    "residual": family(fv.residual(2, num_layers=2, hidden_sizes=[8])),
    "continuous": dataclasses.replace(
        family(fv.continuous(2, hidden_sizes=[8], context_size=2), context_shape=(2, 2)),
        tolerance=tolerances.STEPS,
    ),
    "transformer_flow": family(fv.transformer_flow(3, **TOKENS, transformer="affine")),
    "transformer_flow_context": family(
        fv.transformer_flow(
            3,
            **{**TOKENS, "num_blocks": 1},
            transformer=SPLINE,
            context_size=2,
            density_first=False,
        ),
        context_shape=(2, 2),
        direct="forward",
    ),
    "mean_field": family(fv.mean_field(5), order=(0, 1, 2, 3, 4)),
    "full_rank": family(fv.full_rank(5), order=(0, 1, 2, 3, 4)),
    "gaussian_full_context": family(
        fv.conditional(fv.gaussian(3, scale="full"), MLP(2, (4,), 9)),
        context_shape=(4, 2),
        order=(0, 1, 2),
    ),
}
