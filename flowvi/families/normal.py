"""The former place of a map that `flowvi.posteriors` uses."""

from flowvi.families.flow import LocationTriangular

__all__ = ["LocationTriangular"]
