"""Settings of the whole suite: precision, compilation and its budget."""

import gc
import os

import jax
import jax.monitoring
import pytest
from hypothesis import settings

if jax.__version_info__ < (0, 11):
    # Most of the time of the suite goes into compilation; these halve it for small programs.
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()

# Tracing makes many objects and few cycles; what is imported stays.
gc.set_threshold(100_000, 50, 100)

# An example takes as long as its compilation, and a run of CI should be the same twice.
settings.register_profile("flowvi", deadline=None, derandomize=True)
settings.load_profile("flowvi")

#: Programs that a test may compile, with its fixtures, unless it has the marker `compilations`.
BUDGET = 40

#: Pieces of memory at which programs are dropped. A program holds up to hundreds; a process may
#: have 65,530 on Linux, and the compiler crashes where there are no more.
MOST_MAPS = 25_000

_compiled = [0]


def _count(event, duration, **kwargs):
    del duration, kwargs
    _compiled[0] += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_count)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """Remembers how many programs were compiled before a test and its fixtures."""
    del nextitem
    item.stash[_BEFORE] = _compiled[0]
    return (yield)


_BEFORE = pytest.StashKey[int]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Fails a test that compiles more programs than it may."""
    result = yield
    marker = item.get_closest_marker("compilations")
    budget = BUDGET if marker is None else marker.args[0]
    count = _compiled[0] - item.stash[_BEFORE]
    if count > budget:
        pytest.fail(
            f"{count} programs were compiled, more than {budget}. Put the body into one jitted "
            "function, make inputs with numpy, share what is compiled; or say "
            f"`@pytest.mark.compilations({count})`."
        )
    return result


def pytest_collection_finish():
    """Leaves what is imported out of every collection of garbage."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter, config):
    """Says how many programs all tests have compiled."""
    total = getattr(config, "total_compilations", _compiled[0])
    terminalreporter.write_line(f"{total} programs compiled")


def pytest_sessionfinish(session):
    """Hands the count of a worker to the process that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["compiled"] = _compiled[0]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Adds up the counts of the workers."""
    del error
    count = getattr(node, "workeroutput", {}).get("compiled", 0)
    node.config.total_compilations = getattr(node.config, "total_compilations", 0) + count


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
    """Drops compiled programs after a module where there are many."""
    yield
    try:
        with open("/proc/self/maps") as maps:
            count = sum(1 for _ in maps)
    except OSError:  # not on Linux
        return
    if count > MOST_MAPS:
        jax.clear_caches()
