"""Checks that data are where a family can be, before anything is trained."""

from collections.abc import Callable
from typing import Any

import numpy as np

#: Rows that are looked at together, so that a file larger than memory can be checked.
CHUNK = 65_536


def check_values(
    name: str, x: Any, family: Any, holds: Callable[[Any], Any], rule: str, fix: str
) -> None:
    """Checks every number of an array.

    Args:
        name: what to call the array.
        x: an array with at least one axis of rows.
        family: whose support it is.
        holds: numbers -> whether they are in the support.
        rule: what they must be, after "must".
        fix: what to do.

    Raises:
        ValueError: if a number is outside of the support; it names the first one.
    """
    shape = np.shape(x)
    rows = np.reshape(x, (1,)) if not shape else x
    for start in range(0, len(rows), CHUNK):
        chunk = np.asarray(rows[start : start + CHUNK])
        bad = ~np.asarray(holds(chunk))
        if bad.any():
            place = tuple(int(i) for i in np.argwhere(bad)[0])
            value = chunk[place]
            row = f" in row {start + place[0]}" if shape else ""
            raise ValueError(f"`{name}` must {rule} for {family!r}; got {value!s}{row}. {fix}")
