"""cluster.yaml, read by Ray's own loader and held against its schema."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def cluster() -> dict[str, Any]:
    return prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))


def test_ray_accepts_the_cluster_file(cluster: dict[str, Any]) -> None:
    validate_config(cluster)


def test_ray_refuses_a_misspelt_key(cluster: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="idle_timeout_minute"):
        validate_config({**cluster, "idle_timeout_minute": 5})


def test_the_head_takes_no_heavy_work_and_the_environments_run_on_spot(cluster: dict[str, Any]) -> None:
    kinds = cluster["available_node_types"]
    assert kinds[cluster["head_node_type"]]["resources"]["CPU"] == 0
    assert kinds["gpu"]["resources"]["GPU"] == 1
    assert kinds["env"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "--dashboard-host=127.0.0.1" in " ".join(cluster["head_start_ray_commands"])
