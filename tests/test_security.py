"""The promises of docs/operations.md about security, each with its test. (Escaping in reports: test_report.py.)"""

import ast
import json
import os
import pickle
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import psutil
import pytest
import yaml
from training_parts import flags_of, quick_flags, write_toy_dataset

from spvla import cli
from spvla.config import SelfplayConfig, SweepConfig
from spvla.data import layout
from spvla.data.index import ensure_index
from spvla.errors import UserError
from spvla.eval.logfile import log_name
from spvla.policies.registry import load_policy
from spvla.sweep.folder import sweep_id, trial_config
from spvla.train.prepare import datasets_of, run_id
from spvla.train.selfplay import selfplay_id

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*(ROOT / "spvla").rglob("*.py"), *(ROOT / "ray_jobs").glob("*.py")])
HOSTILE = ("../up", "a/../../b", "/etc/passwd", "a\nb", "a\x00b", "a\x1b[2Jb", "..", ".", "a/b", "a\\..\\b")


@pytest.mark.parametrize("name", HOSTILE, ids=repr)
def test_a_name_cannot_leave_its_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--run_id"):
        run_id(quick_flags(tmp_path, tmp_path, run_id=name))
    with pytest.raises(UserError, match="--run_id"):
        selfplay_id(SelfplayConfig(run_id=name))
    noted = quick_flags(tmp_path, tmp_path, run_id_note=name)
    try:
        assert (tmp_path / run_id(noted)).resolve().parent == tmp_path
        assert run_id(noted).isprintable()
    except UserError as e:
        assert "--run_id_note" in str(e)
    with pytest.raises(UserError, match="--dataset_name"):
        datasets_of(name)
    with pytest.raises(UserError, match="--run_id"):
        sweep_id(SweepConfig(space={"beta": "1,2"}, train=quick_flags(tmp_path, tmp_path, run_id=name)))
    try:
        mine = trial_config(quick_flags(tmp_path, tmp_path), tmp_path, {"vla_path": name})
    except UserError as e:
        assert "trial name" in str(e)
    else:
        assert (mine.run_root_dir / run_id(mine)).resolve().parent == tmp_path / "trials"


@pytest.mark.parametrize("name", HOSTILE, ids=repr)
def test_a_data_set_is_looked_for_in_its_folder_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / "up").mkdir()
    with pytest.raises(UserError):
        layout.find(tmp_path / "data", name)


@pytest.mark.parametrize("name", HOSTILE, ids=repr)
def test_a_note_cannot_move_the_log(name: str, tmp_path: Path) -> None:
    try:
        written = tmp_path / log_name("libero_goal", at=datetime.now(), note=name)
    except UserError as e:
        assert "run_id_note" in str(e)
    else:
        assert written.resolve().parent == tmp_path and written.name.isprintable()


class Boom:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("pickle-was-run",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
def test_pickled_weights_are_refused_and_not_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "config.json").write_text("{}")
    if name.startswith("adapter"):
        (tmp_path / "p" / "adapter_config.json").write_text('{"base_model_name_or_path": "p"}')
    (tmp_path / "p" / name).write_bytes(pickle.dumps(Boom()))
    with pytest.raises(UserError):
        load_policy(tmp_path / "p")
    assert not (tmp_path / "pickle-was-run").exists()


def test_no_source_trusts_remote_code_or_loads_pickles() -> None:
    """`torch.load(weights_only=True)` knows torch's and numpy's types alone; nothing else that unpickles is used."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if keywords.get("trust_remote_code", "False") != "False":
                found.append(f"{path.name}: trust_remote_code")
            if called in ("pickle.load", "pickle.loads", "joblib.load", "dill.load", "eval", "exec", "os.system"):
                found.append(f"{path.name}: {called}")
            if called == "torch.load" and keywords.get("weights_only") != "True":
                found.append(f"{path.name}: torch.load of anything")
            if called in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False":
                found.append(f"{path.name}: numpy pickles")
            if keywords.get("shell", "False") != "False":
                found.append(f"{path.name}: a shell")
            if called == "yaml.load" and "Safe" not in ast.unparse(node):
                found.append(f"{path.name}: yaml.load")
    assert found == []


def test_clusters_that_we_start_or_describe_show_their_dashboard_to_this_machine_alone() -> None:
    described = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    starts = [
        line for key in ("head", "worker") for line in described[f"{key}_start_ray_commands"] if "ray start" in line
    ]
    assert all("RAY_AUTH_MODE=token" in line for line in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "dashboard_host":
                assert ast.unparse(node.value) == "'127.0.0.1'", path


# A cluster of our own, in a home of its own

PROBE = """
import os, stat, json, pathlib
from spvla.cluster.connect import connection
with connection(num_cpus=1):
    import psutil, ray
    me = psutil.Process()
    listening = [
        (c.laddr.port, c.laddr.ip) for p in me.children(recursive=True)
        for c in p.net_connections("tcp") if c.status == "LISTEN"
    ]
    page = int(ray._private.worker._global_node.webui_url.rsplit(":", 1)[1])  # its metrics are on another port
    dashboard = [ip for port, ip in listening if port == page]
    token = pathlib.Path.home() / ".ray" / "auth_token"
    print("FACTS", json.dumps({"mode": stat.S_IMODE(token.stat().st_mode), "dashboard": dashboard,
                               "auth": os.environ["RAY_AUTH_MODE"], "usage": os.environ["RAY_USAGE_STATS_ENABLED"]}))
"""


def test_a_cluster_of_ours_asks_for_a_token_that_only_its_user_reads(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    out = subprocess.run(
        [sys.executable, "-c", PROBE],
        env=environment | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    ).stdout
    facts = json.loads(next(line for line in out.splitlines() if line.startswith("FACTS")).removeprefix("FACTS"))
    assert stat.filemode(facts["mode"]) == "?rw-------"
    assert facts["auth"] == "token" and facts["usage"] == "0"
    assert set(facts["dashboard"]) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert facts["dashboard"]


# Keys

KEY = "0123456789abcdef" * 2 + "deadbeef"


def command_lines(process: psutil.Process) -> Iterator[str]:
    """Of a process and all that it has started."""
    for each in (process, *process.children(recursive=True)):
        with suppress(psutil.Error):
            yield " ".join(each.cmdline())


@pytest.mark.slow
def test_keys_reach_no_file_no_output_and_no_command_line_and_a_run_stays_in_its_folder(tmp_path: Path) -> None:
    write_toy_dataset(tmp_path / "data", name="libero_object_no_noops")
    ensure_index(tmp_path / "data", "libero_object_no_noops")
    (tmp_path / "here").mkdir()
    names = {"data": tmp_path / "data", "runs_dir": tmp_path / "runs", "dataset_name": "libero_object_no_noops"}
    flags = flags_of(quick_flags(**names, use_wandb=True, wandb_mode="offline", run_id="a"))
    policy = str(tmp_path / "runs/a/checkpoints/step_000004")
    suite = "--task_suite_name libero_object --tasks [0] --num_trials_per_task 1 --max_steps 5 --use_wandb True"
    lines: set[str] = set()
    for command in (
        ["train", *flags],
        ["evaluate", "--pretrained_checkpoint", policy, "--local_log_dir", str(tmp_path / "runs/e"), *suite.split()],
        ["report", str(tmp_path / "runs/a")],
    ):
        running = subprocess.Popen(
            [sys.executable, "-m", "spvla.cli", *command],
            cwd=tmp_path / "here",
            env=os.environ | {"WANDB_API_KEY": KEY, "AWS_SECRET_ACCESS_KEY": KEY, "WANDB_MODE": "offline"},
            stdout=(tmp_path / f"{command[0]}.txt").open("w"),
            stderr=subprocess.STDOUT,
        )
        while running.poll() is None:
            lines.update(command_lines(psutil.Process(running.pid)))
            time.sleep(0.2)
        assert running.returncode == 0, (tmp_path / f"{command[0]}.txt").read_text()
    assert any("raylet" in line for line in lines)
    assert [line for line in lines if KEY in line] == []
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.name for p in written} >= {"train.txt", "report.html", "ledger.sqlite"}
    assert len([p for p in written if p.suffix == ".wandb"]) == 2
    assert [p for p in written if KEY.encode() in p.read_bytes()] == []
    assert list((tmp_path / "here").iterdir()) == []
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"a", "e"}


def test_no_command_takes_a_key_as_a_flag() -> None:
    for cls, _ in cli.COMMANDS.values():
        assert not [
            f for f in cli.flags_of(cls) if any(word in f for word in ("api_key", "secret", "password", "token"))
        ]
