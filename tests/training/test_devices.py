"""More than one device: what is refused, and that results are those of one."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from flowvi import devices
from flowvi.training import loop
from tests.tolerances import FLOAT64
from tests.training.helpers import rows, run

ROOT = pathlib.Path(__file__).parents[2]


def start(*args):
    command = [sys.executable, "-W", "ignore", "-m", "tests.training.on_devices", *args]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)


def output(process):
    found, _ = process.communicate(timeout=240)
    assert process.returncode == 0
    return json.loads(found.splitlines()[-1])


@pytest.mark.slow
def test_parameters_on_four_devices_are_those_on_one():
    found = output(start())
    fits = {"density", "path", "iwelbo", "leave one out", "local", "resumed"}
    assert set(found) == fits | {"evaluate", "weights"}
    assert max(found.values()) < FLOAT64, found


@pytest.mark.slow
def test_two_processes_do_one_fit(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [start(address, str(number), "2", str(tmp_path)) for number in range(2)]
    first, second = map(output, processes)
    assert first["params"] == second["params"]
    assert first["first"] == second["first"] < 200
    assert first["calls"] > 0 == second["calls"]
    for found in (first, second):
        assert "all processes must `fit` the same" in found["refused"]
        assert "batch_size" in found["refused"]


def test_a_mesh_that_is_none_is_refused_by_name():
    with pytest.raises(TypeError, match="`mesh` must be a positive integer"):
        run(data=rows(), mesh="four")
    with pytest.raises(ValueError, match=r"`mesh` must be at most the number of devices, 1; got 4"):
        run(data=rows(), mesh=4)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("model",))
    with pytest.raises(ValueError, match=r'`mesh` must have an axis "data".*model'):
        run(data=rows(), mesh=mesh)


def test_a_mesh_of_one_device_changes_nothing():
    mesh = jax.make_mesh((1,), ("data",))  # whose axis is an explicit one
    alone, over = run(data=rows(), batch_size=7), run(data=rows(), batch_size=7, mesh=mesh)
    np.testing.assert_array_equal(alone.params["mean"], over.params["mean"])
    with jax.set_mesh(mesh):
        ambient = run(data=rows(), batch_size=7)
    np.testing.assert_array_equal(alone.params["mean"], ambient.params["mean"])
    assert not ambient.params["mean"].committed


def test_nothing_is_split_without_a_mesh():
    tree = {"x": np.ones((5, 2)), "nothing": None}
    assert devices.split(tree) is tree
    assert devices.placed(tree) is tree
    assert devices.agreed(3) == 3 and devices.is_first()


def test_rows_in_chunks_are_rows_at_once():
    x = {"x": np.arange(14.0).reshape(7, 2)}
    found = jax.jit(lambda x: devices.in_chunks(lambda rows: rows["x"].sum(-1), x, 3))(x)
    np.testing.assert_array_equal(found, x["x"].sum(-1))


def test_what_processes_do_not_share_is_named(monkeypatch):
    other = {"the key": "1", "num_rows": "60"}
    monkeypatch.setattr(devices, "of_all", lambda own: [own, other])
    with pytest.raises(ValueError, match=r"all processes must `fit` the same.*process 1.*num_rows"):
        loop._check_alike({"the key": "1", "num_rows": "50"})


def test_a_process_that_is_lost_ends_the_others(monkeypatch):
    def lose():
        with devices.lost_named():
            raise jax.errors.JaxRuntimeError("connection closed by peer")

    with pytest.raises(jax.errors.JaxRuntimeError, match="closed by peer"):
        lose()
    monkeypatch.setattr(devices, "are_many", lambda: True)
    with pytest.raises(RuntimeError, match=r"Another process of this fit has ended.*resume=True"):
        lose()
