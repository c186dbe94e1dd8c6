"""xarray: draws with named axes."""

from collections.abc import Mapping, Sequence

import numpy as np
import xarray


def as_dataset(
    values: Mapping[str, np.ndarray],
    coords: Mapping[str, Sequence[object] | np.ndarray],
    dims: Mapping[str, Sequence[str]],
) -> xarray.Dataset:
    """Arrays of shape [draw, *shape] as a dataset; axes without a name are called "x_dim_0"."""
    variables = {}
    for name, value in values.items():
        axes = [f"{name}_dim_{index}" for index in range(np.ndim(value) - 1)]
        variables[name] = (("draw", *dims.get(name, axes)), np.asarray(value))
    used = {axis for axes, _ in variables.values() for axis in axes}
    labels = {axis: list(each) for axis, each in coords.items() if axis in used}
    return xarray.Dataset(variables, {"draw": np.arange(_count(values)), **labels})


def _count(values: Mapping[str, np.ndarray]) -> int:
    return len(next(iter(values.values())))
