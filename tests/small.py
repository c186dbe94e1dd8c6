"""Flows for tests that are about something else: they compile in half the time of default ones."""

from flowvi.transformers import Spline

#: A spline's bins are what its compilation takes its time for; three are a first, an inner and a
#: last one. Those of the default are in the registry of bijectors.
SPLINE = Spline(num_bins=3)

SMALL = {"num_layers": 2, "hidden_sizes": [8], "transformer": SPLINE}
AFFINE = {**SMALL, "transformer": "affine"}

#: Of `fv.transformer_flow`.
TOKENS = {"num_layers": 1, "width": 4, "num_heads": 2, "num_blocks": 2}
