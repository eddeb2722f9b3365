"""What a cluster may grow to, and that a farm asks for so much and for nothing once it needs it no more."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from farm_parts import VERSION, fake_farm, job, open_ledger, trials
from ray._private.state import actors
from training_parts import when

from spvla.cluster import machines
from spvla.cluster.machines import usable_cpus
from spvla.config import FarmConfig
from spvla.errors import ClusterError, InfrastructureError
from spvla.eval import farm as farm_module
from spvla.eval.driver import Driver
from spvla.eval.farm import Farm, cluster_sizes
from spvla.eval.sizing import sizes

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None) -> dict[str, Any]:
    """As on the head of a cluster that `ray up cluster.yaml` made, with no worker yet and none that ever comes."""
    home = tmp_path / "home"
    home.mkdir()
    (home / machines.BOOTSTRAP).write_text((ROOT / "cluster.yaml").read_text())
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.mark.parametrize(
    ("cpus", "gpus", "envs", "decoders", "expected"),
    [
        (256, 4, 0, 0, (32, 1, 0.99, "cuda")),  # what keeps one GPU busy, not all that could be had
        (256, 4, 0, 3, (96, 3, 0.99, "cuda")),
        (256, 4, 128, 4, (128, 4, 0.99, "cuda")),
        (256, 4, 512, 4, (512, 4, 0.49, "cuda")),  # more than may ever come share the CPUs
        (8, 0, 0, 0, (8, 1, 0.99, "cpu")),
        (float("inf"), 0, 128, 0, (128, 1, 0.99, "cpu")),
    ],
)
def test_where_machines_come_on_demand_the_flags_are_the_demand(
    cpus: float, gpus: int, envs: int, decoders: int, expected: tuple
) -> None:
    s = sizes(cpus=cpus, gpus=gpus, num_envs=envs, num_decoders=decoders, on_demand=True)
    assert (s.envs, s.decoders, s.env_cpus, s.device) == expected


def test_every_worker_that_the_cluster_file_allows_may_be_started() -> None:
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    may_come = machines.startable(cluster)
    assert sum("spvla_env" in m for m in may_come) == cluster["available_node_types"]["env"]["max_workers"]
    assert sum(m.get("GPU", 0) for m in may_come) == cluster["available_node_types"]["gpu"]["max_workers"]
    assert not [m for m in may_come if "spvla_driver" in m]
    assert machines.startable({}) == []
    assert len(machines.startable({**cluster, "max_workers": 1})) == 2  # one of each kind at most


def test_a_farm_counts_with_machines_that_may_be_started(promised: dict[str, Any]) -> None:
    assert machines.grows()
    assert cluster_sizes(FarmConfig()) == sizes(cpus=256, gpus=4, num_envs=0, num_decoders=0, on_demand=True)
    assert machines.request_for("spvla_env") == {"spvla_env": 0.01}
    assert machines.request_for("nothing") == {}
    machines.require_resources("four workers", GPU=4)
    with pytest.raises(ClusterError, match="4 GPU in all at its largest; expected at least 5 GPU for five workers"):
        machines.require_resources("five workers", GPU=5)


def test_a_cluster_of_the_commands_own_grows_by_nothing(
    promised: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS")
    assert not machines.grows()
    assert machines.total("GPU") == 0


def test_under_kuberay_only_an_autoscaled_cluster_grows(monkeypatch: pytest.MonkeyPatch, ray_cluster: None) -> None:
    monkeypatch.setenv("KUBERAY_GEN_RAY_START_CMD", "ray start --head --num-cpus=0 ")
    assert not machines.grows()
    monkeypatch.setenv("KUBERAY_GEN_RAY_START_CMD", "ray start --head --no-monitor --num-cpus=0 ")
    assert machines.grows() and machines.unbounded()
    assert cluster_sizes(FarmConfig(num_envs=64)).env_cpus == 0.99  # a CPU each: the autoscaler brings what is missing
    machines.require_resources("anything", GPU=100)


def waiting() -> dict[str, int]:
    """Actors of the farm that no machine has taken in, by class."""
    found = [a["ActorClassName"] for a in actors().values() if a["State"] == "PENDING_CREATION"]
    return {kind: n for kind in ("EnvWorker", "PolicyServer") if (n := sum(kind in name for name in found))}


def tended(farm: Farm, wanted: dict[str, int]) -> None:
    when(lambda: farm.maintain() or waiting() == wanted, timeout_s=30)


def test_a_farm_asks_for_all_it_wants_at_once_and_takes_back_what_it_needs_no_more(
    promised: dict[str, Any], tmp_path: Path
) -> None:
    config = FarmConfig(num_envs=12, num_decoders=2)
    with fake_farm(tmp_path, config, start=False) as (farm, _):
        tended(farm, {"EnvWorker": 12, "PolicyServer": 2})
        farm.trials_left = 1
        tended(farm, {"EnvWorker": 1, "PolicyServer": 1})
    when(lambda: waiting() == {}, timeout_s=30)


def test_a_farm_that_gets_no_machine_says_so_at_last(
    promised: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("MACHINE_WAIT_S", 3.0), ("SAY_AFTER_S", 0.5), ("RESIZE_EVERY_S", 0.2)):
        monkeypatch.setattr(farm_module, name, seconds)
    with fake_farm(tmp_path, FarmConfig(num_envs=2), start=False) as (farm, said):
        with pytest.raises(InfrastructureError, match="no machine took in any policy actor within 3 s; `ray status`"):
            farm.start([VERSION])
        assert said == ["waiting for room on the cluster: 2 environments, 1 policy actors"]


def test_a_farm_waits_for_cpus_that_others_hold(tmp_path: Path, ray_cluster: None) -> None:
    class Holder:
        pass

    holder = ray.remote(num_cpus=4)(Holder).remote()
    ray.get(holder.__ray_ready__.remote())
    wanted = trials(tasks=1, init_states=4)
    config = FarmConfig(num_envs=2, num_videos=0, max_failure_videos=0)
    with open_ledger(tmp_path, wanted) as ledger, fake_farm(tmp_path, config, start=False) as (farm, _):
        tended(farm, {"EnvWorker": 2, "PolicyServer": 1})
        ray.kill(holder)
        farm.start([VERSION])
        Driver(farm, job(wanted), ledger).play()
        assert [r.status for r in ledger.trials()] == ["success"] * 4


def test_a_process_counts_the_cpus_that_it_may_use_not_those_of_the_machine(tmp_path: Path) -> None:
    ask = "from spvla.cluster.machines import usable_cpus; print(usable_cpus())"
    one = str(min(os.sched_getaffinity(0)))
    done = subprocess.run(["taskset", "-c", one, sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


@pytest.mark.parametrize(("quota", "cpus"), [("150000 100000", 1), ("50000 100000", 1), ("max 100000", None)])
def test_a_containers_quota_counts_too(tmp_path: Path, quota: str, cpus: int | None) -> None:
    (tmp_path / "slice/job").mkdir(parents=True)
    (tmp_path / "slice/cpu.max").write_text(quota + "\n")
    (tmp_path / "slice/job/cpu.max").write_text("max 100000\n")
    (tmp_path / "own").write_text("0::/slice/job\n")
    assert usable_cpus(tmp_path, tmp_path / "own") == (cpus or len(os.sched_getaffinity(0)))
