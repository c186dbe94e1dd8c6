"""A log density in C, from its source to ArviZ's tables and pictures.

    python examples/callback_pharmacokinetics.py [--short] [--output callback.png]

The concentration of a drug after a dose, c(t) = dose / volume * exp(-rate t), measured with noise
of a known share of it. The log density and its gradient are compiled by this machine's C compiler.
"""

import argparse
import ctypes
import pathlib
import subprocess
import tempfile
import warnings

import jax

warnings.filterwarnings("ignore", category=FutureWarning, module="arviz")
import arviz as az  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

import flowvi as fv  # noqa: E402

jax.config.update("jax_enable_x64", True)

DOSE, NOISE, TRUTH = 100.0, 0.2, {"volume": 8.0, "rate": 0.3}
TIME = np.array([0.5, 1.0, 2.0, 4.0, 8.0, 12.0])

SOURCE = """
#include <math.h>
/* theta = (volume, rate): log-normal priors, and log-normal errors around the curve. */
double density(const double *theta, int n, const double *time, const double *seen,
               double dose, double noise, double *gradient) {
    double log_volume = log(theta[0]), log_rate = log(theta[1]);
    double a = (log_volume - 2.0) / 1.0, b = (log_rate + 1.0) / 1.0;
    double value = -0.5 * (a * a + b * b) - log_volume - log_rate;
    gradient[0] = -(a + 1.0) / theta[0];
    gradient[1] = -(b + 1.0) / theta[1];
    for (int i = 0; i < n; i++) {
        double away = log(seen[i]) - (log(dose) - log_volume - theta[1] * time[i]);
        value -= 0.5 * away * away / (noise * noise);
        gradient[0] -= away / (noise * noise * theta[0]);
        gradient[1] -= away * time[i] / (noise * noise);
    }
    return value;
}
"""


def compile_density(folder):
    """The C function as one of a vector that returns its value and its gradient."""
    source, library = folder / "density.c", folder / "density.so"
    source.write_text(SOURCE)
    command = ["cc", "-O2", "-shared", "-fPIC", str(source), "-o", str(library), "-lm"]
    subprocess.run(command, check=True)
    density = ctypes.CDLL(str(library)).density
    vector = np.ctypeslib.ndpointer(float, 1, flags="C_CONTIGUOUS")
    number = ctypes.c_double
    density.restype = number
    density.argtypes = [vector, ctypes.c_int, vector, vector, number, number, vector]

    rng = np.random.default_rng(0)
    curve = DOSE / TRUTH["volume"] * np.exp(-TRUTH["rate"] * TIME)
    seen = curve * np.exp(NOISE * rng.normal(size=len(TIME)))

    def value_and_grad(theta):
        gradient = np.empty(2)
        return density(theta, len(TIME), TIME, seen, DOSE, NOISE, gradient), gradient

    return value_and_grad


def main():
    """Compile, fit, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="few steps, for a quick check")
    parser.add_argument("--output", default="callback.png", help="where the picture goes")
    arguments = parser.parse_args()
    options = {"num_steps": 200 if arguments.short else 1000}

    with tempfile.TemporaryDirectory() as folder:
        value_and_grad = compile_density(pathlib.Path(folder))
    shapes = {"volume": ((), "positive"), "rate": ((), "positive")}
    target = fv.Target.from_callback(value_and_grad, parameters=shapes)
    posterior = fv.fit_posterior(target, key=jax.random.key(0), num_samples=64, **options)
    data = posterior.to_arviz(jax.random.key(1))

    print(az.summary(data, kind="stats"))
    print(posterior.diagnosis)

    style = {"figsize": (6, 6), "textsize": 9, "kde_kwargs": {"contourf_kwargs": {"cmap": "Blues"}}}
    az.plot_pair(data, kind="kde", marginals=True, reference_values=TRUTH, **style)
    plt.savefig(arguments.output, dpi=70)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
