"""What all pictures share."""

from typing import Any


def pyplot() -> Any:
    """Matplotlib, imported when a picture is drawn.

    Raises:
        ImportError: if it is missing; it says what to install.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Pictures need matplotlib. Perhaps install it with `pip install flowvi[plot]`?"
        ) from error
    return plt


def bare(axis: Any) -> None:
    """Leaves an axis its lower edge."""
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.set_yticks([])
