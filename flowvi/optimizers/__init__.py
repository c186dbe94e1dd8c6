"""Optimizers: what training needs beside Optax's own."""

from flowvi.optimizers import rowwise
from flowvi.optimizers.averaging import averaged, learned

__all__ = ["averaged", "learned", "rowwise"]
