"""Other libraries: models of theirs as targets, and results in their forms.

There is one file for each library, and nothing else imports it. None is imported before it is used,
and each is an extra of this package.
"""

import importlib
import importlib.metadata
from types import ModuleType

#: The oldest version of each library that the tests know.
OLDEST = {
    "numpyro": (0, 20),
    "funsor": (0, 4),
    "pymc": (5, 20),
    "arviz": (0, 20),
    "xarray": (2024, 1),
    "pandas": (2, 2),
    "blackjax": (1, 2),
    "arviz_stats": (0, 6),
}

#: The extras whose names differ from those of their libraries.
EXTRAS = {"funsor": "numpyro", "blackjax": "refine", "arviz_stats": "refine"}


def adapter(library: str, owner: str) -> ModuleType:
    """The module of this package for a library, which `owner` needs.

    Raises:
        ImportError: if the library is not installed, or is too old.
    """
    require_library(library, owner)
    return importlib.import_module(f"flowvi.interop.{library}")


def require_library(library: str, owner: str) -> None:
    """Raises an ImportError if a library that `owner` needs is not installed, or is too old."""
    extra = EXTRAS.get(library, library)
    fix = f"Perhaps `pip install 'flowvi[{extra}]'`?"
    try:
        version = importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        rule = f"`{owner}` must have {library} to work with; got none"
        raise ImportError(f"{rule}. {fix}") from None
    oldest = OLDEST[library]
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    if numbers < oldest:
        rule = f"`{owner}` must have {library} {'.'.join(map(str, oldest))} or later"
        raise ImportError(f"{rule}; got {version}. {fix}")
