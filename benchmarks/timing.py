"""Timing of compiled functions side by side, their memory, and a description of the machine."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import time


@dataclasses.dataclass
class Program:
    """A compiled function with its arguments.

    Attributes:
        run: runs it once, to the end.
        compile_seconds: what tracing and compiling took.
        memory: bytes of temporaries and results; None where the backend does not say.
    """

    run: object
    compile_seconds: float
    memory: int | None


def compiled(function, *args):
    """Traces and compiles `function` at these arguments, with a fresh `jax.jit`."""
    import jax

    start = time.perf_counter()
    program = jax.jit(lambda *args: function(*args)).lower(*args).compile()
    seconds = time.perf_counter() - start
    return Program(lambda: jax.block_until_ready(program(*args)), seconds, peak_memory(program))


def peak_memory(program):
    """Bytes of temporaries and results of a compiled program, without its arguments."""
    analysis = program.memory_analysis()
    if analysis is None:
        return None
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes


def seconds_of(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved(calls, *, budget, most=50, least=3, time_call=seconds_of):
    """Times several calls in turn, so that a drift of the machine meets all of them alike.

    Every call runs once to warm up, which also says how many repetitions fit into its budget.
    Repetitions of a slow call are spread evenly over the rounds of the others.

    Args:
        calls: dict of name -> function without arguments.
        budget: seconds for the repetitions of one call.
        most, least: bounds on the number of repetitions of a call.
        time_call: call -> seconds.

    Returns:
        dict of name -> {"median", "min", "repeats"}, seconds.
    """
    repeats = {}
    for name, call in calls.items():
        time_call(call)
        repeats[name] = int(min(max(budget / max(time_call(call), 1e-9), least), most))
    rounds = max(repeats.values(), default=0)
    times = {name: [] for name in calls}
    for index in range(rounds):
        for name, call in calls.items():
            due = (index + 1) * repeats[name] // rounds > index * repeats[name] // rounds
            if due:
                times[name].append(time_call(call))
    return {name: summary(values) for name, values in times.items()}


def summary(values):
    """Median, minimum and number of some times."""
    return {"median": statistics.median(values), "min": min(values), "repeats": len(values)}


def processor():
    """The name of the processor."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def num_cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def versions(*names):
    """Versions of distributions; those that are missing are left out."""
    result = {"python": platform.python_version()}
    for name in names:
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            # A checkout that is not installed.
            module = sys.modules.get(name)
            if hasattr(module, "__version__"):
                result[name] = module.__version__
    return result


def environment(*names):
    """Processor, cores, system, date, and versions of distributions."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "cores": num_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions(*names),
    }


def environment_line(env):
    """The environment in one sentence of Markdown."""
    listed = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    return f"{env['processor']}, {env['cores']} cores, {env['system']}, {env['date']}; {listed}."


def table(header, rows):
    """A Markdown table; the first column is text, the others stand to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def number(value, digits=3):
    """A number for reading; a dash where there is none."""
    if value is None:
        return "–"
    if value != 0 and (abs(value) < 1e-2 or abs(value) >= 1e5):
        return f"{value:.1e}"
    return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:.0f}"


def write(path, results, markdown):
    """Writes results as JSON, and as Markdown beside it."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown)
