"""Whether synthetic rows repeat rows that a density was fitted to."""

import dataclasses

import numpy as np
from sklearn.neighbors import NearestNeighbors

#: The part of held-out rows that is called close, and how many times as many synthetic rows are
#: too many.
CLOSE, TOO_MANY = 0.05, 2.0


@dataclasses.dataclass(frozen=True)
class Privacy:
    """How close synthetic rows are to the rows of the fit, beside held-out rows.

    Distances are to the closest row of the fit: root mean squares over columns, of differences of
    normal scores for numbers, of 0 or 1 for categories, of turns for angles.

    Attributes:
        synthetic: of each synthetic row.
        held_out: of each held-out row.
        close: the part of synthetic rows that are closer than all but 5 % of the held-out ones. It
            is 0.05 where synthetic rows know no more of the rows of the fit than new rows do.
        copies: the part of synthetic rows that are copies, and of held-out rows.
        message: what to say of it; empty where nothing is.
    """

    synthetic: np.ndarray = dataclasses.field(repr=False)
    held_out: np.ndarray = dataclasses.field(repr=False)
    close: float
    copies: tuple[float, float]
    message: str


def compared(fit: np.ndarray, synthetic: np.ndarray, held_out: np.ndarray) -> Privacy:
    """The distances of points [n, P] to those of the fit."""
    index = NearestNeighbors(n_neighbors=1).fit(fit)
    near, far = (index.kneighbors(each)[0][:, 0] for each in (synthetic, held_out))
    close = float(np.mean(near < np.quantile(far, CLOSE)))
    copies = tuple(float(np.mean(each < 1e-6)) for each in (near, far))
    error = np.sqrt(CLOSE * (1 - CLOSE) * (1 / len(near) + 1 / len(far)))
    message = ""
    if close > TOO_MANY * CLOSE + 3 * error or copies[0] > 2 * copies[1] + 3 * error:
        message = (
            f"{close:.0%} of synthetic rows are closer to a row of the fit than all but "
            f"{CLOSE:.0%} of new rows are, and {copies[0]:.1%} are copies, against "
            f"{copies[1]:.1%} of new rows: they tell of single rows. Perhaps share fewer columns?"
        )
    return Privacy(near, far, close, (copies[0], copies[1]), message)
