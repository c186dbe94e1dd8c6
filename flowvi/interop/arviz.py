"""ArviZ: draws in the form that its tables and pictures take."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import arviz
import numpy as np

Groups = Mapping[str, Mapping[str, np.ndarray]]


def as_data(
    groups: Groups,
    coords: Mapping[str, Sequence[object] | np.ndarray],
    dims: Mapping[str, Sequence[str]],
    attributes: Mapping[str, object],
) -> Any:
    """What ArviZ calls inference data: of its 0.x an `InferenceData`, from 1.0 on a `DataTree`.

    Args:
        groups: {group: {name: array of shape [chain, draw, *shape]}}; observed data have no draws.
        coords: {axis: labels}.
        dims: {name: the names of its axes, without those of chains and draws}.
        attributes: notes on all of it.
    """
    given: dict[str, Any] = {group: dict(arrays) for group, arrays in groups.items() if arrays}
    named = {name: list(axes) for name, axes in dims.items()}
    sizes = {axis: list(labels) for axis, labels in coords.items()}
    options: dict[str, Any] = {"coords": sizes, "dims": named, "attrs": dict(attributes)}
    if "posterior" in inspect.signature(arviz.from_dict).parameters:
        return arviz.from_dict(**given, **options)
    options["attrs"] = {"/": options["attrs"]}
    return arviz.from_dict(given, **options)
