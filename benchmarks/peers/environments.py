"""One virtual environment for each peer, in a cache folder."""

import os
import pathlib
import subprocess
import sys
import venv

HERE = pathlib.Path(__file__).parent
PEERS = ("flowjax", "zuko", "surjectors", "numpyro", "normflows")
#: Those of `benchmarks.simulators`, made where `setup --only` names them.
OF_SIMULATORS = ("sbi",)


def folder():
    """Where the environments are: FLOWVI_BENCH_ENVS, or a folder in the user's cache."""
    default = pathlib.Path.home() / ".cache" / "flowvi-benchmarks"
    return pathlib.Path(os.environ.get("FLOWVI_BENCH_ENVS", default))


def python(name):
    """The interpreter of a library; flowvi runs in the present one."""
    if name == "flowvi":
        return pathlib.Path(sys.executable)
    return folder() / name / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def is_ready(name):
    """Whether the environment exists and holds what the requirements file says."""
    stamp = folder() / name / "requirements.txt"
    wanted = (HERE / f"{name}.txt").read_text()
    return python(name).exists() and stamp.exists() and stamp.read_text() == wanted


def setup(names):
    """Makes the environments that are missing or out of date; returns those that failed."""
    failed = []
    for name in names:
        if is_ready(name):
            print(f"{name}: ready", flush=True)
            continue
        print(f"{name}: installing ...", flush=True)
        where = folder() / name
        requirements = HERE / f"{name}.txt"
        pip = [str(python(name)), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        try:
            venv.create(where, with_pip=True, clear=True)
            subprocess.run([*pip, "-r", str(requirements)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{name}: failed: {error}", flush=True)
            failed.append(name)
            continue
        (where / "requirements.txt").write_text(requirements.read_text())
        print(f"{name}: ready", flush=True)
    return failed
