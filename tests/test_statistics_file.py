"""Statistics that no policy can act by are refused when it is described, with the data set and the field."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spvla.errors import CheckpointError, DatasetError
from spvla.eval.plan import describe
from spvla.policies.presets import create_preset
from spvla.policies.statistics import require_statistics

ACTION = {
    "q01": [-0.5, -0.4, -0.3, -0.1, -0.1, -0.2, 0.0],
    "q99": [0.5, 0.4, 0.3, 0.1, 0.1, 0.2, 1.0],
    "mask": [True] * 6 + [False],
}


def action(**changes: Any) -> dict[str, Any]:
    return {"libero_spatial": {"action": {k: v for k, v in {**ACTION, **changes}.items() if v is not None}}}


WRONG = {
    "a list on top": ([1, 2], "holds .*1, 2", "dictionary"),
    "an entry that is a number": ({"libero_spatial": 1}, "holds 1 at libero_spatial", "dictionary"),
    "no action": ({"libero_spatial": {"proprio": {}}}, "has no libero_spatial.action", "required"),
    "a bimanual robot's": (action(q01=[0.0] * 14), r"libero_spatial\.action\.q01", "7 items"),
    "min and max alone": (action(q01=None, q99=None, min=[0.0] * 7), r"has no libero_spatial\.action\.q01", "required"),
    "NaN": (action(q99=[math.nan] + [1.0] * 6), r"holds nan at libero_spatial\.action\.q99\.0", "finite"),
    "null": (action(q99=[1.0] * 6 + [None]), r"holds None at libero_spatial\.action\.q99\.6", "number"),
    "a text": (action(q01=["0"] * 7), r"holds '0' at libero_spatial\.action\.q01\.0", "number"),
    "a number for a list": (action(q99=1.0), r"holds 1.0 at libero_spatial\.action\.q99", "list"),
    "a short mask": (action(mask=[True]), r"libero_spatial\.action\.mask", "7 items"),
    "percentiles the wrong way round": (
        action(q01=[0.9, *ACTION["q01"][1:]]),
        r"q01 0\.9 above q99 0\.5 in dimension 0 at libero_spatial\.action",
        "1st percentile",
    ),
    "nothing that varies": (action(q01=[0.0] * 7, q99=[0.0] * 6 + [1.0]), "q01 equal to q99", "vary"),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    create_preset(folder, "tiny")
    return folder


def in_a_file_beside(folder: Path, stats: Any) -> None:
    (folder / "dataset_statistics.json").write_text(json.dumps(stats))


def in_the_config(folder: Path, stats: Any) -> None:
    (folder / "dataset_statistics.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "norm_stats": stats}))


@pytest.mark.parametrize("put", [in_a_file_beside, in_the_config])
@pytest.mark.parametrize("case", WRONG)
def test_a_policy_is_not_described_by(case: str, put: Callable[[Path, Any], None], tiny: Path) -> None:
    stats, got, expected = WRONG[case]
    put(tiny, stats)
    with pytest.raises(CheckpointError, match=got) as e:
        describe(str(tiny))
    put(tiny, action())
    assert describe(str(tiny)).description.has_statistics
    assert expected in e.value.expected and str(tiny) in e.value.got and e.value.remedy


def test_a_dimension_that_never_varies_is_data() -> None:
    still = action(q01=[0.0, *ACTION["q01"][1:]], q99=[0.0, *ACTION["q99"][1:]])
    assert require_statistics(still, "here") == still
    assert require_statistics({}, "here") == {}


def test_the_error_is_the_callers() -> None:
    with pytest.raises(DatasetError, match="there holds 1 at a.*Index it again"):
        require_statistics({"a": 1}, "there", error=DatasetError, remedy="Index it again.")
