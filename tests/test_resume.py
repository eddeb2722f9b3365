"""Training state survives a trip to disk bit for bit, and a checkpoint is whole or absent."""

from pathlib import Path

import numpy as np
import pytest
import torch

from spvla import runs
from spvla.errors import CheckpointError
from spvla.train.resume import commit, load_state, save_state, sweep_out


def test_state_comes_back_bit_for_bit_with_its_key_types(tmp_path: Path) -> None:
    odd = torch.tensor([float("nan"), -0.0, 1e-45, float("inf")])
    shared = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    state = {
        "adam": {0: {"exp_avg": odd, "step": torch.tensor(3.0)}, 7: {"exp_avg": shared.T, "step": shared}},
        "betas": (0.9, 0.999),
        "groups": [{"lr": 1e-45, "params": [0, 7], "fused": None, "amsgrad": False}],
        "generator": {"state": 2**127 + 1, "name": "PCG64"},
        "order": np.arange(4, dtype=np.int64),
    }
    save_state(tmp_path, state)
    back = load_state(tmp_path)
    assert list(back["adam"]) == [0, 7]
    assert back["adam"][0]["exp_avg"].view(torch.int32).tolist() == odd.view(torch.int32).tolist()
    assert torch.equal(back["adam"][7]["exp_avg"], shared.T)
    assert back["adam"][7]["exp_avg"].dtype == torch.bfloat16
    assert back["betas"] == (0.9, 0.999)
    assert back["groups"] == state["groups"]
    assert back["generator"] == state["generator"]
    assert back["order"].tolist() == [0, 1, 2, 3] and back["order"].dtype == np.int64


def test_a_truncated_state_is_named_with_a_remedy(tmp_path: Path) -> None:
    save_state(tmp_path, {"x": torch.zeros(100)})
    path = tmp_path / "training_state.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="Delete this folder"):
        load_state(tmp_path)


def write_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def test_a_checkpoint_that_fails_half_way_leaves_the_one_before(tmp_path: Path) -> None:
    commit(tmp_path, 10, write_adapter, only_latest=True)

    def fail(folder: Path) -> None:
        write_adapter(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        commit(tmp_path, 20, fail, only_latest=True)
    assert [step for step, _ in runs.checkpoints(tmp_path)] == [10]


def test_only_the_latest_checkpoint_is_kept_when_asked(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        commit(tmp_path, step, write_adapter, only_latest=step == 30)
    assert [step for step, _ in runs.checkpoints(tmp_path)] == [30]


def test_what_a_killed_writer_left_is_swept_out(tmp_path: Path) -> None:
    commit(tmp_path, 10, write_adapter, only_latest=True)
    debris = tmp_path / "checkpoints" / ".step_000020.4242.tmp"
    debris.mkdir()
    sweep_out(tmp_path)
    assert not debris.exists()
    assert runs.latest_checkpoint(tmp_path) is not None
