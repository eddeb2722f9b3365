"""Which machines the connected cluster has, and which more its autoscaler may start for whoever asks.

Who asks is Ray itself: an actor, a task or a placement group that finds no room is demand, which the autoscaler sees
and which ends with the driver that made it. So commands ask for what they want, up to what may come to be, and wait.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any

import ray
import yaml

from spvla.errors import ClusterError

Resources = dict[str, float]  # of one machine

BOOTSTRAP = "ray_bootstrap_config.yaml"  # `ray up` leaves it in the head's home, where drivers run
HEAD = "node:__internal_head__"


def grows() -> bool:
    """Whether machines may join later: in a cluster made by `ray up`, or under KubeRay with autoscaling."""
    return bool(_bootstrap()) or unbounded()


def unbounded() -> bool:
    """Under KubeRay, machines may join, but how many and of which kind is not told inside."""
    return "--no-monitor" in os.environ.get("KUBERAY_GEN_RAY_START_CMD", "")  # set where it autoscales


def machines() -> list[Resources]:
    """Those that are there; in a cluster made by `ray up`, its head and every worker that may be started."""
    there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    workers = startable(_bootstrap())
    return [m for m in there if HEAD in m] + workers if workers else there


def startable(bootstrap: dict[str, Any]) -> list[Resources]:
    """The workers of a cluster.yaml, each kind as often as it may be started."""
    most = bootstrap.get("max_workers", 0)
    return [
        kind.get("resources", {})
        for name, kind in bootstrap.get("available_node_types", {}).items()
        if name != bootstrap["head_node_type"]
        for _ in range(min(most, kind.get("max_workers", most)))
    ]


def total(resource: str) -> float:
    return sum(machine.get(resource, 0) for machine in machines())


def cpus_for(resource: str) -> float:
    """CPUs of the machines with this custom resource (cluster.yaml); of all machines where none has it."""
    every = machines()
    return sum(machine.get("CPU", 0) for machine in [m for m in every if resource in m] or every)


def request_for(resource: str) -> Resources:
    """A request that only machines with this custom resource can meet, on a cluster that has any."""
    return {resource: 0.01} if any(resource in m for m in machines()) else {}


def cpus_to_use() -> int:
    """The CPUs that are there; where there are none yet, those of the largest machine without a GPU that may come."""
    there = ray.cluster_resources().get("CPU", 0)
    return int(there or max((m.get("CPU", 0) for m in machines() if not m.get("GPU")), default=0)) or 1


def usable_cpus(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """CPUs of this machine that this process may use: what taskset or SLURM leaves it, and its container's quota."""
    count = float(len(os.sched_getaffinity(0)))
    lines = own.read_text().splitlines() if own.exists() else []
    place = next((line.removeprefix("0::").strip("/") for line in lines if line.startswith("0::")), "")
    for group in (cgroups / place, *(cgroups / place).parents):
        if group.is_relative_to(cgroups) and (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
            count = min(count, float("inf") if quota == "max" else int(quota) / int(period))
    return max(1, int(count))


def require_resources(what: str, **needed: float) -> None:
    """Raises ClusterError where the cluster lacks what `what` needs and cannot grow so far: Ray would wait for ever."""
    held = {name: total(name) for name in needed}
    short = [f"{held[name]:g} {name}" for name, count in needed.items() if held[name] < count]
    if short and not unbounded():
        wanted = " and ".join(f"{count:g} {name}" for name, count in needed.items())
        raise ClusterError(
            f"a cluster with {' and '.join(short)} in all{' at its largest' if grows() else ''}",
            expected=f"at least {wanted} for {what}",
            remedy="Ask for less, or add machines to the cluster.",
        )


def _bootstrap() -> dict[str, Any]:
    """The cluster.yaml that `ray up` made this cluster of; empty on a cluster made otherwise."""
    path = Path.home() / BOOTSTRAP
    joined = "RAY_ADDRESS" in os.environ or "RAY_JOB_ID" in os.environ  # rather than started by this command
    return _read(path, path.stat().st_mtime_ns) if joined and path.exists() else {}


@cache
def _read(path: Path, mtime_ns: int) -> dict[str, Any]:
    """Once for each version of the file: a farm looks every few seconds."""
    return yaml.safe_load(path.read_text())
