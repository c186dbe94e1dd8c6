"""The pages of the reference, written from what the package exports.

A room of the library is a page: names that `flowvi` itself exports come first, under the name that
users write, and then what else the room exports. A new name needs no line here.
"""

import importlib
import importlib.util
import inspect
import pathlib
import pkgutil
import sys
import textwrap
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

import flowvi
import flowvi.interop

if TYPE_CHECKING:
    from sphinx.application import Sphinx

FOLDER = pathlib.Path(__file__).parent / "reference"


def _modules() -> Iterator[pkgutil.ModuleInfo]:
    """The rooms; and files of `interop`, of which each is for another library."""
    for parent in (flowvi, flowvi.interop):
        yield from pkgutil.iter_modules(parent.__path__, f"{parent.__name__}.")


def rooms() -> dict[str, ModuleType]:
    """The modules of flowvi that say what they export, by name, without the front door."""
    found = {}
    for info in _modules():
        # Files that export nothing may need libraries that are not there.
        spec = importlib.util.find_spec(info.name)
        if "\n__all__ = " in pathlib.Path(spec.origin).read_text():
            found[info.name] = importlib.import_module(info.name)
    return found


def exported() -> dict[str, dict[str, object]]:
    """By the room that it is made in, everything exported, under the shortest public name."""
    pages: dict[str, dict[str, object]] = {name: {} for name in rooms()}
    shown: set[int] = set()

    def add(page: str, name: str, value: object) -> None:
        if not inspect.ismodule(value) and id(value) not in shown:
            shown.add(id(value))
            pages.setdefault(page, {})[name] = value

    for name in flowvi.__all__:
        value = getattr(flowvi, name)
        home = ".".join(getattr(value, "__module__", "flowvi").split(".")[:2])
        add(home, f"flowvi.{name}", value)
    for page, module in rooms().items():
        for name in module.__all__:
            add(page, f"{page}.{name}", getattr(module, name))
    return {page: names for page, names in pages.items() if names}


def comment(room: str, name: str) -> str:
    """What is said of a value by `#:` before it, in whichever file of the room it is made."""
    # Tests ask what is exported where there is no Sphinx.
    import docstrings
    from sphinx.pycode import ModuleAnalyzer

    files = [room, *(m for m in sys.modules if m.startswith(f"{room}."))]
    for file in files:
        said = ModuleAnalyzer.for_module(file).find_attr_docs().get(("", name))
        if said:
            return "\n".join(docstrings.converted(said))
    return ""


def directive(name: str, value: object) -> str:
    """What makes Sphinx write the entry of a name."""
    if inspect.isclass(value):
        bases = "" if value.__bases__ == (object,) else "   :show-inheritance:\n"
        return f".. autoclass:: {name}\n   :members:\n{bases}\n"
    if inspect.isroutine(value):
        return f".. autofunction:: {name}\n\n"
    room, _, last = name.rpartition(".")
    text = textwrap.indent(comment(room, last), "   ")
    return f".. py:data:: {last}\n   :module: {room}\n\n{text}\n\n"


def page(room: str, names: dict[str, object]) -> str:
    """One page, in reStructuredText."""
    parts = [f"{room}\n{'=' * len(room)}\n\n.. automodule:: {room}\n   :no-members:\n\n"]
    own = [name for name in names if name.count(".") == 1]
    rest = [name for name in names if name.count(".") > 1]
    for title, group in (("Exported by flowvi", own), (f"Exported by {room}", rest)):
        if group:
            parts.append(f"{title}\n{'-' * len(title)}\n\n")
            parts += [directive(name, names[name]) for name in sorted(group, key=str.lower)]
    return "".join(parts)


def write(app: "Sphinx") -> None:
    """Write one page a room, and the list of them; pages that are the same stay as they are."""
    FOLDER.mkdir(exist_ok=True)
    pages = {room: page(room, names) for room, names in exported().items()}
    entries = "\n".join(f"   {room}" for room in sorted(pages))
    pages["index"] = (
        "Reference\n=========\n\nEvery public name, by the room of the library that it is in.\n\n"
        f".. toctree::\n   :maxdepth: 1\n\n{entries}\n"
    )
    for old in FOLDER.glob("*.rst"):
        if old.stem not in pages:
            old.unlink()
    for name, text in pages.items():
        path = FOLDER / f"{name}.rst"
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
