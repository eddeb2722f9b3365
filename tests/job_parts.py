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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from training_parts import when

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


@dataclass(frozen=True, kw_only=True)
class JobServer:
    """Where `ray job` finds the cluster, and with which token."""

    environment: dict[str, str]
    temp_dir: Path

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


@contextmanager
def job_server(*, num_cpus: int = 2) -> Iterator[JobServer]:
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
    server = JobServer(environment=environment, temp_dir=temp_dir)
    assert server.ray("get-auth-token", "--generate").returncode == 0
    flags = (
        f"--num-cpus={num_cpus} --temp-dir={temp_dir}/ray --port={gcs} --dashboard-host=127.0.0.1 "
        f"--dashboard-port={dashboard} --dashboard-agent-listen-port={agent} --ray-client-server-port={client}"
    )
    head = subprocess.Popen(
        [str(BIN / "ray"), "start", "--head", "--block", *flags.split()],
        env=environment,
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
            process.kill()
        psutil.wait_procs(everyone, timeout=10)
        shutil.rmtree(temp_dir, ignore_errors=True)
