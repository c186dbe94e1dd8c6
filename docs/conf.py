"""Sphinx's settings: `python -m sphinx -W --keep-going -j 2 docs docs/_build/html`.

Pages are Markdown. What is in a `{code-cell}` runs while the site is built, and the reference is
written from the package by `reference.py`, so that neither can say what the library does not do.
"""

import hashlib
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The cells run few steps: compiling them takes longer than running them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import docstrings
import jax.typing
import numpy as np
import numpy.typing
import reference
from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx
from sphinx.util.typing import stringify_annotation
from sphinx.writers.html5 import HTML5Translator

import flowvi

files = sorted(pathlib.Path(flowvi.__file__).parent.rglob("*.py"))
sources = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]

project = "flowvi"
author = "The flowvi authors"
project_copyright = author
version = release = flowvi.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

default_role = "py:obj"
highlight_language = "none"  # formulas; sessions and Python code say what they are
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Warns", "params_style")]

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 4
nb_execution_mode = "cache"
# What cells printed is kept for as long as neither they nor the library change.
nb_execution_cache_path = str(pathlib.Path(__file__).parent / "_build" / f"cells-{sources}")
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_merge_streams = True

html_theme = "pydata_sphinx_theme"
html_title = "flowvi"
html_math_renderer = "mathml"
html_show_sourcelink = False
html_copy_source = False
html_sidebars = {name: [] for name in ("start", "concepts")}
html_theme_options = {
    "navbar_align": "left",
    "navigation_with_keys": False,
    "show_nav_level": 2,
    "show_prev_next": False,
    "secondary_sidebar_items": ["page-toc"],
}


def visit_math(translator: HTML5Translator, node: nodes.math) -> None:
    """Formulas as MathML, which browsers draw themselves: no script from elsewhere is needed."""
    translator.body.append(latex2mathml.tex2mathml(node.astext()))
    raise nodes.SkipNode


def visit_math_block(translator: HTML5Translator, node: nodes.math_block) -> None:
    """As `visit_math`, on lines of their own."""
    formula = latex2mathml.tex2mathml(node.astext(), as_block=True)
    translator.body.append(f'<div class="formula">{formula}</div>\n')
    raise nodes.SkipNode


def skip_foreign(
    app: Sphinx, what: str, name: str, member: object, skip: bool, options: object
) -> bool | None:
    """Leaves out what other libraries put into classes of ours, such as scikit-learn's requests."""
    module = getattr(member, "__module__", None) or "flowvi"
    return True if not module.startswith("flowvi") else None


#: Unions that have a name, as they are spelled out.
UNIONS = [
    stringify_annotation(union, "smart") for union in (jax.typing.ArrayLike, np.typing.ArrayLike)
]


def name_unions(
    app: Sphinx, what: str, name: str, value: object, options: object, arguments: str, result: str
) -> tuple[str, str] | None:
    """Signatures that say `ArrayLike` where the code does."""
    if arguments is None:
        return None
    for union in UNIONS:
        arguments = arguments.replace(union, "ArrayLike")
    return arguments, result


def setup(app: Sphinx) -> None:
    """Sphinx's entry point."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.connect("builder-inited", reference.write)
    app.connect("autodoc-process-signature", name_unions)
    app.connect("autodoc-skip-member", skip_foreign)
    # Before napoleon, which stands at 500 and reads sections.
    app.connect("autodoc-process-docstring", docstrings.to_rst, priority=400)
