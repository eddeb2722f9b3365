"""Run by test_nodes.py in a process of its own: a head without CPUs and machines as cluster.yaml describes them."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from fakes import FakeEnv
from farm_parts import fake_farm, job, open_ledger, trials
from ray._private.state import actors
from ray.cluster_utils import Cluster
from training_parts import quick_flags, when

from spvla import runs
from spvla.cluster.connect import _set_environment
from spvla.config import FarmConfig
from spvla.eval.driver import Driver
from spvla.train.run import train

POLICY, ENV = {"spvla_policy": 1000}, {"spvla_env": 1000}


@contextmanager
def cluster() -> Iterator[Cluster]:
    _set_environment()
    quick = {"health_check_period_ms": 500, "health_check_failure_threshold": 3}
    head = {"num_cpus": 0, "resources": {"spvla_driver": 1000}, "_system_config": quick}
    made = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def homes(kind: str) -> list[str]:
    """Node ids of the living actors of a class."""
    alive = [a for a in actors().values() if a["State"] == "ALIVE"]
    return [a["Address"]["NodeID"] for a in alive if a["ActorClassName"].endswith(kind)]


class Slow(FakeEnv):
    def step(self, action: object) -> bool:
        time.sleep(0.1)
        return super().step(action)


def env(suite: str, task: int) -> FakeEnv:
    return Slow()


def farm(folder: Path) -> None:
    """Environments and policy go where their resources are; a machine that joins is used."""
    with cluster() as made:
        policy = made.add_node(num_cpus=1, resources=POLICY)
        first = made.add_node(num_cpus=2, resources=ENV)
        wanted, seen = trials(tasks=2, init_states=50), set()
        joined: list = []

        def look(driver: Driver) -> None:
            if not joined:
                joined.append(made.add_node(num_cpus=2, resources=ENV))
            seen.update(homes("EnvWorker"))
            if len(seen) == 2:
                driver.drop(wanted)  # enough is seen

        config = FarmConfig(num_videos=0, max_failure_videos=0)
        with open_ledger(folder, wanted) as ledger, fake_farm(folder, config, open_env=env) as (running, _):
            Driver(running, job(wanted), ledger).play(look)
            assert set(homes("PolicyServer")) == {policy.node_id}
            assert {row.status for row in ledger.outcomes()} == {"success"} and ledger.errors() == []
        assert seen == {first.node_id, joined[0].node_id}
    print("farm: environments on both env machines, policy on the policy machine")


def training(folder: Path) -> None:
    """Two ranks on two machines; one machine is lost, and its rank goes on elsewhere from the last checkpoint."""
    with cluster() as made:
        machines = {node.node_id: node for node in [made.add_node(num_cpus=1) for _ in range(3)]}
        config = quick_flags(folder / "data", folder, run_id="a", num_workers=2, max_steps=40, save_steps=5)
        ended: list = []
        thread = threading.Thread(target=lambda: ended.append(train(config)), daemon=True)
        thread.start()
        run = folder / "a"
        when(lambda: runs.checkpoints(run), timeout_s=240)
        before = set(homes("RayTrainWorker"))
        assert len(before) == 2, before
        lost = sorted(before)[0]
        made.remove_node(machines[lost], allow_graceful=False)
        at = runs.checkpoints(run)[-1][0]
        when(lambda: (lost not in (now := set(homes("RayTrainWorker"))) and len(now) == 2) or ended, timeout_s=240)
        thread.join(240)
        assert ended and ended[0].step == 40 and at < 40, (ended, at)
    print(f"training: two machines, one lost after step {at}, ended at step 40")


if __name__ == "__main__":
    {"farm": farm, "training": training}[sys.argv[1]](Path(sys.argv[2]))
