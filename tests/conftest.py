import os

import jax
import pytest
from hypothesis import settings

if jax.__version_info__ < (0, 11):
    # Most of the time of the suite goes into compilation; this halves it for small programs.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false".strip()


# An example takes as long as its compilation, and a run of CI should be the same twice.
settings.register_profile("flowvi", deadline=None, derandomize=True)
settings.load_profile("flowvi")


@pytest.fixture
def x64():
    """Enables 64-bit types for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def quick_compilation(request):
    """Compiles with few optimizations: most programs of the suite run once or twice.

    Examples, benchmarks and doctests see the optimizations that users see, and so does a test with
    the marker `optimized`.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", "optimized" not in request.keywords)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Drops compiled programs after each module.

    Each one holds pieces of memory of which a process may have only so many (65,530 on Linux), and
    the compiler crashes where there are no more.
    """
    yield
    jax.clear_caches()
