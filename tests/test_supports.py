"""Supports of vectors and matrices: their maps, their Jacobians, and what lies outside."""

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats
from jax.scipy.special import gammaln, multigammaln
from numpyro.distributions import biject_to, constraints
from tensorflow_probability.substrates import jax as tfp

import flowvi as fv
from flowvi.bijectors import KINDS, Constrained
from flowvi.supports import Interval, Manifold, Values, as_support
from tests.tolerances import FLOAT64, STANDARD_ERRORS

SHAPES = {name: (4,) if kind.rank == 1 else (3, 3) for name, kind in KINDS.items()}
#: The places of the numbers that are free, with respect to which densities are.
FREE = {
    "simplex": np.s_[:-1],
    "ordered_vector": np.s_[:],
    "positive_ordered_vector": np.s_[:],
    "corr_cholesky": np.tril_indices(3, -1),
    "corr_matrix": np.tril_indices(3, -1),
    "lower_cholesky": np.tril_indices(3),
    "positive_definite": np.tril_indices(3),
}


class Free(distrax.Bijector):
    """A map to the numbers that are free, between vectors of one length."""

    def __init__(self, kind):
        self.kind = kind
        self.inner = Constrained(kind, SHAPES[kind])
        super().__init__(event_ndims_in=1)

    def forward_and_log_det(self, x):
        y, log_det = self.inner.forward_and_log_det(x)
        free = FREE[self.kind]
        return y[(..., *free) if isinstance(free, tuple) else (..., free)], log_det

    def inverse_and_log_det(self, y):
        return self.inner.inverse_and_log_det(self.completed(y))

    def completed(self, y):
        if self.kind == "simplex":
            return jnp.concatenate([y, 1 - y.sum(-1, keepdims=True)], -1)
        if self.inner.event_ndims_out == 1:
            return y
        full = jnp.zeros((*y.shape[:-1], 3, 3), y.dtype).at[(..., *FREE[self.kind])].set(y)
        if self.kind == "corr_cholesky":
            diagonal = jnp.sqrt(1 - (full**2).sum(-1))
            return full + diagonal[..., None] * np.eye(3)
        if self.kind in ("corr_matrix", "positive_definite"):
            lower = jnp.tril(full, -1)
            diagonal = full if self.kind == "positive_definite" else jnp.ones_like(full)
            return lower + jnp.swapaxes(lower, -1, -2) + diagonal * np.eye(3)
        return full


#: Those made of others, whose properties take longer to check.
COMPOSED = ["corr_matrix", "positive_definite", "positive_ordered_vector"]
ALL = [pytest.param(kind, marks=[pytest.mark.slow] * (kind in COMPOSED)) for kind in FREE]


@pytest.mark.compilations(80)
@pytest.mark.parametrize("kind", ALL)
def test_maps_have_the_properties_of_bijectors(kind, x64):
    size = Manifold(SHAPES[kind], kind).free_shape[0]
    x = np.random.default_rng(0).normal(size=(12, size))
    fv.testing.check_bijector(Free(kind), x)


@pytest.mark.parametrize("kind", ["sphere", "zero_sum"])
def test_areas_and_round_trips_of_surfaces(kind, x64):
    bijector = Constrained(kind, (4,))
    x = np.random.default_rng(0).normal(size=(12, 3)) * np.geomspace(1e-5, 3, 12)[:, None]

    @jax.jit
    def program(x):
        y, log_det = bijector.forward_and_log_det(x)
        jacobian = jax.vmap(jax.jacfwd(bijector.forward))(x)
        area = jnp.linalg.slogdet(jnp.swapaxes(jacobian, -1, -2) @ jacobian)[1] / 2
        return y, log_det, area, *bijector.inverse_and_log_det(y)

    y, log_det, area, again, inverse = program(x)
    np.testing.assert_allclose(log_det, area, rtol=FLOAT64, atol=FLOAT64)
    np.testing.assert_allclose(inverse, -area, rtol=FLOAT64, atol=FLOAT64)
    np.testing.assert_allclose(again, x, rtol=FLOAT64, atol=FLOAT64)
    values = (y**2).sum(-1) - 1 if kind == "sphere" else y.sum(-1)
    np.testing.assert_allclose(values, 0, atol=FLOAT64)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_maps_far_out_are_finite(dtype, x64):
    """At +-40 in one coordinate or in all, with the gradient of the log-determinant."""

    @jax.jit
    def program(ones):
        results = {}
        for kind, shape in SHAPES.items():
            bijector = Constrained(kind, shape)
            size = Manifold(shape, kind).free_shape[0]
            points = jnp.concatenate([jnp.eye(size), jnp.ones((1, size))]).astype(dtype)
            u = 40 * jnp.concatenate([points, -points]) * ones

            def total(u, bijector=bijector):
                y, log_det = bijector.forward_and_log_det(u)
                return jnp.arctan(y).sum() + log_det

            results[kind] = jax.vmap(jax.value_and_grad(total))(u)
        return results

    for kind, (value, gradient) in program(np.ones((), dtype)).items():
        assert np.isfinite(value).all(), kind
        assert np.isfinite(gradient).all(), kind
        assert value.dtype == dtype


def _lkj_constant(size, eta):
    """The log of the integral of det(R)^(eta - 1) over correlation matrices."""
    k = np.arange(1, size)
    shape = eta + (size - k - 1) / 2
    beta = 2 * gammaln(shape) - gammaln(2 * shape)
    return float(np.sum(((2 * eta - 2 + size - k) * np.log(2) + beta) * (size - k)))


def _wishart_constant(df, scale):
    size = len(scale)
    log_det = np.linalg.slogdet(scale)[1]
    return float(df * size / 2 * np.log(2) - df / 2 * log_det + multigammaln(df / 2, size))


SCALE = np.array([[2.0, 0.3], [0.3, 1.0]])
ALPHA = np.array([0.8, 2.0, 3.0])


def _inverse_wishart(p):
    inverse = jnp.linalg.inv(p["x"])
    log_det = jnp.linalg.slogdet(p["x"])[1]
    return -(5 + 3) / 2 * log_det - jnp.trace(SCALE @ inverse) / 2


def _of_factor(p):  # the density of L, whose L L^T has volume 2^n prod L_ii^(n - i)
    factor = jnp.diagonal(p["x"])
    change = 2 * np.log(2) + jnp.sum(np.array([2, 1]) * jnp.log(factor))
    return _inverse_wishart({"x": p["x"] @ p["x"].T}) + change


#: An unnormalised log density, its shape and support, and the logarithm of its integral.
KNOWN = {
    "dirichlet": (
        lambda p: jnp.sum((ALPHA - 1) * jnp.log(p["x"])),
        (3,),
        "simplex",
        float(gammaln(ALPHA).sum() - gammaln(ALPHA.sum())),
    ),
    "ordered normals": (
        lambda p: -0.5 * jnp.sum(p["x"] ** 2),
        (3,),
        "ordered_vector",
        1.5 * np.log(2 * np.pi) - np.log(6),
    ),
    "ordered exponentials": (
        lambda p: -jnp.sum(p["x"]),
        (3,),
        "positive_ordered_vector",
        -np.log(6),
    ),
    "lkj": (
        lambda p: (1.5 - 1) * jnp.linalg.slogdet(p["x"])[1],
        (3, 3),
        "corr_matrix",
        _lkj_constant(3, 1.5),
    ),
    "lkj, factor": (
        lambda p: jnp.sum((2 * 1.5 - 2 + 3 - np.arange(1, 4)) * jnp.log(jnp.diagonal(p["x"]))),
        (3, 3),
        "corr_cholesky",
        _lkj_constant(3, 1.5),
    ),
    "inverse Wishart": (
        _inverse_wishart,
        (2, 2),
        "positive_definite",
        _wishart_constant(5, SCALE),
    ),
    "inverse Wishart, factor": (
        _of_factor,
        (2, 2),
        "lower_cholesky",
        _wishart_constant(5, SCALE),
    ),
    "von Mises-Fisher": (  # 4 pi sinh(k) / k in three dimensions
        lambda p: 2.0 * p["x"] @ np.array([0.6, 0.0, 0.8]),
        (3,),
        "sphere",
        float(np.log(4 * np.pi * np.sinh(2.0) / 2.0)),
    ),
    "normals of sum zero": (
        lambda p: -0.5 * jnp.sum(p["x"] ** 2),
        (4,),
        "zero_sum",
        1.5 * np.log(2 * np.pi),
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_integrals_are_known(name, x64):
    log_density, shape, support, log_integral = KNOWN[name]
    target = fv.Target.from_named(log_density, {"x": (shape, support)})
    # Importance sampling from a Student's t distribution, wider than what any of these is.
    rng = np.random.default_rng(0)
    z = rng.standard_t(8, (40_000, target.event_size)) * 1.3
    log_q = scipy.stats.t.logpdf(z, 8, scale=1.3).sum(-1)
    weights = np.exp(np.asarray(target(z) - log_q, float) - log_integral)
    error = weights.std() / np.sqrt(len(weights))
    assert error < 0.05
    assert abs(weights.mean() - 1) < STANDARD_ERRORS * error


def test_transforms_of_pymc_are_supports():
    transforms = pytest.importorskip(
        "pymc", reason="PyMC is not installed"
    ).distributions.transforms
    for name, transform in {
        "positive": transforms.log,
        "unit_interval": transforms.logodds,
        "simplex": transforms.simplex,
        "ordered_vector": transforms.ordered,
        (2, None): transforms.Interval(2, None),
    }.items():
        assert as_support(transform, (3,)) == as_support(name, (3,))


@pytest.mark.compilations(50)
def test_constraints_of_other_libraries_are_supports(x64):
    known = {
        (3,): [
            ("real", constraints.real, constraints.real_vector),
            ("positive", constraints.positive, constraints.nonnegative),
            ((0, 1), constraints.unit_interval),
            ((2, None), constraints.greater_than(2.0)),
            ((None, 2), constraints.less_than(2.0)),
            ((-1, 1), constraints.interval(-1.0, np.ones(3)), constraints.open_interval(-1, 1)),
            ((-np.pi, np.pi), constraints.circular),
            ("simplex", constraints.simplex),
            ("ordered_vector", constraints.ordered_vector),
            ("sphere", constraints.sphere),
            ("zero_sum", constraints.zero_sum(1)),
            ("positive", constraints.independent(constraints.positive, 1)),
        ],
        (2, 2): [
            ("corr_cholesky", constraints.corr_cholesky),
            ("positive_definite", constraints.positive_definite),
            ("lower_cholesky", constraints.lower_cholesky, constraints.softplus_lower_cholesky),
        ],
    }
    for shape, rows in known.items():
        for name, *others in rows:
            for other in others:
                assert as_support(other, shape) == as_support(name, shape)
    # A bijector of TFP's or of Distrax's, of numbers or of vectors.
    through = as_support(tfp.bijectors.Softplus(), (3,))
    assert through.free_shape == (3,)
    assert as_support(tfp.bijectors.SoftmaxCentered(), (2, 3)).free_shape == (2, 2)
    target = fv.Target.from_named(
        lambda p: -jnp.sum(p["x"]), {"x": ((3,), tfp.bijectors.Softplus())}
    )
    u = np.linspace(-1, 1, 3)
    expected = -jax.nn.softplus(u).sum() + jax.nn.log_sigmoid(u).sum()
    np.testing.assert_allclose(target(u), expected, rtol=FLOAT64)
    np.testing.assert_allclose(target.unconstrain(target.constrain(u)), u, rtol=FLOAT64)


@pytest.mark.slow
@pytest.mark.compilations(60)
def test_densities_of_numpyro_agree(x64):
    """The density of a distribution at the same point is that of its own transform."""
    kinds = {
        "simplex": lambda: dist.Dirichlet(jnp.array([1.0, 2.0, 3.0])),
        "corr_cholesky": lambda: dist.LKJCholesky(3, 2.0),
        "positive_definite": lambda: dist.Wishart(5.0, jnp.eye(2)),
        "zero_sum": lambda: dist.ZeroSumNormal(1.0, (4,)),
    }

    @jax.jit
    def program(key):
        out = {}
        for name, make in kinds.items():
            each = make()
            y = each.sample(key)
            ours = Constrained(name, y.shape)
            u, theirs = ours.inverse(y), biject_to(each.support)
            # Between both vectors is a map whose Jacobian says how they differ.
            v = theirs.inv(y)
            between = jax.jacfwd(lambda u, ours=ours, t=theirs: t.inv(ours.forward(u)).ravel())(u)
            log_det = theirs.log_abs_det_jacobian(v, y) + jnp.linalg.slogdet(between)[1]
            out[name] = ours.forward_log_det_jacobian(u), log_det
        return out

    for name, (ours, theirs) in program(jax.random.key(0)).items():
        np.testing.assert_allclose(ours, theirs, rtol=FLOAT64, atol=FLOAT64, err_msg=name)


INSIDE = {
    "simplex": [0.2, 0.3, 0.5],
    "ordered_vector": [-1, 0, 2],
    "positive_ordered_vector": [1, 2, 3],
    "zero_sum": [-1, 0, 1],
    "sphere": [0.6, 0, 0.8],
    "corr_cholesky": [[1, 0], [0.6, 0.8]],
    "corr_matrix": [[1, 0.5], [0.5, 1]],
    "lower_cholesky": [[2, 0], [0.6, 0.8]],
    "positive_definite": [[2, 0.5], [0.5, 1]],
}
OUTSIDE = {
    "simplex": [0.2, 0.3, 0.6],
    "ordered_vector": [-1, 2, 2],
    "positive_ordered_vector": [-1, 2, 3],
    "zero_sum": [-1, 0, 2],
    "sphere": [0.6, 0.1, 0.8],
    "corr_cholesky": [[1, 0], [0.6, 0.9]],
    "corr_matrix": [[1, 0.5], [0.5, 2]],
    "lower_cholesky": [[2, 1], [0.6, 0.8]],
    "positive_definite": [[1, 2], [2, 1]],
}


@pytest.mark.parametrize("kind", KINDS)
def test_outside_is_refused_by_name(kind, x64):
    inside, outside = np.asarray(INSIDE[kind], float), np.asarray(OUTSIDE[kind], float)
    support = Manifold(inside.shape, kind)
    target = fv.Target.from_named(lambda p: jnp.sum(p["w"]), {"w": (inside.shape, kind)})
    assert np.isfinite(target.unconstrain({"w": np.stack([inside, inside])})).all()
    with pytest.raises(
        ValueError, match=rf"`w` must be .* as its support '{kind}' says; got .*row 1"
    ):
        target.unconstrain({"w": np.stack([inside, outside])})
    support.check(np.where(np.ones(()), np.nan, outside))  # NaN stays


@pytest.mark.parametrize("support", ["positive", tfp.bijectors.Softplus()])
def test_unconstrain_refuses_numbers_outside(support):
    target = fv.Target.from_named(lambda p: -p["tau"], {"tau": ((), support)})
    with pytest.raises(ValueError, match=r"`tau` must lie .*; got -1"):
        target.unconstrain({"tau": -1.0})


BAD = {
    "integer": (r"must be one of real numbers; got 'integer', .* Perhaps sum it out", "integer"),
    "numpyro's": (
        r"must be one of real numbers; got .*Perhaps sum it out",
        constraints.nonnegative_integer,
    ),
    "unknown": (r"must be a constraint that flowvi knows, or a bijector", constraints.l1_ball),
}


@pytest.mark.parametrize("name", BAD)
def test_supports_that_are_none(name):
    match, value = BAD[name]
    with pytest.raises(TypeError, match=match):
        as_support(value, (3,))


def test_shapes_of_supports():
    assert Manifold((5, 3), "simplex").free_shape == (10,)
    with pytest.raises(ValueError, match=r"'corr_matrix' must have a shape \(..., n, n\)"):
        as_support("corr_matrix", (2, 3))
    with pytest.raises(ValueError, match=r"'simplex' must have a shape \(..., n\)"):
        as_support("simplex", (1,))
    with pytest.raises(ValueError, match=r"'positive' or \(low, high\), or one of 'simplex'"):
        as_support("positiv", (1,))
    with pytest.raises(TypeError, match="real numbers between bounds"):
        Values((2,), "binary").bijector()
    assert Interval((2,)).bijector() is None
