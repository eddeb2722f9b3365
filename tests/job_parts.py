"""A cluster as `ray start` makes it, with a home, ports and a token of its own; only its own processes are ended."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE
from training_parts import when

from spvla.cluster.machines import BOOTSTRAP

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


@dataclass(frozen=True, kw_only=True)
class JobServer:
    """Where `ray job` finds the cluster, and with which token."""

    environment: dict[str, str]
    temp_dir: Path
    address: str

    def ray(self, *args: str, timeout_s: float = 180) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / "ray"), *args]
        return subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def submit(self, name: str, script: str, *flags: str, runtime_env: str = "{}") -> None:
        """As the documentation says, without waiting for the end."""
        done = self.ray(
            *("job", "submit", "--no-wait", "--submission-id", name, "--working-dir", "."),
            *("--runtime-env-json", runtime_env, "--", "python", f"ray_jobs/{script}.py", *flags),
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def ask(self, path: str) -> Any:
        """The job server's own answer, as `ray job` reads it, without its start of several seconds."""
        token = (Path(self.environment["HOME"]) / ".ray" / "auth_token").read_text().strip()
        url = f"{self.environment['RAY_API_SERVER_ADDRESS']}/api/{path}"
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def up(self) -> bool:
        try:
            return self.ask("jobs/") == []
        except (OSError, ValueError):
            return False

    def status(self, name: str) -> str:
        return self.ask(f"jobs/{name}")["status"]

    def logs(self, name: str) -> str:
        return self.ray("job", "logs", name).stdout

    def wait(self, name: str, *, timeout_s: float = 180) -> str:
        when(lambda: self.status(name) in ("SUCCEEDED", "FAILED", "STOPPED"), timeout_s=timeout_s)
        return self.status(name)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def grown_by_ray(home: Path, address: str, kinds: dict[str, Any]) -> dict[str, str]:
    """Makes the cluster one that starts machines of these kinds as processes here, and ends them after 6 idle seconds.

    Ray's own autoscaler and raylets; only its provider pretends. Returns what the head needs in its environment.
    """
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "head_node_id": FAKE_HEAD_NODE_ID,
        "gcs_address": address,
        "launch_multiple": True,
    }
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    commands = ("setup_commands", "initialization_commands", "head_start_ray_commands", "worker_start_ray_commands")
    config = {
        "cluster_name": "test",
        "max_workers": 8,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 10.0,
        "provider": provider,
        "available_node_types": {FAKE_HEAD_NODE_TYPE: head} | {k: v | {"node_config": {}} for k, v in kinds.items()},
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        **{name: [] for name in (*commands, "head_setup_commands", "worker_setup_commands", "cluster_synced_files")},
        **{"auth": {}, "file_mounts": {}, "file_mounts_sync_continuously": False},
    }
    (home / BOOTSTRAP).write_text(json.dumps(config))
    return {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",  # as `ray up` does
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "RAY_NODE_TYPE_NAME": FAKE_HEAD_NODE_TYPE,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }


@contextmanager
def job_server(*, num_cpus: int = 2, kinds: dict[str, Any] | None = None) -> Iterator[JobServer]:
    """A cluster of one machine; with `kinds` (available_node_types), one that starts more for who asks."""
    temp_dir = Path(tempfile.mkdtemp(prefix="spvla-job-"))  # short: Ray's socket paths have 107 bytes
    gcs, dashboard, agent, client = free_ports(4)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "TUNE_"))} | {
        "HOME": str(temp_dir / "home"),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "SPVLA_CACHE": str(Path(os.environ.get("SPVLA_CACHE", Path.home() / ".cache" / "spvla"))),
        "OMP_NUM_THREADS": "1",
        "RAY_JOB_STOP_WAIT_TIME_S": "60",  # Ray's own 3 s are too short to save a large policy
    }
    (temp_dir / "home").mkdir()
    address = f"{ray.util.get_node_ip_address()}:{gcs}"
    server = JobServer(environment=environment, temp_dir=temp_dir, address=address)
    assert server.ray("get-auth-token", "--generate").returncode == 0
    flags = (
        f"--num-cpus={num_cpus} --temp-dir={temp_dir}/ray --port={gcs} --dashboard-host=127.0.0.1 "
        f"--dashboard-port={dashboard} --dashboard-agent-listen-port={agent} --ray-client-server-port={client}"
    )
    growing = grown_by_ray(temp_dir / "home", address, kinds) if kinds else {}
    if kinds:
        flags += f" --autoscaling-config={temp_dir}/home/{BOOTSTRAP}"
    head = subprocess.Popen(
        [str(BIN / "ray"), "start", "--head", "--block", *flags.split()],
        env=environment | growing,
        stdout=(temp_dir / "head.log").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        when(lambda: head.poll() is not None or server.up())
        assert head.poll() is None, (temp_dir / "head.log").read_text()
        yield server
    finally:
        everyone = [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]
        for process in everyone:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(everyone, timeout=10)
        shutil.rmtree(temp_dir, ignore_errors=True)
