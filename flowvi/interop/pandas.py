"""pandas: draws as a table."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas


def as_frame(values: Mapping[str, np.ndarray], labels: Sequence[str]) -> pandas.DataFrame:
    """One row for each draw, and one column for each label."""
    leaves = [np.asarray(value) for value in values.values()]
    table = np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], 1)
    return pandas.DataFrame(table, columns=list(labels)).rename_axis("draw")
