"""The estimators for scikit-learn."""

import pickle
import warnings

import numpy as np
import pytest
from sklearn.base import clone, is_regressor
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import flowvi as fv
from flowvi.sklearn import ConditionalFlow, FlowDensity

pytestmark = pytest.mark.filterwarnings(
    "ignore::flowvi.DensityWarning", "ignore:`x` has .* rows, which are too few:RuntimeWarning"
)

RNG = np.random.default_rng(0)
X = RNG.normal(size=(90, 2)) @ [[1.0, 0.8], [0.0, 0.6]]
Y = 5 + 2 * X[:, 0] - X[:, 1] + 0.5 * RNG.normal(size=90)


def checked(estimator):
    """What scikit-learn says of an estimator; the one check it skips needs an array API."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = check_estimator(estimator, on_skip=None, on_fail=None)
    bad = {f["check_name"]: f["exception"] for f in found if f["status"] != "passed"}
    skipped = bad.pop("check_array_api_input", None)
    assert skipped is None or "SCIPY_ARRAY_API is not set" in str(skipped)
    assert not bad
    return len(found)


@pytest.mark.slow
@pytest.mark.compilations(3000)
@pytest.mark.parametrize(
    "estimator",
    [FlowDensity(), ConditionalFlow()],
    ids=["density", "conditional"],
)
def test_check_estimator(estimator):
    assert checked(estimator) > 40


@pytest.fixture(scope="module")
def density():
    return FlowDensity(random_state=0).fit(X)


@pytest.mark.compilations(80)
def test_a_density(density):
    assert (density.n_features_in_, density.density_.num_steps) == (2, 0)
    new = np.random.default_rng(1).normal(size=(3000, 2)) @ [[1.0, 0.8], [0.0, 0.6]]
    entropy = np.log(2 * np.pi * np.e) + np.log(0.6)
    assert abs(-density.score(new) - entropy) < 0.15
    np.testing.assert_allclose(density.score_samples(new[:7]), density.density_.log_prob(new[:7]))
    draws = density.sample(2000, random_state=0)
    np.testing.assert_allclose(np.corrcoef(draws.T)[0, 1], 0.8, atol=0.08)
    np.testing.assert_array_equal(draws, density.sample(2000, random_state=0))
    again = pickle.loads(pickle.dumps(density))
    np.testing.assert_array_equal(again.score_samples(X), density.score_samples(X))
    same = clone(density).fit(X)
    np.testing.assert_array_equal(same.score_samples(X), density.score_samples(X))


@pytest.mark.slow
@pytest.mark.compilations(80)
def test_in_pipelines_and_searches():
    piped = make_pipeline(StandardScaler(), FlowDensity(random_state=0))
    scores = cross_val_score(piped, X, cv=3)
    assert scores.shape == (3,) and np.isfinite(scores).all()
    options = {"support": [None, (-100, 100)]}
    search = GridSearchCV(FlowDensity(random_state=0), options, cv=2).fit(X)
    assert search.best_params_["support"] is None
    assert np.isfinite(search.best_estimator_.score(X))


@pytest.fixture(scope="module")
def conditional():
    return ConditionalFlow(random_state=0).fit(X, Y)


@pytest.mark.compilations(80)
def test_predictions(conditional):
    assert is_regressor(conditional) and conditional.score(X, Y) > 0.8
    truth = 5 + 2 * X[:, 0] - X[:, 1]
    assert np.abs(conditional.predict(X) - truth).mean() < 0.2
    low, median, high = conditional.predict_quantiles(X, [0.05, 0.5, 0.95]).T
    np.testing.assert_allclose((high - low).mean(), 2 * 1.645 * 0.5, rtol=0.25)
    assert ((low < median) & (median < high)).all()
    interval = conditional.predict_interval(X, 0.9)
    np.testing.assert_allclose(interval, np.stack([low, high], 1))
    # What is said of a row depends neither on the other rows nor on their number.
    np.testing.assert_array_equal(conditional.predict(X[70:73]), conditional.predict(X)[70:73])
    draws = conditional.sample(X[:4], 500, random_state=0)
    assert draws.shape == (4, 500)
    np.testing.assert_allclose(draws.mean(1), truth[:4], atol=0.4)
    normal = -0.5 * ((Y - truth) / 0.5) ** 2 - np.log(0.5) - 0.5 * np.log(2 * np.pi)
    assert abs(np.mean(normal - conditional.log_prob(X, Y))) < 0.15


@pytest.mark.slow
@pytest.mark.compilations(80)
def test_several_targets():
    targets = np.stack([Y, -Y + 3 * RNG.normal(size=90)], 1)
    flow = ConditionalFlow(random_state=0, num_draws=50).fit(X, targets)
    assert flow.predict(X).shape == (90, 2)
    assert flow.predict_interval(X[:3]).shape == (3, 2, 2)
    assert flow.sample(X[:3], 7).shape == (3, 2, 7)
    assert flow.log_prob(X, targets).shape == (90,)


def test_bad_questions(conditional):
    with pytest.raises(ValueError, match="`quantiles` must lie between 0 and 1; got"):
        conditional.predict_quantiles(X, [0.5, 1.5])
    with pytest.raises(ValueError, match="`coverage` must lie between 0 and 1; got 90"):
        conditional.predict_interval(X, 90)
    with pytest.raises(TypeError, match="`num_draws` must be a positive integer"):
        ConditionalFlow(num_draws=1.5).fit(X, Y)


@pytest.mark.compilations(80)
def test_contexts_far_from_zero():
    """Of single precision nothing of X would be left."""
    far = 1.7e9 + X
    flow = ConditionalFlow(random_state=0).fit(far, 1.7e9 + Y)
    assert flow.score(far, 1.7e9 + Y) > 0.8


@pytest.mark.slow
@pytest.mark.compilations(150)
def test_a_family_of_ones_own():
    flow = ConditionalFlow(
        fv.maf(1, num_layers=1, hidden_sizes=[8], transformer="affine", context_size=2),
        num_steps=20,
        random_state=0,
    ).fit(X, Y)
    assert flow.density_.num_steps > 0 and flow.score(X, Y) > 0.8


def test_sample_weights():
    weights = np.random.default_rng(2).integers(0, 3, 90)
    one = FlowDensity(num_steps=0, random_state=0).fit(X, sample_weight=weights)
    other = FlowDensity(num_steps=0, random_state=0).fit(np.repeat(X, weights, 0))
    np.testing.assert_array_equal(one.score_samples(X), other.score_samples(X))
    scores = one.score_samples(np.repeat(X, weights, 0))
    np.testing.assert_allclose(one.score(X, sample_weight=weights), scores.mean())
