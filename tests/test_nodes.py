"""Several machines, as processes of one: who works where, and machines that come and go."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from training_parts import DATASET, distance, quick_flags, train_here, weights_of, write_toy_dataset

from spvla import runs
from spvla.data.index import ensure_index

HERE = Path(__file__).resolve().parent


def on_several_nodes(what: str, folder: Path) -> str:
    command = [sys.executable, str(HERE / "nodes.py"), what, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


def test_the_cluster_file_defines_the_resources_that_place_actors() -> None:
    kinds = yaml.safe_load((HERE.parent / "cluster.yaml").read_text())["available_node_types"]
    assert [name for name, kind in kinds.items() if "spvla_env" in kind["resources"]] == ["env"]
    assert [name for name, kind in kinds.items() if "spvla_policy" in kind["resources"]] == ["gpu"]


def test_environments_and_policy_are_placed_by_resource_and_a_new_machine_is_used(tmp_path: Path) -> None:
    assert "on both env machines" in on_several_nodes("farm", tmp_path)


@pytest.mark.slow
def test_training_over_two_machines_survives_the_loss_of_one(tmp_path: Path) -> None:
    write_toy_dataset(tmp_path / "data")
    ensure_index(tmp_path / "data", DATASET)
    assert "one lost" in on_several_nodes("training", tmp_path)
    run = tmp_path / "a"
    assert [row["step"] for row in runs.read_metrics(run)] == list(range(1, 41))
    flags = {"batch_size": 4, "max_steps": 40, "save_steps": 40}
    straight = train_here(quick_flags(tmp_path / "data", tmp_path, run_id="one", **flags))
    assert distance(weights_of(run), weights_of(straight)) < 1e-3
