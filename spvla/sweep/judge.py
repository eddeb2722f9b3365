"""What turns checkpoints into objectives: the farm's success rate, or the run's own validation accuracy."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import ray

from spvla import runs
from spvla.config import EvaluateConfig, SweepConfig
from spvla.farm.plan import readable_name
from spvla.farm.session import session
from spvla.sweep.folder import JUDGED, TRIALS, judged, trial_folders

Judge = Callable[[Sequence[Path]], dict[Path, float]]  # checkpoints -> objective of those that could be judged


@contextmanager
def judging(config: SweepConfig, folder: Path) -> Iterator[Judge]:
    """What turns checkpoints into objectives, for as long as the sweep runs."""
    if config.metric == "val_action_accuracy":
        yield validation_accuracy
        return
    with session(evaluation(config, folder)) as farm:

        def success_rate(checkpoints: Sequence[Path]) -> dict[Path, float]:
            by_policy = {s.policy_name: s.rate for s in farm.run(checkpoints) if s.task is None}
            return {path: by_policy[readable_name(path)] for path in checkpoints}

        yield success_rate


def max_concurrent(config: SweepConfig) -> int:
    """What fits beside the farm: a GPU, or half of the CPUs, is the farm's where there is one."""
    if config.max_concurrent:
        return config.max_concurrent
    held = ray.cluster_resources()
    workers, judged_here = config.train.num_workers, config.metric != "success_rate"
    if held.get("GPU", 0) >= 1 and config.train.use_gpu is not False:
        return max(1, int(held["GPU"] - (not judged_here)) // workers)
    return max(1, int(held["CPU"] if judged_here else held["CPU"] / 2) // workers)


def evaluation(config: SweepConfig, folder: Path) -> EvaluateConfig:
    """The farm's flags; its ledger is the sweep's. Training keeps the CPUs that it needs."""
    held = ray.cluster_resources()
    training = 0 if held.get("GPU", 0) >= 1 else max_concurrent(config) * config.train.num_workers
    return EvaluateConfig(
        pretrained_checkpoint=TRIALS,  # `farm.run` names them
        task_suite_name=config.task_suite_name,
        tasks=config.tasks,
        num_trials_per_task=config.num_trials_per_task,
        center_crop=config.train.image_aug,
        libero_assets=config.libero_assets,
        local_log_dir=folder,
        num_envs=config.num_envs or max(1, int(held["CPU"]) - training),
        num_decoders=1,
        num_videos=0,
        max_failure_videos=0,
    )


def validation_accuracy(checkpoints: Sequence[Path]) -> dict[Path, float]:
    """`val_action_accuracy` as the run logged it at the checkpoint's step; a checkpoint without is left for later."""
    found = {}
    for path in checkpoints:
        step = int(path.name.removeprefix("step_"))
        rows = {row["step"]: row for row in runs.read_metrics(path.parent.parent)}
        if (value := rows.get(step, {}).get("val_action_accuracy")) is not None:
            found[path] = value
    return found


def judge_new_checkpoints(folder: Path, judge: Judge) -> None:
    """Judges, in one go, every committed checkpoint that has no verdict, and appends the verdicts."""
    new = [
        path
        for run in trial_folders(folder)
        for step, path in runs.checkpoints(run)
        if step not in {row["step"] for row in judged(run)}
    ]
    for path, objective in (judge(new) if new else {}).items():
        row = {"step": int(path.name.removeprefix("step_")), "objective": objective, "checkpoint_path": str(path)}
        with (path.parent.parent / JUDGED).open("a") as f:
            f.write(json.dumps(row) + "\n")
