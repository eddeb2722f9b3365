"""The quick start's notebook runs as it stands, and its trial is a success."""

import json
import sys
from pathlib import Path
from types import ModuleType

import matplotlib
import numpy as np
import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "quickstart.ipynb"


@pytest.fixture
def display(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What a notebook has and these tests do not: IPython's way to show a film."""
    module = ModuleType("IPython.display")
    module.Video = lambda name, embed: (name, embed)
    outer = ModuleType("IPython")
    outer.get_ipython, outer.version_info = (lambda: None), (9, 0)  # matplotlib asks whether it draws for one
    monkeypatch.setitem(sys.modules, "IPython", outer)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return module


def test_the_notebook_plays_a_trial_to_its_success(
    display: ModuleType, real_assets: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIBERO_ASSETS", raising=False)  # the real objects, as a notebook finds them
    matplotlib.use("Agg")
    names: dict[str, object] = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["outcome"].status == "success"
    assert (tmp_path / "film.mp4").stat().st_size > 10_000
    probabilities = names["probabilities"]
    assert probabilities.shape == (1, 8, 7, 256)
    assert np.allclose(probabilities.sum(-1), 1, atol=1e-5) and probabilities.max() > 0.05
