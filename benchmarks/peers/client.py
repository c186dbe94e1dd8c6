"""The parent's half of the line protocol of `workers/protocol.py`."""

import json
import os
import selectors
import subprocess

from benchmarks.peers import environments

WORKERS = environments.HERE / "workers"


class Failure(Exception):  # noqa: N818
    """A worker could not do what it was asked; the message says why."""


class Worker:
    """A process in the environment of one library.

    Raises:
        Failure: if the environment is missing or the process does not answer.
    """

    def __init__(self, name):
        if name != "flowvi" and not environments.is_ready(name):
            raise Failure("no environment; run `python -m benchmarks.peers setup`")
        env = dict(os.environ)
        # An environment has what its requirements say; only flowvi may come from the checkout.
        env.pop("PYTHONPATH", None)
        if name == "flowvi":
            env["PYTHONPATH"] = str(environments.HERE.parent.parent)
        env["JAX_PLATFORMS"] = "cpu"
        self.name = name
        self._process = subprocess.Popen(
            [str(environments.python(name)), "-W", "ignore", str(WORKERS / f"{name}_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            cwd=WORKERS,
        )

    def ask(self, *, timeout=1200, **request):
        """The answer to a request.

        Raises:
            Failure: if there is none in time, the library has no such thing, or it failed.
        """
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._read(timeout)
        except OSError as error:
            raise Failure(f"the process is gone: {error}") from None
        if not line:
            raise Failure(f"the process ended with code {self._process.wait()}")
        reply = json.loads(line)
        if "absent" in reply:
            raise Failure(f"absent: {reply['absent']}")
        if "error" in reply:
            raise Failure(f"failed: {reply['error'].strip().splitlines()[-1]}")
        return reply["answer"]

    def _read(self, timeout):
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout):
                self._process.kill()
                raise Failure(f"no answer in {timeout} s")
        return self._process.stdout.readline()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._process.poll() is None:
            try:
                self._process.stdin.write('{"do": "quit"}\n')
                self._process.stdin.close()
                self._process.wait(10)
            except (OSError, subprocess.TimeoutExpired):
                self._process.kill()
        self._process.wait()
        self._process.stdout.close()
