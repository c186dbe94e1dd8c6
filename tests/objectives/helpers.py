"""What tests of estimators share."""

import numpy as np

from tests.tolerances import STANDARD_ERRORS


def assert_mean(values, expected, bias=1e-6):
    """The mean of independent values is right within its standard errors."""
    values = np.asarray(values, np.float64)
    error = values.std(0, ddof=1) / np.sqrt(len(values))
    assert (abs(values.mean(0) - expected) < STANDARD_ERRORS * error + bias).all(), (
        values.mean(0),
        expected,
        error,
    )
