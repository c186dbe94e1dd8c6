"""What a target needs from a model of another library."""

import abc
from collections.abc import Mapping

import numpy as np

from flowvi.layouts import Parameters, Theta
from flowvi.params import Array

#: {name: array of shape [num_draws, *shape]}.
Draws = Mapping[str, np.ndarray]


class Model(abc.ABC):
    """A model of another library.

    Its `parameters` are what a target's vector stands for; its *values* are what users see: its
    random variables in their own names, and what the model computes from them.

    Attributes:
        parameters: {name: (shape, support)} of what the log density is a function of.
        names: those of the values, in order.
        num_rows: the rows of the likelihood, if some of them can stand for all; else None.
        dims: the names of the axes of values and of data, by name, where they are known.
        coords: the labels along axes, by the name of the axis.
    """

    parameters: Parameters
    names: tuple[str, ...]
    num_rows: int | None = None
    dims: Mapping[str, tuple[str, ...]]
    coords: Mapping[str, np.ndarray]

    @abc.abstractmethod
    def log_density(self, theta: Theta) -> Array:
        """The log joint density with respect to the parameters, of all data."""

    def log_prior(self, theta: Theta) -> Array:
        """What of it is not the likelihood of rows."""
        raise NotImplementedError

    def log_likelihood(self, theta: Theta, rows: Array) -> Array:
        """The log likelihood of each of some rows, given by their numbers."""
        raise NotImplementedError

    @abc.abstractmethod
    def values(self, theta: Theta) -> dict[str, Array]:
        """What users see, at one point."""

    @abc.abstractmethod
    def parameters_of(self, values: Mapping[str, Array]) -> Theta:
        """The parameters at one point, from all random variables; other names are ignored."""

    def observed_data(self) -> dict[str, np.ndarray]:
        """The data, by name."""
        return {}

    def pointwise(self, draws: Draws) -> dict[str, np.ndarray]:
        """The log likelihood of each datum at each draw: {name: [num_draws, *shape]}."""
        return {}

    def posterior_predictive(self, key: Array, draws: Draws) -> dict[str, np.ndarray]:
        """New data for each draw."""
        return {}

    def prior(self, key: Array, num_draws: int) -> tuple[Draws, Draws]:
        """Draws of the prior, and new data for them; both empty where there are none."""
        return {}, {}
