"""The one table of tolerances."""

from flowvi.testing import TOLERANCES

#: Relative error allowed to an identity.
FLOAT64 = TOLERANCES["float64"]
FLOAT32 = TOLERANCES["float32"]

#: The same in double precision of what is computed by steps, such as solutions of equations.
STEPS = 1e-7

#: Monte Carlo estimates, at a fixed seed, lie within this many of their standard errors.
STANDARD_ERRORS = 4.0

#: Deviation from 1 allowed to the integral of a density over a grid.
INTEGRAL = 1e-3
