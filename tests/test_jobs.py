"""Every script in ray_jobs/ under `ray job submit`, on a cluster that this test starts and ends."""

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from job_parts import ROOT, JobServer, job_server
from ray._private.runtime_env.packaging import create_package
from training_parts import flags_of, quick_flags, when, write_toy_dataset

from spvla import runs
from spvla.eval.ledger import Ledger

SCRIPTS = ("collect", "train", "evaluate", "selfplay", "sweep")


@pytest.fixture(scope="module")
def server() -> Iterator[JobServer]:
    with job_server() as started:
        yield started


def test_a_job_takes_the_package_along_and_nothing_that_a_checkout_gathers(tmp_path: Path) -> None:
    checkout, package = tmp_path / "checkout", tmp_path / "package.zip"
    shutil.copytree(ROOT / "spvla", checkout / "spvla", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "ray_jobs", checkout / "ray_jobs", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", ".rayignore", ".gitignore"):
        shutil.copy(ROOT / name, checkout)
    taken = {str(p.relative_to(checkout)) for p in checkout.rglob("*") if p.is_file()} - {".rayignore", ".gitignore"}
    for gathered in ("modified_libero_rlds/a/1.0.0/shard", "LIBERO/libero/task.bddl", "wandb/run", "my-runs/model.bin"):
        (checkout / gathered).parent.mkdir(parents=True)
        (checkout / gathered).write_bytes(b"x")
    (checkout / "model-00001.safetensors").write_bytes(b"x")
    create_package(str(checkout), package, include_gitignore=True)
    assert {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")} == taken


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_job_with_a_misspelt_flag_ends_at_once_with_one_line(script: str) -> None:
    command = [sys.executable, f"ray_jobs/{script}.py", "--sed", "7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("spvla: unknown flag --sed;") and "Did you mean --seed?" in done.stderr


@pytest.mark.timeout(600)
def test_a_training_job_is_stopped_with_a_checkpoint_and_goes_on_when_submitted_again(
    server: JobServer, tmp_path: Path
) -> None:
    write_toy_dataset(tmp_path / "data")
    config = quick_flags(tmp_path / "data", tmp_path / "runs", run_id="a", max_steps=5000, save_steps=5000)
    server.submit("first", "train", *flags_of(config))
    run = tmp_path / "runs" / "a"
    when(lambda: any(row["step"] >= 2 for row in runs.read_metrics(run)), timeout_s=240)
    server.ray("job", "stop", "first")
    assert server.wait("first") == "STOPPED"
    ((step, saved),) = runs.checkpoints(run)
    assert step >= 2 and (saved / "adapter_model.safetensors").exists()

    config = quick_flags(tmp_path / "data", tmp_path / "runs", run_id="a", max_steps=step + 2, save_steps=100_000)
    server.submit("second", "train", *flags_of(config), runtime_env='{"env_vars": {"OMP_NUM_THREADS": "1"}}')
    assert server.wait("second") == "SUCCEEDED", server.logs("second")
    logs = server.logs("second")
    assert not [word for word in ("WARNING", "Warning", "TensorFlow", "absl", "Traceback") if word in logs]
    assert f"goes on from step {step}" in logs
    assert f"{step + 2}/{step + 2} steps" in logs
    assert [s for s, _ in runs.checkpoints(run)] == [step + 2]
    assert [row["step"] for row in runs.read_metrics(run)] == list(range(1, step + 3))  # no step twice, none missing


@pytest.mark.slow
def test_demonstrations_are_collected_and_a_policy_evaluated_as_jobs(server: JobServer, tmp_path: Path) -> None:
    from farm_parts import tiny_with_statistics

    suite = ("--task_suite_name", "libero_object", "--tasks", "[0]")
    data = tmp_path / "data"
    server.submit("collect", "collect", *suite, "--num_demos_per_task", "1", "--data_root_dir", str(data))
    policy = tiny_with_statistics(tmp_path / "policy")
    assert server.wait("collect", timeout_s=600) == "SUCCEEDED", server.logs("collect")
    assert list((data / "libero_object_no_noops" / "1.0.0").glob("*.tfrecord*"))
    flags = ("--pretrained_checkpoint", str(policy), "--num_trials_per_task", "2", "--max_steps", "5")
    server.submit("evaluate", "evaluate", *suite, *flags, "--local_log_dir", str(tmp_path / "logs"))
    assert server.wait("evaluate", timeout_s=600) == "SUCCEEDED", server.logs("evaluate")
    with Ledger.open(tmp_path / "logs" / runs.LEDGER) as ledger:
        assert len(ledger.outcomes()) == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_self_play_and_a_sweep_run_to_their_ends_as_jobs(server: JobServer, tmp_path: Path) -> None:
    write_toy_dataset(tmp_path / "data")
    quick = quick_flags(tmp_path / "data", tmp_path / "runs", run_id="run", max_steps=2)
    judged = ("--task_suite_name", "libero_object", "--tasks", "[0]", "--num_trials_per_task", "1", "--num_envs", "2")
    judged = (*judged, "--max_trial_steps", "4")

    play = quick_flags(tmp_path / "data", tmp_path / "runs", run_id="play", max_steps=2)
    server.submit("selfplay", "selfplay", *flags_of(play), *judged, "--iterations", "1")
    assert server.wait("selfplay", timeout_s=400) == "SUCCEEDED", server.logs("selfplay")
    history = [json.loads(line) for line in (tmp_path / "runs" / "play" / runs.HISTORY).read_text().splitlines()]
    assert history[-1]["name"] == "it-0" and history[-1]["trials"] == 1

    swept = ("--beta", "0.3,0.7", "--metric", "val_action_accuracy", "--max_concurrent", "1")
    server.submit("sweep", "sweep", *flags_of(quick), *swept)
    assert server.wait("sweep", timeout_s=400) == "SUCCEEDED", server.logs("sweep")
    table = json.loads((tmp_path / "runs" / "run" / "trials.json").read_text())["trials"]
    assert sorted(trial["parameters"]["beta"] for trial in table) == [0.3, 0.7]
    assert {trial["status"] for trial in table} == {"done"}
    assert f"best  {table[0]['checkpoint']}" in server.logs("sweep")
