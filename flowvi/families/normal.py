"""The former name of a map that `flowvi.posteriors` uses."""

import functools

from flowvi.families.flow import Linear

LocationTriangular = functools.partial(Linear, full=True)
