"""The name that `posteriors` knows."""

from flowvi.objectives.likelihood import cross_entropy  # noqa: F401  TODO(merge)
