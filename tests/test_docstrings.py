"""Every public name has an entry in the reference, and a docstring with all that one asks of it."""

import ast
import importlib.util
import inspect
import pathlib
import textwrap
import typing

import pytest

import flowvi as fv

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def load(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ENTRIES = {
    name: each for page in load("reference").exported().values() for name, each in page.items()
}
MODULES = {name for name in fv.__all__ if inspect.ismodule(getattr(fv, name))}
#: What `flowvi.__all__` says, and the `__all__` of the modules in it.
PUBLIC = {
    name.removeprefix("flowvi."): value
    for name, value in ENTRIES.items()
    if name.count(".") == 1 or name.split(".")[1] in MODULES
}
WARNINGS = {"AmortizationWarning", "CalibrationWarning", "DensityWarning", "PosteriorWarning"}
VALUES = {"testing.PROPERTIES", "testing.TOLERANCES", "testing.strategies"}

#: What fits and checks hand back: the example is that of what makes it.
SHOWN_BY = {
    "AmortizedLikelihood": "fit_likelihood",
    "AmortizedPosterior": "fit_amortized",
    "Calibration": "fit_density",
    "Density": "fit_density",
    "Ensemble": "ensemble",
    "Fitted": "fit_density",
    "Posterior": "fit_posterior",
    "PosteriorCalibration": "calibrate",
    "Progress": "fit",
    "TableDensity": "table",
    "TrainingDiverged": "fit",
    "objectives.GradientMoments": "objectives.gradient_moments",
}

#: Names for which a section has no meaning.
WITHOUT = {
    # An interface, which its subclasses or users implement and explain.
    "Example": WARNINGS
    | VALUES
    | {"networks.Network", "networks.PlainNetwork", "objectives.ControlVariate", "tables.Encoder"},
    # Machinery of this library and its results: nobody has written of them elsewhere.
    "Source": WARNINGS
    | VALUES
    | set(SHOWN_BY) - {"Calibration", "PosteriorCalibration"}
    | {"Estimate", "FitResult", "Fixed", "TrainingOptions", "fit", "infer_schema", "load", "save"}
    | {
        "networks.Network",
        "networks.PlainNetwork",
        "networks.as_network",
        "objectives.ControlVariate",
        "objectives.training_loss",
    }
    | {"tables.Category", "tables.Constant", "tables.Encoder", "tables.Real", "tables.Schema"}
    | {"testing.perturbed"},
    # These are made by other names, which say what goes in; or take no arguments.
    "Args": WARNINGS
    | VALUES
    | {"networks.Network", "networks.PlainNetwork", "objectives.ControlVariate"}
    | {"objectives.GradientMoments", "tables.Table"},
    # That a protocol is not made is Python's to say.
    "Raises": {"objectives.ControlVariate"},
}


def raises(value):
    """Whether its own code raises: that of a function, or of what makes an object."""
    makers = ("__init__", "__post_init__")
    own = [vars(value).get(name) for name in makers] if inspect.isclass(value) else [value]
    for function in filter(inspect.isfunction, own):
        if function.__code__.co_filename == "<string>":
            continue  # written by `dataclasses`
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Raise) or called.startswith(("require", "checks.", "check_")):
                return True
    return False


def takes_arguments(value):
    if typing.is_typeddict(value):
        return True
    is_made = inspect.isclass(value) or inspect.isroutine(value)
    return is_made and bool(inspect.signature(value).parameters)


def sections(value):
    """The sections that a docstring has, of those that are asked for."""
    text = inspect.getdoc(value) or ""
    marks = {
        "Example": (">>> ",),
        "Source": ("Source:", "Sources:"),
        "Args": ("Args:\n", "Attributes:\n"),
        "Raises": ("Raises:\n",),
    }
    return {name for name, of in marks.items() if any(mark in text for mark in of)}


def is_due(name, section):
    value = PUBLIC[name]
    if section == "Raises":
        return raises(value)
    return section != "Args" or takes_arguments(value)


def test_every_exported_name_has_an_entry():
    listed = {id(value) for value in ENTRIES.values()}
    modules = [fv, *(getattr(fv, name) for name in MODULES)]
    names = [(module, name) for module in modules for name in module.__all__]
    values = [(f"{module.__name__}.{name}", getattr(module, name)) for module, name in names]
    missing = [
        name for name, each in values if not inspect.ismodule(each) and id(each) not in listed
    ]
    assert len(values) > 100
    assert not missing


@pytest.mark.parametrize("section", sorted(WITHOUT))
def test_docstrings_are_whole(section):
    due = [name for name in PUBLIC if name not in WITHOUT[section] and is_due(name, section)]
    has = {name: section in sections(PUBLIC[name]) for name in due}
    if section == "Example":
        has |= {name: "Example" in sections(PUBLIC[maker]) for name, maker in SHOWN_BY.items()}
    missing = sorted(name for name, there in has.items() if not there)
    share = 1 - len(missing) / len(has)
    assert not missing, f"{section} is there for {share:.0%}, not for {', '.join(missing)}"


@pytest.mark.parametrize("section", sorted(WITHOUT))
def test_exemptions_are_needed(section):
    exempt = {name for name in WITHOUT[section] if name in PUBLIC}
    assert not WITHOUT[section] - set(PUBLIC) - VALUES
    assert not {name for name in exempt if name not in VALUES and section in sections(PUBLIC[name])}


def test_a_docstring_that_lacks_a_section_is_seen():
    def bare(size):
        """A size.

        Args:
            size: one.
        """
        raise ValueError(size)

    assert sections(bare) == {"Args"}
    assert raises(bare) and takes_arguments(bare)
