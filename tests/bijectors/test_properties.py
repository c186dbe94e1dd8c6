"""All properties over the whole registry."""

import jax
import jax.numpy as jnp
import pytest

from flowvi.testing import PROPERTIES, check_bijector
from flowvi.testing.trial import cycle
from tests.registry import CONDITIONS, REGISTRY

#: Rows one by one are three programs more, and without compilation each operation is one: there,
#: a case of each kind is enough.
ROWS = {
    "iaf_affine_2",
    "maf_affine_contexts",
    "iaf_affine_5_opaque",
    "chain",
    "coupling_affine",
    "lu_linear_5",
    "permutation",
    "units",
}
EAGER = ["maf_affine_2_no_hidden", "coupling_affine", "lu_linear_5", "permutation"]
#: Their programs take long to compile, and smaller ones have all that they are made of: they are
#: left to the slow test, which has all conditions of the quick one.
LARGE = {
    "iaf_affine_128",
    "iaf_spline_33_shuffled",
    "maf_affine_33_narrow",
    "maf_spline_128_shuffled",
    "maf_family_128",
    "maf_adjacency",
    "maf_umnn_2",
    "iaf_deep_sigmoid_2",
    "planar_context",
    "maf_bernstein_2",
    "sylvester_householder",
    "radial",
    "bnaf_context",
    "torus",
    "iaf_family",
    "maf_family_context",
    "continuous",
    "transformer_flow_context",
}


def check(name, condition, dtype, properties):
    with jax.enable_x64(dtype == "float64"):
        sample = REGISTRY[name].make(condition, dtype)
        options = {"order": sample.order, "batch_shape": sample.batch_shape}
        if dtype == "float64":
            options["tolerance"] = REGISTRY[name].tolerance
        try:
            check_bijector(sample.bijector, sample.x, properties=properties, **options)
        except AssertionError as error:
            raise AssertionError(f"{name}, parameters {condition}, {dtype}: {error}") from error


def conditions(name, known=CONDITIONS):
    return known if REGISTRY[name].has_params else known[:1]


@pytest.mark.parametrize("name", [n for n in REGISTRY if n not in LARGE])
def test_compiled(name):
    properties = set(PROPERTIES) - {"eager"} - (set() if name in ROWS else {"batch"})
    for condition in conditions(name, ("start", "perturbed")):
        check(name, condition, "float64", properties)


@pytest.mark.usefixtures("x64")
@pytest.mark.compilations(80)
def test_single_precision_is_kept():
    for name, case in REGISTRY.items():
        params, x = case.inputs("start", "float32")
        result = jax.eval_shape(lambda p, x, case=case: cycle(case.build(p), x), params, x)
        assert {part.dtype for part in result} == {jnp.dtype("float32")}, name


@pytest.mark.parametrize("name", ["maf_spline_1", "lu_linear_5"])
def test_numbers_in_single_precision(name):
    check(name, "perturbed", "float32", set(PROPERTIES) - {"eager", "batch"})


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.compilations(200)
def test_without_compilation(name):
    check(name, conditions(name)[-1].replace("trained", "perturbed"), "float64", ["eager"])


#: Rows one by one are solutions one by one, which take long: another test has them.
SOLVED = {"continuous"}


@pytest.mark.slow
@pytest.mark.compilations(60)
@pytest.mark.parametrize("name", REGISTRY)
def test_trained_and_in_both_precisions(name):
    # One program for each precision, whatever the parameters. Rows are the same in both.
    for dtype, left_out in (("float64", {"eager"}), ("float32", {"eager", "batch"})):
        left_out = left_out | ({"batch"} if name in SOLVED else set())
        for condition in conditions(name):
            check(name, condition, dtype, set(PROPERTIES) - left_out)
