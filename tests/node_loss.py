"""Run by test_chaos.py in a process of its own: a farm on three nodes, one of which is lost and one joins later."""

import sys
import time
from pathlib import Path

import ray
from fakes import FakeEnv
from farm_parts import fake_farm, job, open_ledger, trials
from ray.cluster_utils import Cluster

from spvla.cluster.connect import _set_environment
from spvla.config import FarmConfig
from spvla.eval.driver import Driver

_set_environment()


class Slow(FakeEnv):
    def step(self, action: object) -> bool:
        time.sleep(0.1)
        return super().step(action)


def env(suite: str, task: int) -> FakeEnv:
    return Slow()


def main(folder: Path) -> None:
    quick = {"health_check_period_ms": 500, "health_check_failure_threshold": 3}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": quick})
    doomed = cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        # num_envs 0: as many as the cluster's CPUs leave, looked at anew every few seconds
        play(cluster, doomed, folder, FarmConfig(num_videos=0, max_failure_videos=0, call_timeout_s=60))
    finally:
        ray.shutdown()
        cluster.shutdown()


def play(cluster: Cluster, doomed: object, folder: Path, config: FarmConfig) -> None:
    wanted = trials(tasks=2, init_states=6)
    lost = joined = False

    def upheaval(driver: Driver) -> None:
        nonlocal lost, joined
        if not lost and len(driver.running) >= 2:
            lost = True
            cluster.remove_node(doomed, allow_graceful=False)
        if not joined and driver.made >= 2:
            joined = True
            cluster.add_node(num_cpus=3)

    with open_ledger(folder, wanted) as ledger, fake_farm(folder, config, open_env=env) as (farm, said):
        Driver(farm, job(wanted), ledger).play(upheaval)
        rows, errors = ledger.trials(), ledger.errors()
    print(*said, sep="\n")
    assert lost and joined
    assert [r.status for r in rows] == ["success"] * 12, rows
    assert [r.steps for r in rows] == [6] * 12
    print(f"{len(rows)} of 12 outcomes, as they must be; {len(errors)} errors; {len(farm.workers.slots)} places")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
