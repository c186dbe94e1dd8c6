"""Rows with weights in `fit_density`: those of whole numbers are repeated rows."""

import jax
import numpy as np
import optax
import pytest
from scipy import stats
from sklearn.covariance import ledoit_wolf

import flowvi as fv
from flowvi.densities import data, recipe, textbook
from flowvi.densities.textbook import Rows, Setting
from flowvi.diagnostics import mean
from flowvi.families import marginals
from flowvi.supports import as_support
from tests.training.helpers import assert_trees_equal

pytestmark = pytest.mark.filterwarnings("ignore::flowvi.DensityWarning")

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
COUNTS = RNG.integers(0, 4, 60)
X = 500 + 100 * RNG.normal(size=(60, 2))
SMALL = fv.maf(2, num_layers=1, hidden_sizes=[8], transformer="affine")
REAL = as_support(None, (2,))


def fit(x, family=None, **options):
    options = {"num_steps": 0, "progress": False, "key": KEY, **options}
    return fv.fit_density(x, **options) if family is None else fv.fit_density(family, x, **options)


@pytest.mark.parametrize("support", [None, "positive"])
def test_whole_batches_are_those_of_repeated_rows(support, x64):
    """Units, losses and steps, which see all rows each time, up to the order of the sums."""
    x = np.abs(X) + 1
    # Adam would blow up the rounding of gradients that are zero at the start.
    options = {"num_steps": 20, "validation_fraction": 0, "optimizer": optax.sgd(0.1)}
    options["support"] = support
    weighted = fit(x, SMALL, weights=COUNTS, batch_size=len(x[COUNTS > 0]), **options)
    repeated = np.repeat(x, COUNTS, 0)
    twice = fit(repeated, SMALL, batch_size=len(repeated), **options)
    for one, other in zip(
        jax.tree.leaves(weighted.params), jax.tree.leaves(twice.params), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(weighted.history["loss"], twice.history["loss"], rtol=1e-6)


def test_batches_of_some_rows_are_right_on_average():
    """Each row's loss is weighted, and the mean weight is 1 over all rows, not over a batch."""
    split = data.Split(X, None, np.arange(10), COUNTS.astype(float))
    _, _, weights = split.whole_training()
    np.testing.assert_allclose(weights, COUNTS[10:] / COUNTS[10:].mean())
    np.testing.assert_allclose(split.held_out()["weight"].mean(), 1)


@pytest.mark.slow
@pytest.mark.compilations(60)
def test_few_weighted_rows_are_repeated_rows_to_the_bit():
    """In any order: so textbook estimates, their choice and their scores see the same."""
    order = RNG.permutation(60)
    one = fit(X[order], weights=COUNTS[order])
    other = fit(np.repeat(X, COUNTS, 0))
    assert_trees_equal(one.params, other.params)
    assert one.scores == other.scores and one.num_rows == np.count_nonzero(COUNTS)
    # Only ratios matter.
    assert_trees_equal(fit(X, weights=3.0 * COUNTS).params, one.params)
    assert_trees_equal(fit(X, weights=np.full(60, 7)).params, fit(np.repeat(X, 2, 0)).params)


def sorted_apart(num_rows):
    """Rows of two groups, of which the weights take one away again."""
    generator = np.random.default_rng(1)
    x = generator.normal(size=(num_rows, 2)) + 6 * (generator.uniform(size=(num_rows, 1)) < 0.5)
    # The density of the group at zero over that of both.
    weights = 1 / (1 + np.exp(stats.norm.logpdf(x - 6).sum(1) - stats.norm.logpdf(x).sum(1)))
    return x, weights


@pytest.mark.parametrize("kind", ["normal", "mixture", "kernel"])
@pytest.mark.parametrize("bins", [None, 8])
def test_textbook_estimates_of_weighted_rows(kind, bins):
    x, weights = sorted_apart(3000)
    rows = Rows.of(x, None, weights / weights.mean())
    size = {"normal": 1.0, "mixture": 2, "kernel": 0.7}[kind]
    family, params = textbook.build(Setting(kind, bins, size), rows, REAL, 0)
    new = np.random.default_rng(2).normal(size=(4000, 2))
    gap = stats.norm.logpdf(new).sum(1) - family.log_prob(params, new)
    assert abs(np.mean(gap)) < 0.06


def test_pieces_of_weighted_rows():
    column = RNG.normal(size=400)
    weights = RNG.integers(0, 3, 400).astype(float)
    repeated = np.repeat(column, weights.astype(int))
    flat = marginals.equally_weighted(column, weights)
    part = np.linspace(0.05, 0.95, 19)
    np.testing.assert_allclose(np.quantile(flat, part), np.quantile(repeated, part), atol=0.05)
    np.testing.assert_array_equal(marginals.equally_weighted(column, np.ones(400)), np.sort(column))
    z = RNG.normal(size=(400, 3)) @ RNG.normal(size=(3, 3))
    again = np.repeat(z, weights.astype(int), 0)
    loc, y = marginals.centered(z, weights)
    np.testing.assert_allclose(loc, again.mean(0), rtol=1e-9)
    np.testing.assert_allclose(y.T @ y / 400, np.cov(again.T, bias=True), rtol=1e-9)
    both = (
        marginals.covariance(z[:18], weights[:18] + 1),
        ledoit_wolf(marginals.centered(z[:18], weights[:18] + 1)[1], assume_centered=True)[0],
    )
    np.testing.assert_allclose(*both, rtol=1e-6)
    assert mean(column, weights).value == pytest.approx(repeated.mean())
    assert mean(column).standard_error == pytest.approx(column.std() / 20)
    found = textbook.repeats(weights / weights.mean(), 400, 0)
    np.testing.assert_array_equal(found, np.repeat(np.arange(400), weights.astype(int)))
    real = RNG.exponential(size=400)
    counts = np.bincount(textbook.repeats(real, 400, 0), minlength=400)
    assert np.abs(counts - 8 * real / real.mean()).max() < 1 + 1e-9


def test_weights_of_held_out_scores():
    """Estimates are weighed by how they describe the rows that count."""
    scores = {
        "normal": np.array([0.0, 0.0, -9.0] * 40),
        "mixture": np.array([-9.0, -9.0, 0.0] * 40),
    }
    counts = np.array([1.0, 1.0, 2.0] * 40)
    found = recipe.chosen_weights(scores, counts)
    np.testing.assert_allclose(list(found.values()), 0.5, atol=0.01)
    assert recipe.chosen_weights(scores, np.array([1.0, 1.0, 0.0] * 40)) == {"normal": 1.0}


@pytest.mark.slow
@pytest.mark.compilations(80)
def test_a_flow_follows_the_weights():
    x, weights = sorted_apart(400)
    density = fit(x, SMALL, weights=weights, num_steps=60)
    assert [each.name for each in density.scores][-2:] == ["flow", "all"]
    new = np.random.default_rng(2).normal(size=(4000, 2))
    for score in density.scores[-2:]:
        assert abs(score.log_prob.value + 0.5 * 2 * np.log(2 * np.pi * np.e)) < 0.3
    assert abs(np.mean(stats.norm.logpdf(new).sum(1) - density.log_prob(new))) < 0.1


MESSAGES = {
    r"`weights` must have shape \(60,\), one for each row of `x`; got shape \(59,\)": COUNTS[1:],
    "`weights` must be finite and not negative; got -1.0 in row 3": np.where(
        np.arange(60) == 3, -1, 1
    ),
    "`weights` must be finite and not negative; got nan in row 0": np.full(60, np.nan),
    "`weights` must not all be zero; got only zeros": np.zeros(60),
}


@pytest.mark.parametrize("message", MESSAGES)
def test_message(message):
    with pytest.raises(ValueError, match=message):
        fit(X, weights=MESSAGES[message])


def test_weights_that_are_no_numbers():
    with pytest.raises(TypeError, match="`weights` must be an array of numbers"):
        fit(X, weights=["a"] * 60)
