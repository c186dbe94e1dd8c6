"""Pictures of densities, posteriors and histories. Their objects need no programs."""

import subprocess
import sys
import types

import numpy as np
import pytest

from flowvi import plotting

plt = pytest.importorskip("matplotlib.pyplot")
plt.switch_backend("agg")


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


class Normal:
    """Independent standard normal columns."""

    def __init__(self, size):
        self.target = types.SimpleNamespace(labels=lambda: [f"u[{i}]" for i in range(size)])
        self.size = size

    def sample(self, key, num_samples):
        return np.random.default_rng(0).normal(size=(num_samples, self.size))

    def log_prob(self, x):
        return np.sum(-0.5 * np.asarray(x) ** 2 - 0.5 * np.log(2 * np.pi), -1)


def visible(figure):
    return [axis for axis in figure.axes if axis.get_visible()]


def test_one_column_is_a_curve_over_the_data():
    figure = plotting.density(Normal(1), np.random.default_rng(1).normal(size=(500, 1)))
    (axis,) = figure.axes
    x, y = axis.get_lines()[0].get_data()
    np.testing.assert_allclose(y, np.exp(-0.5 * x**2) / np.sqrt(2 * np.pi), rtol=1e-9)
    bars = sum(bar.get_width() * bar.get_height() for bar in axis.patches)
    assert bars == pytest.approx(1.0)
    assert axis.get_xlabel() == "x0"


def test_two_columns_are_contours_that_hold_shares_of_the_probability():
    figure = plotting.density(Normal(2), np.zeros((3, 2)), columns=["left", "right"])
    (axis,) = figure.axes
    contours, points = axis.collections
    # Of a normal distribution in the plane 1 - exp(-r^2 / 2) lies inside of r.
    expected = np.array([0.01, 0.1, 0.3, 0.5, 0.7, 0.9]) / (2 * np.pi)
    np.testing.assert_allclose(contours.levels[:-1], expected, atol=2e-3)
    np.testing.assert_array_equal(points.get_offsets(), 0.0)
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("left", "right")


@pytest.mark.parametrize(("size", "shown"), [(3, 3), (9, 6)])
def test_more_columns_are_marginals_and_pairs(size, shown):
    data = np.random.default_rng(1).normal(size=(5_000, size))
    figure = plotting.density(Normal(size), data)
    assert len(visible(figure)) == shown * (shown + 1) // 2
    pair = figure.axes[shown]
    draws, rows = pair.collections
    assert len(draws.get_offsets()) == len(rows.get_offsets()) == 4_000
    title = figure.get_suptitle()
    assert title == ("" if size == shown else "3 more columns are left out")
    named = plotting.density(Normal(size), names=["x2", "x0"])
    assert [axis.get_xlabel() for axis in named.axes[2:]] == ["x2", "x0"]


def test_a_reference_is_drawn_above_the_diagonal():
    posterior, reference = Normal(3), np.ones((50, 3))
    assert len(visible(plotting.pairs(posterior, None))) == 6
    figure = plotting.pairs(posterior, None, reference=reference)
    assert len(visible(figure)) == 9
    np.testing.assert_array_equal(figure.axes[1].collections[0].get_offsets(), 1.0)
    figure = plotting.marginals(Normal(10), None, reference=np.ones((50, 8)))
    assert len(visible(figure)) == 8


def test_what_cannot_be_drawn():
    with pytest.raises(ValueError, match=r"`columns` must have 2 columns; got 1"):
        plotting.density(Normal(2), columns=["left"])
    with pytest.raises(ValueError, match=r"`x` must have 2 columns; got 3"):
        plotting.density(Normal(2), np.zeros((4, 3)))
    with pytest.raises(ValueError, match=r"`names` must be among x0, x1, ...; got 'u'"):
        plotting.density(Normal(2), names=["u"])
    with pytest.raises(ValueError, match=r"`reference` must have 3 columns; got 2"):
        plotting.pairs(Normal(3), None, reference=np.zeros((4, 2)))


def test_curves_of_any_fit():
    steps = np.arange(1000)
    history = {"loss": 1.0 / (1 + steps), "skipped": np.zeros(1000), "norm": steps}
    figure = plotting.curves(types.SimpleNamespace(history=history))
    assert [axis.get_title() for axis in figure.axes] == ["loss", "norm"]
    x, y = figure.axes[1].get_lines()[0].get_data()
    np.testing.assert_allclose(y, x - 0.5)  # means of five steps each
    history |= {"validation": np.ones(2), "validation_step": np.array([500, 1000])}
    history["loss"][3] = np.nan
    lines = plotting.curves(types.SimpleNamespace(history=history)).axes[0].get_lines()
    assert np.isfinite(lines[0].get_ydata()).all()
    np.testing.assert_array_equal(lines[1].get_data(), [[500, 1000], [1, 1]])


def test_extras_are_imported_on_first_use():
    program = """
import sys, types
import flowvi
extras = {"arviz", "blackjax", "diffrax", "hypothesis", "matplotlib", "numpyro", "pymc"}
assert not extras & set(sys.modules)
flowvi.testing.strategies.seeds()
assert "hypothesis" in sys.modules
sys.modules["matplotlib"] = sys.modules["matplotlib.pyplot"] = None
try:
    flowvi.plotting.curves(types.SimpleNamespace(history={"loss": [1.0]}))
except ImportError as error:
    assert "`pip install flowvi[plot]`" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)
