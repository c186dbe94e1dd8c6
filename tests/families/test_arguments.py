"""Bad arguments: each complaint comes before anything compiles, in the house's words."""

import functools
import types

import distrax
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flowvi as fv
from flowvi.bijectors import Dense, LowRank
from flowvi.families import check_params
from flowvi.networks import MLP
from tests.families.test_families import CASES, conditional, started
from tests.small import AFFINE

KEY = jax.random.key(0)

CONFIGURATIONS = [
    (lambda: fv.maf(0), ValueError, "`event_size` must be a positive integer; got 0"),
    (lambda: fv.iaf(2.5), TypeError, "`event_size` must be a positive integer; got 2.5"),
    (
        lambda: fv.maf(2, num_layers=0),
        ValueError,
        "`num_layers` must be a positive integer",
    ),
    (lambda: fv.maf(2, hidden_sizes=[0]), ValueError, "`hidden_sizes` must be a sequence"),
    (lambda: fv.maf(2, context_size=-1), ValueError, "`context_size` must be a positive"),
    (
        lambda: fv.maf(2, transformer="cubic"),
        ValueError,
        "`transformer` must be one of 'affine', 'spline', 'tailed', 'scaled', 'umnn', "
        "'deep_sigmoid', 'sum_of_squares', 'bernstein', or a transformer; got 'cubic'",
    ),
    (lambda: fv.maf(2, transformer=3), TypeError, "`transformer` must be one of 'affine'"),
    (lambda: fv.maf(2, mixing="shake"), ValueError, '`mixing` must be "reverse", "lu"'),
    (lambda: fv.maf(2, mixing=[0, 0]), ValueError, "`mixing` must hold each of 0, ..., 1"),
    (lambda: fv.maf(2, activation="no"), ValueError, "`activation` must be a function or"),
    (lambda: fv.maf(2, base="normal"), TypeError, "`base` must be a family, such as"),
    (
        lambda: fv.maf(2, base=fv.mean_field(3)),
        ValueError,
        r"`base` must have event shape \(2,\), that of the flow; got \(3,\)",
    ),
    (
        lambda: fv.maf(2, base=fv.maf(2, context_size=1)),
        ValueError,
        r"`base` must take no context or that of the flow, None; got context shape \(1,\)",
    ),
    (lambda: fv.coupling(0), ValueError, "`event_size` must be a positive integer"),
    (lambda: fv.mean_field(0), ValueError, "`event_size` must be a positive integer"),
    (lambda: fv.full_rank("a"), TypeError, "`event_size` must be a positive integer"),
    (lambda: fv.standard_normal((2, 0)), ValueError, "`event_shape` must be a sequence"),
    (
        lambda: fv.conditional(fv.maf(2), MLP(3, (), 4)),
        ValueError,
        "`family` must take a context; got maf\\(2\\)",
    ),
    (lambda: fv.conditional("maf", MLP(3, (), 4)), TypeError, "`family` must be a family"),
    (
        lambda: fv.conditional(fv.maf(2, context_size=4), MLP(3, (), 5)),
        ValueError,
        r"`network` must return an array of shape \(4,\), the context shape of maf",
    ),
    (
        lambda: fv.conditional(fv.maf(2, context_size=4), lambda x: x),
        TypeError,
        "`network` must have `init` and `apply`",
    ),
    (
        lambda: fv.conditional(fv.maf(2, context_size=4), hk.transform(lambda x: x)),
        ValueError,
        "`context_shape` must be given for a network that does not know its input shape",
    ),
    (
        lambda: fv.gaussian(2, scale="wide"),
        ValueError,
        "`scale` must be one of 'predicted', 'learned', 'full' or a positive number; got 'wide'",
    ),
    (lambda: fv.gaussian(2, scale=0), ValueError, "`scale` must be .*; got 0"),
    (lambda: fv.gaussian(2, scale=None), TypeError, "`scale` must be .*; got None"),
    (lambda: fv.laplace(2, scale="full"), ValueError, "`scale` must be .*; got 'full'"),
    (
        lambda: fv.gaussian((2, 2), scale="full"),
        ValueError,
        '`event_shape` must be that of a vector for `scale="full"`',
    ),
    (lambda: fv.bernoulli(0), ValueError, "`event_shape` must be a sequence of positive"),
    (lambda: fv.categorical(2, 0), ValueError, "`num_classes` must be a positive integer"),
    (lambda: fv.mixture(2, 0), ValueError, "`num_components` must be a positive integer"),
    (lambda: fv.mixture(2, 2, scale=1.0), ValueError, '`scale` must be "predicted" or "fu'),
    (lambda: fv.custom(3, 2), TypeError, "`log_density` must be a function; got 3"),
    (
        lambda: fv.custom(lambda x: x, 2),
        ValueError,
        r"`log_density` must return an array of shape \(\) for one event; got Shape",
    ),
    (
        lambda: fv.custom(jnp.sum, 2, sampler=lambda key: jnp.zeros(3)),
        ValueError,
        r"`sampler` must return an array of shape \(2,\) for one event",
    ),
    (
        lambda: fv.custom(jnp.sum, 2, reparameterized=True),
        ValueError,
        "`sampler` must be given for a reparameterised family",
    ),
    (
        lambda: fv.from_distrax(3, 2, ("loc",)),
        TypeError,
        "`constructor` must be a class or a function; got 3",
    ),
    (
        lambda: fv.from_distrax(distrax.Normal, 2, "loc"),
        TypeError,
        "`arguments` must be names, or shapes by name; got 'loc'",
    ),
    (
        lambda: fv.from_distrax(distrax.Normal, 2, ()),
        ValueError,
        "`arguments` must name at least one argument",
    ),
    (
        lambda: fv.from_distrax(
            distrax.Normal, 2, ("loc", "scale"), constraints={"sigma": "positive"}
        ),
        ValueError,
        "`constraints` must be for loc, scale; got 'sigma'",
    ),
    (
        lambda: fv.from_distrax(distrax.Normal, 2, ("loc", "scale"), constraints={"scale": "big"}),
        ValueError,
        "`constraints` must be functions or one of 'positive', 'unit interval'; got 'big'",
    ),
    (
        lambda: fv.from_distrax(distrax.Normal, 3, {"loc": (4,), "scale": (4,)}),
        ValueError,
        r"`constructor` must return a distribution over events of shape \(3,\)",
    ),
    (
        lambda: fv.from_distrax(lambda loc: loc, 3, ("loc",)),
        TypeError,
        "`constructor` must return a distribution of Distrax",
    ),
    (lambda: fv.joint(fv.mean_field(2)), ValueError, "`families` must be at least two; got 1"),
    (
        lambda: fv.joint(fv.mean_field(2), 3),
        TypeError,
        r"`families\[1\]` must be a family, .*; got 3",
    ),
    (
        lambda: fv.joint(fv.standard_normal((2, 2)), fv.mean_field(2)),
        ValueError,
        r"`families` must be over vectors; got event shape \(2, 2\)",
    ),
    (
        lambda: fv.joint(fv.mean_field(2), conditional(fv.gaussian(1), 3)),
        ValueError,
        r"`families` must have in place 1 no context, or context shape \(2,\), .*got \(3,\)",
    ),
    (
        lambda: fv.joint(conditional(fv.gaussian(2), 5), conditional(fv.gaussian(1), 3)),
        ValueError,
        r"context shape \(2,\), .*, or \(7,\), that together with the context \(5,\); got \(3,",
    ),
    (
        lambda: fv.relaxed(fv.gaussian(2), 1.0),
        TypeError,
        r"`family` must be `fv.bernoulli\(...\)` or `fv.categorical\(..., one_hot=True\)`",
    ),
    (
        lambda: fv.relaxed(fv.categorical(2, 3), 1.0),
        TypeError,
        r"one_hot=True\)`; got categorical",
    ),
    (
        lambda: fv.relaxed(fv.bernoulli(2), 0.0),
        ValueError,
        "`temperature` must be a positive number; got 0.0",
    ),
    (
        lambda: fv.relaxed(fv.bernoulli(2), -1),
        ValueError,
        "`temperature` must be a positive number; got -1",
    ),
    (
        lambda: fv.relaxed(fv.bernoulli(2), "cold"),
        TypeError,
        "`temperature` must be a positive number; got 'cold'",
    ),
    (
        lambda: fv.Annealing(1.0, 0.0, num_steps=5),
        ValueError,
        "`end` must be a positive number; got 0.0",
    ),
    (lambda: fv.unconditional(3), TypeError, "`family` must be a family.*; got 3"),
    (
        lambda: fv.unconditional(fv.mean_field(2)),
        ValueError,
        "`family` must take a context; got mean_field\\(2\\)",
    ),
    (
        lambda: fv.mixture(2, 3, components="free"),
        ValueError,
        '`components` must be "predicted" or "learned"; got \'free\'',
    ),
    (lambda: fv.whitened(3), TypeError, "`family` must be a family.*; got 3"),
    (
        lambda: fv.whitened(fv.standard_normal((2, 2))),
        ValueError,
        r"`family` must be over vectors; got event shape \(2, 2\)",
    ),
    (lambda: fv.whitened(fv.iaf(2), rank=3), ValueError, "`rank` must be at most 2; got 3"),
    (
        lambda: Dense(jnp.ones(2), jnp.eye(3), jnp.eye(2), 0.0),
        ValueError,
        r"`matrix` must have shape \(2, 2\), for a `loc` of shape \(2,\); got shape \(3, 3\)",
    ),
    (
        lambda: LowRank(jnp.ones(2), jnp.ones(2), jnp.ones((3, 1)), jnp.ones(1)),
        ValueError,
        r"`basis` must have a shape that ends in \(2, 1\)",
    ),
    (
        lambda: fv.local("normal", 5),
        TypeError,
        "`family` must be a family, such as",
    ),
    (
        lambda: fv.local(fv.mean_field(2), 5),
        ValueError,
        r"`family` must take a context, which each row .* got mean_field\(2\). Perhaps give it a .*"
        r"or use `fv.gaussian\(...\)`",
    ),
    (lambda: fv.local(fv.gaussian(2), 0), ValueError, "`num_rows` must be a positive integer"),
    (lambda: fv.standardized(3), TypeError, "`family` must be a family, such as .*; got 3"),
    (
        lambda: fv.standardized(fv.standardized(fv.maf(2))),
        ValueError,
        r"`family` must have no units of its own; got standardized\(maf\(2\)\)",
    ),
    (
        lambda: fv.standardized(fv.bernoulli(2)),
        ValueError,
        r"`family` must be over all real numbers; got bernoulli\(2\), whose events lie in",
    ),
    (
        lambda: place(np.array([[1.0, 2.0], [3.0, 2.0]])),
        ValueError,
        "`x` must vary in every column; got the constant 2.0 in column 1. Perhaps drop that",
    ),
]


def place(x):
    family = fv.standardized(fv.standard_normal(2))
    return family.place(family.init(KEY), x)


@pytest.mark.parametrize(("make", "error", "message"), CONFIGURATIONS)
def test_configuration(make, error, message):
    with pytest.raises(error, match=message):
        make()


MAF, CONTEXTUAL = fv.maf(3, **AFFINE), fv.maf(2, **AFFINE, context_size=3)
X = np.ones((4, 3), np.float32)


@functools.cache
def maf():
    return jax.tree.map(np.asarray, jax.jit(MAF.init)(KEY))


def score(x, context=None, family=CONTEXTUAL):
    return family.log_prob(started_of(family), x, context)


@functools.cache
def started_of(family):
    return jax.jit(family.init)(KEY)


GAUSSIAN = fv.gaussian(2)
CALLS = {
    "x": (
        ValueError,
        r"`x` must have a shape that ends in \(3,\) for maf\(3\)",
        lambda: score(X[:, :2], None, MAF),
    ),
    "superfluous": (
        ValueError,
        r"`context` must be None for maf\(3\), which takes none; got shape \(4, 3\). Perhaps give",
        lambda: score(X, X, MAF),
    ),
    "missing": (
        ValueError,
        r"`context` must be an array whose shape ends in \(3,\).*; got None",
        lambda: score(X[:, :2]),
    ),
    "a dict": (
        ValueError,
        r"`context` must be an array whose shape ends in \(3,\).*; got a dict",
        lambda: score(X[:, :2], {"loc": X}),
    ),
    "context": (
        ValueError,
        r"`context` must have a shape that ends in \(3,\)",
        lambda: CONTEXTUAL.sample(started_of(CONTEXTUAL), KEY, 1, X[:, :2]),
    ),
    "context of a distribution": (
        ValueError,
        r"`context` must have a shape that ends in \(3,\)",
        lambda: CONTEXTUAL.distribution(started_of(CONTEXTUAL), X[0, :2]),
    ),
    "rows": (
        ValueError,
        r"`x` and `context` must have the same number of rows; got leading axes \(4,\) of `x` and "
        r"\(3,\) of `context`",
        lambda: score(X[:, :2], X[:3]),
    ),
    "argument": (
        ValueError,
        r"`context` must have a shape that ends in \(4,\)",
        lambda: GAUSSIAN.log_prob({}, X[0, :2], X[0, :2]),
    ),
    "names": (
        ValueError,
        r"`context` must be a dict of loc, scale.*got loc",
        lambda: GAUSSIAN.log_prob({}, X[0, :2], {"loc": X[0, :2]}),
    ),
    "shape of a name": (
        ValueError,
        r'`context\["scale"\]` must have a shape that ends',
        lambda: GAUSSIAN.log_prob({}, X[0, :2], {"loc": X[0, :2], "scale": X[0]}),
    ),
    "leading axes": (
        ValueError,
        "with the same leading axes",
        lambda: GAUSSIAN.log_prob({}, X[0, :2], {"loc": X[:, :2], "scale": X[0, :2]}),
    ),
    "float rows": (
        TypeError,
        "`context` must hold numbers of rows, integers, for local.*; got dtype float32",
        lambda: table(np.zeros(1, np.float32)),
    ),
    "large row": (
        ValueError,
        "`context` must hold numbers of rows from 0 to 4, .*; got 5. Perhaps fit new rows with "
        "`fv.fit_rows`",
        lambda: table(np.array([0, 5])),
    ),
    "negative row": (ValueError, "from 0 to 4, .*; got -1", lambda: table(np.array([-1, 0]))),
    "no row": (ValueError, "`context` must be an array", lambda: table(None)),
    # Arguments in the wrong place, or of the wrong kind.
    "no key": (
        TypeError,
        r"`key` must be a random key, such as `jax.random.key\(0\)`; got 3. Perhaps `sample\(par",
        lambda: MAF.sample(maf(), 3),
    ),
    "a key for init": (TypeError, "`key` must be a random key, .*; got 0", lambda: MAF.init(0)),
    "two keys": (
        TypeError,
        "`key` must be a random key",
        lambda: MAF.sample(maf(), jax.random.split(KEY)),
    ),
    **{
        f"sample shape {shape!r}": (
            TypeError,
            "`sample_shape` must be an integer of at least 0, or a tuple of them; got",
            lambda shape=shape: MAF.sample_and_log_prob(maf(), KEY, shape),
        )
        for shape in (3.7, "3", True, -1, (2, 1.5), (2, False), None)
    },
    "swapped": (
        TypeError,
        r"`params` must be parameters of maf\(3\), as its `init` returns them; got a ndarray. "
        "Perhaps they are in another place",
        lambda: MAF.log_prob(X, maf()),
    ),
    "a result": (
        TypeError,
        r"`params` must be .*; got a SimpleNamespace. Perhaps pass `result.params`\?",
        lambda: MAF.log_prob(types.SimpleNamespace(params=maf()), X),
    ),
    "no parameters": (
        ValueError,
        "`params` must be parameters of .*; got a dict without 'family', 'transform'",
        lambda: MAF.log_prob({}, X),
    ),
    "x of params": (
        TypeError,
        "`x` must be an array of numbers; got a dict",
        lambda: score(maf(), None, MAF),
    ),
    "x of words": (
        TypeError,
        "`x` must be an array of numbers; got a list",
        lambda: score(["a"], None, MAF),
    ),
    "ragged": (
        TypeError,
        "`x` must be an array of numbers",
        lambda: score([[1.0], [1.0, 2.0]], None, MAF),
    ),
    "a key for x": (TypeError, "`x` must be an array of numbers", lambda: score(KEY, None, MAF)),
    "a masked x": (
        ValueError,
        "`x` must have no masked entries; got one in row 1. Perhaps drop those rows",
        lambda: score(np.ma.masked_greater(X * np.arange(4)[:, None], 0.5), None, MAF),
    ),
    "words for context": (
        TypeError,
        r'`context\["loc"\]` must be an array of numbers; got a str',
        lambda: GAUSSIAN.log_prob({}, X[0, :2], {"loc": "a", "scale": X}),
    ),
    # Parameters of others, also where shapes agree.
    "another family": (
        ValueError,
        r"`params` must be those of iaf\(3\); got those of maf\(3\), whose "
        "`transform.layer.density_first` is True rather than False",
        lambda: fv.iaf(3, **AFFINE).log_prob(maf(), X),
    ),
    "another kind": (
        ValueError,
        r"`params` must be those of standard_normal\(3\); got those of maf\(3\)\.",
        lambda: fv.standard_normal(3).sample(maf(), KEY),
    ),
    "another activation": (
        ValueError,
        "whose `transform.layer.network.activation` is 'silu' rather than 'relu'",
        lambda: check_params(fv.maf(3, **AFFINE, activation="relu"), maf()),
    ),
    "the outer one's": (
        ValueError,
        r"`params` must be those of gaussian\(3\); got those of conditional",
        lambda: (
            CASES["joint"]
            .families[1]
            .family.sample(jax.jit(CASES["joint"].families[1].init)(KEY), KEY, (), np.ones(6))
        ),
    ),
}


def table(rows):
    return CASES["local"].sample(started("local"), KEY, (), rows)


@pytest.mark.parametrize("name", CALLS)
def test_calls(name):
    error, message, call = CALLS[name]
    with pytest.raises(error, match=message) as caught:
        call()
    assert len(str(caught.value)) < 400


def test_array_likes_are_arrays():
    params = maf()
    expected = np.asarray(MAF.log_prob(params, X))
    for like in (X.tolist(), X.astype(int), jnp.asarray(X), np.ma.masked_array(X)):
        np.testing.assert_allclose(MAF.log_prob(params, like), expected, rtol=1e-6)
    drawn = {
        str(np.asarray(MAF.sample(params, key, shape)).tolist())
        for key, shape in (
            (jax.random.PRNGKey(0), 2),
            (np.asarray(jax.random.PRNGKey(0)), (2,)),
            (KEY, [np.int64(2)]),
            (KEY, np.array([2])),
        )
    }
    assert len(drawn) == 1
    zeros = CONTEXTUAL.log_prob(started_of(CONTEXTUAL), [[1, 1]], [[1, 1, 1]])
    assert zeros.shape == (1,)


def test_parameters_keep_their_mark_through_maps():
    params = jax.tree.map(lambda a: np.float16(a), maf())
    check_params(MAF, params)
    check_params(MAF, {**params, "width": 1})
    inner = {name: each for name, each in params.items() if name != "origin"}
    check_params(MAF, inner)
    check_params(fv.maf(3, **AFFINE), jax.tree.map(jnp.asarray, params))


class Shifted(fv.Family):
    """A family of a user, whose parameters are an array."""

    event_shape, context_shape, reparameterized = (), None, True

    def init(self, key):
        return jax.random.normal(key)

    def distribution(self, params, context=None):
        return distrax.Normal(params, 1.0)


class Named(Shifted):
    def init(self, key):
        return {"loc": jax.random.normal(key)}

    def distribution(self, params, context=None):
        return distrax.Normal(params["loc"], 1.0)


def test_families_of_users():
    for family in (Shifted(), Named()):
        params = family.init(KEY)
        x = family.sample(params, KEY, 3)
        assert family.log_prob(params, x).shape == (3,)
        placed = fv.standardized(family)
        params = placed.place(placed.init(KEY), [1.0, 3.0])
        assert placed.sample(params, KEY, 2).shape == (2,)
    with pytest.raises(ValueError, match=r"`params` must be those of .*Named.*; got those of maf"):
        family.log_prob(maf(), 0.0)
