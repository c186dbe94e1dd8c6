"""Contracts of all families, over one list of cases: one program a case, which all tests share."""

import functools
import pickle

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi.networks import MLP
from flowvi.params import Origin, PerRow
from tests import tolerances
from tests.small import AFFINE, SMALL, SPLINE, TOKENS

KEY = jax.random.key(0)

FAMILIES = {
    "iaf": lambda d, **kw: fv.iaf(d, **SMALL, **kw),
    "maf": lambda d, **kw: fv.maf(d, **SMALL, **kw),
    "iaf_affine": lambda d, **kw: fv.iaf(d, **AFFINE, **kw),
    "maf_affine": lambda d, **kw: fv.maf(d, **AFFINE, **kw),
    "maf_lu": lambda d, **kw: fv.maf(d, **SMALL, mixing="lu", **kw),
    "maf_odd": lambda d, **kw: fv.maf(d, **{**SMALL, "num_layers": 3, "hidden_sizes": []}, **kw),
    "coupling": lambda d, **kw: fv.coupling(d, **SMALL, **kw),
    "coupling_affine": lambda d, **kw: fv.coupling(d, **AFFINE, **kw),
    "flow_on_flow": lambda d, **kw: fv.iaf(d, **AFFINE, base=fv.maf(d, **AFFINE, **kw), **kw),
    "residual": lambda d, **kw: fv.residual(d, num_layers=2, hidden_sizes=[8], **kw),
    "transformer_flow": lambda d, **kw: fv.transformer_flow(d, **TOKENS, transformer=SPLINE, **kw),
    "continuous": lambda d, **kw: fv.continuous(d, hidden_sizes=[8], **kw),
    "flow_on_normal": lambda d, **kw: fv.maf(d, **AFFINE, base=fv.full_rank(d), **kw),
}
NORMALS = {
    "mean_field": fv.mean_field,
    "full_rank": fv.full_rank,
    "standard_normal": fv.standard_normal,
}


def perturbed(params, scale=0.3, seed=0):
    """Parameters with noise on all that is not frozen."""
    rng, is_fixed = np.random.default_rng(seed), lambda node: isinstance(node, fv.Fixed)
    return jax.tree.map(
        lambda a: a if is_fixed(a) else (a + scale * rng.normal(size=a.shape)).astype(a.dtype),
        params,
        is_leaf=is_fixed,
    )


def conditional(family, size):
    return fv.conditional(family, MLP(size, (4,), family.context_shape))


def laplace_density(x, context):
    return -jnp.sum(jnp.abs(x - context[:2])) - 2 * jnp.log(2.0)


def laplace_sample(key, context):
    return context[:2] + jax.random.laplace(key, (2,))


#: Families that start as a standard normal.
PLAIN = {name: make(3) for name, make in {**FAMILIES, **NORMALS}.items()}
PLAIN |= {f"{name}_1": FAMILIES[name](1) for name in ("iaf", "maf", "coupling")}
PLAIN |= {
    "whitened": fv.whitened(fv.iaf(3, **AFFINE)),
    "whitened_low_rank": fv.whitened(fv.mean_field(3), rank=2, marginal="spline"),
    "standardized": fv.standardized(fv.maf(3, **AFFINE)),
    "gaussianized": fv.gaussianized(fv.mean_field(3), num_bins=4),
    "unconditional_flow": fv.unconditional(fv.iaf(2, **AFFINE, context_size=3)),
}
PARAMETRIC = {
    "gaussian": fv.gaussian(2),
    "gaussian_full": fv.gaussian(2, scale="full"),
    "gaussian_fixed": fv.gaussian(2, scale=0.5),
    "gaussian_learned": fv.gaussian(2, scale="learned"),
    "gaussian_image": fv.gaussian((3, 2, 1)),
    "laplace": fv.laplace(2),
    "logistic": fv.logistic(2),
    "gumbel": fv.gumbel(2),
    "bernoulli": fv.bernoulli((2, 3)),
    "continuous_bernoulli": fv.continuous_bernoulli(2),
    "categorical": fv.categorical(2, 4),
    "categorical_scalar": fv.categorical((), 3),
    "one_hot": fv.categorical(2, 4, one_hot=True),
    "relaxed": fv.relaxed(fv.bernoulli(2), 0.5),
    "mixture": fv.mixture(2, 3, components="predicted"),
    "gamma": fv.from_distrax(
        distrax.Gamma,
        2,
        ("concentration", "rate"),
        constraints={"concentration": "positive", "rate": "positive"},
        reparameterized=True,
        support="positive",
    ),
}
DISCRETE = ["bernoulli", "categorical", "categorical_scalar", "one_hot", "relaxed"]
OTHERS = {
    "custom": fv.custom(
        laplace_density, 2, sampler=laplace_sample, context_shape=2, reparameterized=True
    ),
    "local": fv.local(fv.gaussian(2), 5),
    "local_flow": fv.local(fv.iaf(2, **AFFINE, context_size=3), 5),
    "learned_mixture": fv.mixture(2, 3),
    "flow_on_mixture": fv.iaf(2, **AFFINE, base=fv.mixture(2, 3)),
    "standardized_context": fv.standardized(
        conditional(fv.iaf(2, **AFFINE, context_size=3), 4), ["positive", (0, 1)]
    ),
    "joint": fv.joint(fv.standard_normal(2), conditional(fv.gaussian(3), 2)),
    "joint_posterior": fv.joint(
        conditional(fv.gaussian(2), (2, 2)), conditional(fv.gaussian(3), 6)
    ),
    "joint_mixed": fv.joint(
        conditional(fv.categorical(2, 3), 4),
        conditional(fv.mixture(1, 2, components="predicted"), 6),
    ),
    **{
        f"{name}_context": FAMILIES[name](2, context_size=3)
        for name in ("maf", "iaf_affine", "maf_lu", "coupling")
    },
    "flow_on_features": conditional(
        fv.coupling(3, **AFFINE, context_size=5, base=fv.gaussian(3, scale="full")), (4, 4)
    ),
}
CASES = {**PLAIN, **PARAMETRIC, **OTHERS}
NOT_REPARAMETERIZED = [*DISCRETE[:-1], "mixture", "learned_mixture", "flow_on_mixture"]


#: What others cover too, more cheaply.
DEAR = ["maf_affine", "coupling_affine", "flow_on_normal", "iaf_1", "coupling_1", "whitened"]
DEAR += ["unconditional_flow", "local_flow", "flow_on_mixture", "joint_posterior", "maf_context"]
DEAR += ["gaussian_fixed", "gaussian_learned", "gaussian_image", "laplace", "logistic", "gumbel"]
DEAR += ["iaf_affine_context", "residual", "transformer_flow", "continuous"]


def quick(names):
    """Names of which the dear ones are for `-m slow`."""
    return [pytest.param(n, marks=pytest.mark.slow) if n in DEAR else n for n in names]


@functools.cache
def started(name):
    """Fresh parameters, as numpy arrays."""
    return jax.tree.map(np.asarray, jax.jit(CASES[name].init)(KEY))


def contexts(name, *batch, scale=1.0, seed=0):
    family, rng = CASES[name], np.random.default_rng(seed)
    if family.context_shape is None:
        return None
    if name.startswith("local"):
        return rng.integers(0, 5, batch).astype(np.int32)
    return (scale * rng.normal(size=(*batch, *family.context_shape))).astype(np.float32)


@functools.cache
def program(name):
    family = CASES[name]

    @jax.jit
    def run(params, context):
        q = family.distribution(params, context)
        draw = functools.partial(q.sample, seed=KEY)
        x, log_prob = q.sample_and_log_prob(seed=KEY, sample_shape=(4,))
        # One call for all, which is compiled once: as drawn, of other rows, with NaN, at a fixed x.
        others = {"scored": x, "fixed": jnp.full_like(x, 0.5)}
        if jnp.issubdtype(x.dtype, jnp.floating):
            others["broken"] = x.reshape(-1).at[0].set(jnp.nan).reshape(x.shape)
        if context is not None:
            others["flipped"] = x[:, ::-1]
        scored = q.log_prob(jnp.concatenate(list(others.values())))
        found = dict(zip(others, jnp.split(scored, len(others)), strict=True))
        found |= {"x": x, "log_prob": log_prob}
        if name in PARAMETRIC or name in ("maf", "iaf", "coupling"):
            found["again"] = draw(sample_shape=(4,))
        if name in PARAMETRIC or name in ("custom", "joint", "local"):
            found["none"] = draw(sample_shape=0)
        if context is not None:
            one = lambda x, c: family.distribution(params, c).log_prob(x)  # noqa: E731
            found["rows"] = jax.vmap(one, (1, 0), 1)(x, context)
        return found

    return run


@functools.cache
def results(name, scale=0.3):
    context = contexts(name, 6)
    params = perturbed(started(name), scale)
    return {k: np.asarray(v) for k, v in program(name)(params, context).items()}


@pytest.mark.parametrize("name", quick(CASES))
def test_samples_have_the_density_they_claim(name):
    family, found = CASES[name], results(name)
    batch = () if family.context_shape is None else (6,)
    assert found["x"].shape == (4, *batch, *family.event_shape)
    if "none" in found:
        assert found["none"].shape == (0, *batch, *family.event_shape)
    assert found["log_prob"].shape == (4, *batch)
    assert np.isfinite(found["log_prob"]).all()
    for other in ("scored", "rows"):
        if other in found:
            np.testing.assert_allclose(found[other], found["log_prob"], rtol=1e-4, atol=3e-4)
    if "again" in found:
        np.testing.assert_allclose(found["again"], found["x"], rtol=1e-4, atol=1e-5)
    if "broken" in found:
        isnan = np.isnan(found["broken"]).ravel()
        assert isnan[0] and not isnan[1:].any()
    if batch:
        assert abs(found["flipped"] - found["log_prob"][:, ::-1]).max() > 1e-3
    flat = found["x"].reshape(4 * len(batch or "1") * (6 if batch else 1), -1)
    assert len(np.unique(flat, axis=0)) > (1 if name in DISCRETE else len(flat) - 1)


@pytest.mark.parametrize("name", quick(PLAIN))
def test_a_new_family_is_standard_normal(name):
    found = program(name)(started(name), None)
    x = np.asarray(found["x"], np.float64)
    expected = -0.5 * (x**2).sum(-1) - 0.5 * np.log(2 * np.pi) * x.shape[-1]
    np.testing.assert_allclose(found["log_prob"], expected, rtol=1e-4, atol=1e-4)
    if name in FAMILIES and "normal" not in name and name != "flow_on_flow":
        np.testing.assert_allclose(x, results_of_base(x.shape), atol=1e-4)


@functools.cache
def results_of_base(shape):
    return np.asarray(fv.standard_normal(shape[-1]).sample({}, KEY, shape[:-1]))


@pytest.mark.parametrize("name", ["maf", "iaf_affine", "maf_lu", "coupling"])
@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_any_finite_parameters_are_accepted(name, scale):
    # A density may underflow to zero; it may not be undefined or infinite.
    x = results(name)["x"]
    log_prob = np.asarray(CASES[name].log_prob(perturbed(started(name), scale), x))
    assert not np.isnan(log_prob).any() and (log_prob < np.inf).all()


@pytest.mark.parametrize("name", quick(CASES))
def test_nan_in_parameters_gives_nan(name):
    if not jax.tree.leaves(started(name)):
        return
    broken = jax.tree.map(lambda a: a * np.nan if a.dtype.kind == "f" else a, started(name))
    found = program(name)(broken, contexts(name, 6))
    assert np.isnan(found["scored"]).all()
    assert np.isnan(found["fixed"]).all() or name in DISCRETE


@pytest.mark.parametrize(
    "name", quick([*PARAMETRIC, "custom", "joint", "joint_posterior", "local"])
)
def test_reparameterized_is_honest(name):
    """Samples carry a gradient to every argument, or the family says that they do not."""
    family, context = CASES[name], contexts(name, 6)
    arguments = 0 if context is None or context.dtype.kind == "i" else (0, 1)

    @jax.jit
    def gradients(params, context):
        def total(params, context):
            q, _ = family.train_distribution(params, KEY, context)
            return jnp.sum(jnp.sin(q.sample(seed=KEY, sample_shape=20).astype(float)))

        return jax.grad(total, argnums=arguments)(params, context)

    found = gradients(perturbed(started(name)), context)
    params, *rest = found if isinstance(arguments, tuple) else (found,)
    arrived = all((np.asarray(g) != 0).any() for g in jax.tree.leaves(params))
    arrived = arrived and all((np.asarray(g) != 0).all() for g in rest)
    assert arrived is family.reparameterized
    assert family.reparameterized is (name not in NOT_REPARAMETERIZED)


def test_gradients_reach_every_parameter():
    family = fv.iaf(3, **AFFINE, context_size=2, mixing="lu", base=fv.mean_field(3))
    params = perturbed(jax.jit(family.init)(KEY))

    @jax.jit
    def gradient(params):
        def loss(params):
            q = family.distribution(params, jnp.ones(2))
            x, log_prob = q.sample_and_log_prob(seed=KEY, sample_shape=100)
            return (log_prob + jnp.sin(x).sum(-1) + (x**2).sum(-1)).mean()

        return jax.grad(loss)(params)

    for path, each in jax.tree_util.tree_leaves_with_path(gradient(params)):
        assert np.isfinite(each).all() and (np.asarray(each) != 0).any(), path


def test_families_are_static_and_short():
    assert len(set(CASES.values())) == len(CASES)
    for name, family in CASES.items():
        assert hash(family) == hash(family) and family == family
        assert len(repr(family)) < 200
        if name != "custom":
            again = pickle.loads(pickle.dumps(family))
            assert again == family and hash(again) == hash(family)
    for make in (*FAMILIES.values(), *NORMALS.values()):
        assert make(2) == make(2) != make(3)
        assert hash(make(2)) == hash(make(2))


def test_equal_families_share_a_program():
    count = 0

    @functools.partial(jax.jit, static_argnums=0)
    def log_prob(family, params, x):
        nonlocal count
        count += 1
        return family.log_prob(params, x)

    for seed in range(3):
        log_prob(FAMILIES["maf"](3), perturbed(started("maf"), seed=seed), np.ones((4, 3)))
    assert count == 1


def test_repr():
    shown = {
        "maf(2)": fv.maf(2),
        "iaf(3, context_size=2)": fv.iaf(3, context_size=2),
        "coupling(2, base=mean_field(2))": fv.coupling(2, base=fv.mean_field(2)),
        "full_rank(2)": fv.full_rank(2),
        "standard_normal((2, 3))": fv.standard_normal((2, 3)),
        "conditional(gaussian(2), MLP(8 -> 4))": fv.conditional(fv.gaussian(2), MLP(8, (), 4)),
        "whitened(mean_field(3), rank=2)": fv.whitened(fv.mean_field(3), rank=2),
        "standardized(maf(2))": fv.standardized(fv.maf(2)),
        "standardized(maf(1), support=(0, inf))": fv.standardized(fv.maf(1), "positive"),
        "local(gaussian(2, scale='full'), 5)": fv.local(fv.gaussian(2, scale="full"), 5),
        "categorical(2, 3, one_hot=True)": fv.categorical(2, 3, one_hot=True),
        "laplace(2, scale=0.5)": fv.laplace(2, scale=0.5),
        "mixture(2, 3)": fv.mixture(2, 3),
        "unconditional(bernoulli(3), learned=False)": fv.unconditional(
            fv.bernoulli(3), learned=False
        ),
        "joint(standard_normal(2), mean_field(1))": type(OTHERS["joint"])(
            (fv.standard_normal(2), fv.mean_field(1))
        ),
        "relaxed(bernoulli(2), 0.5)": CASES["relaxed"],
        "from_distrax(Gamma, 2)": CASES["gamma"],
        "custom(laplace_density, 2)": CASES["custom"],
        "continuous_bernoulli(2)": CASES["continuous_bernoulli"],
    }
    for expected, family in shown.items():
        assert repr(family) == expected


def test_parameters_know_their_family():
    for family in CASES.values():
        params = jax.eval_shape(family.init, KEY)
        assert params["origin"] == Origin(family)
        marks = jax.tree.leaves(params, is_leaf=lambda n: isinstance(n, Origin))
        assert sum(isinstance(each, Origin) for each in marks) == 1


def integral(family, params, points):
    """The integral of a density over a box that holds its samples, by the midpoint rule."""
    x = np.asarray(family.sample(params, KEY, 10_000), np.float64)
    low, high = x.min(0) - 2 * x.std(0), x.max(0) + 2 * x.std(0)
    steps = (high - low) / points
    axes = [a + h * (np.arange(points) + 0.5) for a, h in zip(low, steps, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, x.shape[1])
    log_prob = family.log_prob(params, grid.astype(np.float32))
    return np.exp(np.asarray(log_prob, np.float64)).sum() * steps.prod()


def test_a_density_integrates_to_one():
    total = integral(CASES["maf_1"], perturbed(started("maf_1")), 20_000)
    assert abs(total - 1) < tolerances.INTEGRAL


GRIDS = ((1, 20_000), (2, 1_200))


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("name", [*FAMILIES, *NORMALS])
def test_all_densities_integrate_to_one(name):
    # A solver and attention take their time, and what a small network makes is smooth.
    coarse = name in ("continuous", "transformer_flow")
    for event_size, points in ((1, 2_000), (2, 250)) if coarse else GRIDS:
        family = {**FAMILIES, **NORMALS}[name](event_size)
        total = integral(family, perturbed(jax.jit(family.init)(KEY)), points)
        assert abs(total - 1) < tolerances.INTEGRAL


def test_conditional_owns_the_parameters_of_its_network():
    import haiku as hk

    def encoder(x):
        return hk.nets.MLP([16, 4])(x)

    inner = fv.maf(2, **AFFINE, context_size=4)
    for network in (MLP(10, (16,), 4), hk.without_apply_rng(hk.transform(encoder))):
        family = fv.conditional(inner, network, context_shape=(10,))
        params = perturbed(jax.jit(family.init)(KEY))
        assert set(params) == {"family", "network", "origin"}

        @jax.jit
        def both(params, x, context, family=family):
            features = family.network.apply(params["network"], context)
            inside = inner.distribution(params["family"], features).log_prob(x)
            return inside, family.distribution(params, context).log_prob(x)

        rng = np.random.default_rng(0)
        x, context = rng.normal(size=(3, 5, 2)), rng.normal(size=(5, 10))
        np.testing.assert_allclose(*both(params, x, context), rtol=1e-5)


@pytest.mark.parametrize("name", quick(["local", "local_flow"]))
def test_rows_of_a_table_are_contexts(name):
    family = CASES[name]
    params = perturbed(started(name))
    table = params["rows"].value
    assert table.shape == (5, *family.family.context_shape)

    @jax.jit
    def both(params, x, rows):
        inner = family.family.distribution(params["family"], params["rows"].value[rows])
        own = family.distribution(params, rows)
        missing = family.distribution(params, jnp.array([0, 4, 5, -1])).log_prob(jnp.zeros(2))
        return inner.log_prob(x), own.log_prob(x), missing

    x = np.random.default_rng(0).normal(size=(4, 2, 3, 2))
    inner, own, missing = both(params, x, np.array([[4, 0, 0], [1, 2, 3]]))
    np.testing.assert_allclose(own, inner, rtol=tolerances.FLOAT32)
    np.testing.assert_array_equal(np.isnan(missing), [False, False, True, True])


def test_a_table_of_numpy():
    rows = PerRow(np.arange(6.0).reshape(3, 2)).take(np.array([2, 3]))
    np.testing.assert_array_equal(rows, [[4.0, 5.0], [np.nan, np.nan]])


def test_a_table_in_a_file(tmp_path):
    params = perturbed(started("local"))
    fv.save(tmp_path / "rows.flowvi", params)
    again = fv.load(tmp_path / "rows.flowvi", like=CASES["local"])
    np.testing.assert_array_equal(again["rows"].value, params["rows"].value)
    with pytest.raises(ValueError, match="num_rows is 5 there and 6 here"):
        fv.load(tmp_path / "rows.flowvi", like=fv.local(fv.gaussian(2), 6))


def test_a_base_sees_the_features():
    """The base of a flow takes the features too, through a linear layer if need be."""
    family, params = CASES["flow_on_features"], started("flow_on_features")

    @jax.jit
    def gradient(params, context):
        features = family.network.apply(params["network"], context)
        base = family.family.base.distribution(params["family"]["family"], features)
        # A new flow is its base, whose parameters the encoder reaches at once.
        total = lambda p: family.distribution(p, context).sample(seed=KEY).sum()  # noqa: E731
        return base.mean(), jax.grad(total)(params)["network"]

    context = np.random.default_rng(0).normal(size=(6, 4, 4)).astype(np.float32)
    mean, network = gradient(params, context)
    assert mean.shape == (6, 3) and (np.asarray(mean) != 0).all()
    assert all((np.asarray(g) != 0).any() for g in jax.tree.leaves(network))
