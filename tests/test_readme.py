"""The README's samples run as pasted, in order, in one namespace."""

import pathlib
import re

import matplotlib
import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.compilations(2000)
@pytest.mark.filterwarnings("ignore::flowvi.PosteriorWarning")
def test_samples_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 4
    namespace = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert {path.name for path in tmp_path.iterdir()} >= {"ring.png", "ring.flowvi", "heights.png"}
    assert namespace["given"].sample(namespace["key"], 3, [50.0]).shape == (3, 1)
    assert float(namespace["positive"].sample(namespace["key"], 100).min()) > 0
