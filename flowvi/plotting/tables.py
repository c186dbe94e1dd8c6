"""Pictures of tables: columns of all kinds beside each other."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jax.typing import ArrayLike

from flowvi.plotting.curves import LIGHT
from flowvi.plotting.samples import Names, _choose, _grid, _optional, as_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: How far a level is spread on both sides, and how many letters of its name there is room for.
SPREAD, LETTERS = 0.3, 9


def table(
    draws: ArrayLike,
    x: ArrayLike | None,
    columns: Sequence[str],
    levels: Sequence[tuple[str, ...] | None],
    *,
    names: Names = None,
    most: int = 6,
) -> "Figure":
    """Draws of a table, and data over them: marginals on the diagonal and pairs below it.

    Levels of categories are spread at random about their place, so that points can be counted.

    Args:
        draws: of shape [n, D]; of categories the numbers of their levels.
        x: data of shape [m, D], of which NaN are missing; or None.
        columns: the names of all columns.
        levels: of each column those of a category, or None.
        names: the columns to draw; by default the first ones.
        most: how many to draw at most; a line says how many are left out.
    """
    table = as_table(draws)
    data = _optional("x", x, table.shape[1])[: len(table)]
    chosen = _choose(columns, names, most)[:most]
    rng = np.random.default_rng(0)
    parts = []
    for each in (table, data):
        spread = rng.uniform(-SPREAD, SPREAD, (len(each), len(chosen)))
        parts.append(each[:, chosen] + spread * [levels[i] is not None for i in chosen])
    figure = _grid([columns[i] for i in chosen], parts[0], parts[1], over=True)
    size = len(chosen)
    for place, axis in enumerate(figure.axes):
        row, column = divmod(place, size)
        count = len(levels[chosen[row]] or ())
        if row == column and count:
            for patch in list(axis.patches):
                patch.remove()
            for each, options in ((table, {"color": LIGHT}), (data, {"fill": False})):
                codes = each[:, chosen[row]]
                codes = codes[~np.isnan(codes)].astype(int)
                if len(codes):
                    part = np.bincount(codes, minlength=count) / len(codes)
                    axis.bar(range(count), part, width=2 * SPREAD, linewidth=0.8, **options)
            axis.set(xlim=(-0.5, count - 0.5), ylim=(0, None))
            axis.autoscale(axis="y")
        for which, end in ((chosen[column], "x"), (chosen[row], "y")):
            own = levels[which]
            if own is None or (end == "y" and row == column):
                continue
            words = [each if len(each) <= LETTERS else each[: LETTERS - 1] + "…" for each in own]
            if end == "x":
                axis.set_xticks(range(len(own)), words, rotation=30 if len(own) > 2 else 0)
            else:
                axis.set_yticks(range(len(own)), words)
        axis.label_outer()
    if names is None and size < table.shape[1]:
        figure.suptitle(f"{table.shape[1] - size} more columns are left out", fontsize=9)
    return figure
