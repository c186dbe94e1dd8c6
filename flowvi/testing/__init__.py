"""For people who write bijectors: properties, and Hypothesis strategies for what they range over.

`flowvi.testing.strategies` needs Hypothesis (the extra `test`) and is imported on first use.
"""

import importlib
from types import ModuleType

from flowvi.testing.check import check_bijector, perturbed
from flowvi.testing.properties import PROPERTIES
from flowvi.testing.trial import TOLERANCES

__all__ = ["PROPERTIES", "TOLERANCES", "check_bijector", "perturbed", "strategies"]


def __getattr__(name: str) -> ModuleType:
    if name == "strategies":
        return importlib.import_module("flowvi.testing.strategies")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
