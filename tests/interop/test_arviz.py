"""Results in the forms of ArviZ, pandas and xarray."""

import importlib.metadata

import arviz as az
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

import flowvi as fv
from benchmarks.models.by_numpyro import CASES, EFFECTS
from tests.interop import unfitted

SCHOOLS = ["Choate", "Deerfield", "Andover", "Exeter", "Hotchkiss", "Lawrenceville", "Paul", "Mt"]


@pytest.fixture(scope="module")
def posterior():
    return unfitted(CASES["eight_schools"]().by_numpyro())


@pytest.fixture(scope="module")
def data(posterior):
    return posterior.to_arviz(jax.random.key(1), 200, 2, coords={"school": SCHOOLS})


# The fixture's programs are counted with the test that asks first.
@pytest.mark.compilations(250)
def test_all_groups_are_there(posterior, data):
    groups = data.groups() if callable(data.groups) else data.groups[1:]
    assert {group.strip("/") for group in groups} == {
        "posterior",
        "sample_stats",
        "log_likelihood",
        "observed_data",
        "posterior_predictive",
        "prior",
        "prior_predictive",
    }
    drawn = data["posterior"]
    assert set(drawn.data_vars) == {"mu", "tau", "z", "theta"}
    assert drawn["theta"].dims == ("chain", "draw", "school")
    assert drawn["theta"].shape == (2, 200, 8)
    assert list(drawn["school"].values) == SCHOOLS
    expected = drawn["mu"] + drawn["tau"] * drawn["z"]
    np.testing.assert_allclose(drawn["theta"], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(data["observed_data"]["y"], EFFECTS)
    assert data.attrs["draws"] == "importance-resampled"
    # The log density and the log likelihood are those at the draws.
    flat = {name: drawn[name].values.reshape(400, *drawn[name].shape[2:]) for name in drawn}
    u = posterior.target.unconstrain(flat)
    np.testing.assert_allclose(
        data["sample_stats"]["lp"].values.ravel(), posterior.target(u), rtol=1e-3, atol=1e-3
    )
    theta = drawn["theta"].values
    sd = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    expected = -0.5 * ((EFFECTS - theta) / sd) ** 2 - np.log(sd) - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(data["log_likelihood"]["y"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.compilations(250)
# Of ArviZ, of pandas below it, and of pictures that are not shown.
@pytest.mark.filterwarnings("ignore")
def test_arviz_takes_them(data):
    table = az.summary(data, var_names=["mu", "tau", "theta"])
    assert len(table) == 10 and np.isfinite(table["mean"]).all()
    assert "theta[Deerfield]" in table.index
    loo = az.loo(data)
    assert np.isfinite(getattr(loo, "elpd_loo", None) or loo.elpd)
    assert len(az.compare({"one": data, "two": data})) == 2
    az.plot_pair(data, var_names=["mu", "tau"])
    getattr(az, "plot_ppc", None) and az.plot_ppc(data, num_pp_samples=10)  # until 1.0
    az.plot_forest(data, var_names=["theta"])
    plt.close("all")


def test_resampling_mends_the_draws(x64):
    """Draws of a standard normal distribution, made those of a shifted one."""
    posterior = unfitted(fv.Target(lambda u: -0.5 * jnp.sum((u - 0.5) ** 2), 1))
    means = [
        float(
            posterior.to_arviz(jax.random.key(1), 2000, 2, resample=flag)["posterior"]["u"].mean()
        )
        for flag in (True, False)
    ]
    np.testing.assert_allclose(means, [0.5, 0.0], atol=0.1)


def test_rows_have_their_log_likelihood(x64):
    rows = np.arange(3.0)
    target = fv.Target.from_likelihood(
        lambda mean: -0.5 * jnp.sum(mean**2), lambda mean, x: -0.5 * (x - mean[0]) ** 2, rows, 1
    )
    data = unfitted(target).to_arviz(jax.random.key(0), 4, 2)
    expected = -0.5 * (rows - data["posterior"]["u"].values) ** 2
    np.testing.assert_allclose(data["log_likelihood"]["rows"], expected)


def test_tables_and_datasets(posterior):
    frame = posterior.to_dataframe(jax.random.key(1), 20)
    assert frame.shape == (20, 18) and list(frame.columns) == posterior.target.labels()
    options = {"resample": False, "coords": {"school": SCHOOLS}}
    dataset = posterior.to_xarray(jax.random.key(1), 20, **options)
    assert dataset["theta"].dims == ("draw", "school")
    assert float(dataset["theta"].sel(school="Paul", draw=3)) == float(dataset["theta"][3, 6])
    frame = posterior.to_dataframe(jax.random.key(1), 20, resample=False)
    np.testing.assert_array_equal(frame["theta[6]"], dataset["theta"].sel(school="Paul"))


@pytest.mark.parametrize("library", ["arviz", "pandas", "xarray"])
def test_libraries_that_are_missing(library, posterior, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    method = {"arviz": "to_arviz", "pandas": "to_dataframe", "xarray": "to_xarray"}[library]
    match = rf"`posterior.{method}` must have {library} to work with; got none. .*\[{library}\]"
    with pytest.raises(ImportError, match=match):
        getattr(posterior, method)(jax.random.key(0))


@pytest.mark.slow
@pytest.mark.compilations(150)
def test_new_data_of_a_model_whose_classes_were_summed_out():
    """Classes are drawn given the data: where normals are far apart, new data repeat the old."""
    posterior = unfitted(CASES["mixture"]().by_numpyro())
    data = posterior.to_arviz(jax.random.key(0), 300, 1)
    old, new = data["observed_data"]["y"].values, data["posterior_predictive"]["y"].values[0]
    assert new.shape == (300, 50)
    assert np.corrcoef(old, new.mean(0))[0, 1] > 0.8
    assert "log_likelihood" not in data
