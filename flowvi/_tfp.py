"""The one place that imports TensorFlow Probability, whose nightly builds come and go."""

from tensorflow_probability.substrates import jax as _tfp

tfb = _tfp.bijectors
tfd = _tfp.distributions
