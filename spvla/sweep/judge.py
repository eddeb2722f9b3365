"""What turns checkpoints into objectives: the farm's success rate, or the run's own validation accuracy."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from spvla import runs
from spvla.cluster.machines import cpus_for, grows, require_resources, total, unbounded
from spvla.config import EvaluateConfig, SweepConfig
from spvla.data.index import ensure_index
from spvla.data.loader import require_frames
from spvla.data.store import FrameStore
from spvla.errors import InfrastructureError
from spvla.eval.plan import benchmark_of, chosen_tasks
from spvla.eval.session import session
from spvla.eval.summary import Summary
from spvla.policies.checkpoint import policy_digest
from spvla.sweep.folder import JUDGED, TRIALS, judged, trial_folders
from spvla.train.prepare import datasets_of, evaluation_key

Judge = Callable[[Sequence[Path]], dict[Path, float]]  # checkpoints -> objective of those that could be judged


@contextmanager
def judging(config: SweepConfig, folder: Path) -> Iterator[Judge]:
    """What turns checkpoints into objectives, for as long as the sweep runs."""
    if config.metric == "val_action_accuracy":
        yield validation_accuracy
        return
    with session(evaluation(config, folder)) as farm:
        yield lambda checkpoints: success_rates(checkpoints, farm.run(checkpoints))


def success_rates(checkpoints: Sequence[Path], summaries: Sequence[Summary]) -> dict[Path, float]:
    """By digest: of two checkpoints with equal weights, only one is in the summaries by its name.

    Raises InfrastructureError for one whose trials all fell to errors: that says nothing about the policy.
    """
    rates = {s.policy: s.rate for s in summaries if s.task is None and s.done}
    digests = {path: policy_digest(path) for path in checkpoints}
    for path, digest in digests.items():
        if digest not in rates:
            raise InfrastructureError(f"every trial of {path} fell to errors; the same command judges it again")
    return {path: rates[digest] for path, digest in digests.items()}


def max_concurrent(config: SweepConfig) -> int:
    """Trials at once: what fits beside the farm, which keeps a GPU, or half of the CPUs, where there is one."""
    workers, farm = config.train.num_workers, config.metric == "success_rate"
    if uses_gpus(config):
        fits = int(total("GPU") - farm) // workers
    else:
        cpus = total("CPU")
        fits = int(cpus - (config.num_envs or cpus / 2) * farm) // workers
    if unbounded():
        return config.max_concurrent or max(1, fits)
    return max(1, min(config.max_concurrent or fits, fits))


def uses_gpus(config: SweepConfig) -> bool:
    return total("GPU") >= 1 and config.train.use_gpu is not False


def require_room(config: SweepConfig) -> None:
    """One trial and the farm fit side by side, or they would wait for each other for ever. Raises ClusterError."""
    workers = config.train.num_workers
    farm = config.metric == "success_rate"
    beside = " beside the farm (--metric val_action_accuracy needs none)" if farm else ""
    needed = {"CPU": workers + (config.num_envs or 1) * farm}
    if uses_gpus(config):
        needed["GPU"] = workers + farm
    require_resources(f"a trial of {workers} workers{beside}", **needed)


def require_trials(config: SweepConfig) -> None:
    """The tasks and init states to judge by exist. Raises UserError now rather than at the first checkpoint."""
    if config.metric == "success_rate":
        chosen_tasks(benchmark_of(config), config.task_suite_name, config.tasks, trials=config.num_trials_per_task)


def with_validation(config: SweepConfig) -> SweepConfig:
    """Judged by validation accuracy, each checkpoint needs a pass over the validation split at its step."""
    train = config.train
    if config.metric != "val_action_accuracy" or (train.val_steps and train.save_steps % train.val_steps == 0):
        return config
    return replace(config, train=replace(train, val_steps=train.save_steps))


def index_data(config: SweepConfig) -> None:
    """Indexes once what all trials read. Raises DatasetError where there is nothing to validate on."""
    train = config.train
    for name, _ in datasets_of(train.dataset_name):
        folder = ensure_index(train.data_root_dir, name, skip_corrupt=train.skip_corrupt)
        if config.metric == "val_action_accuracy":
            store = FrameStore.open(folder)
            require_frames(store, store.split("val", val_split_from_train=train.val_split_from_train), "val")


def evaluation(config: SweepConfig, folder: Path) -> EvaluateConfig:
    """The farm's flags; its ledger is the sweep's. Training keeps the CPUs that it needs."""
    return EvaluateConfig(
        pretrained_checkpoint=TRIALS,  # `farm.run` names them
        task_suite_name=config.task_suite_name,
        tasks=config.tasks,
        num_trials_per_task=config.num_trials_per_task,
        unnorm_key=evaluation_key(config.train.dataset_name, config.task_suite_name),
        center_crop=config.train.image_aug,
        libero_assets=config.libero_assets,
        any_mujoco=config.any_mujoco,
        max_steps=config.max_trial_steps,
        local_log_dir=folder,
        num_envs=config.num_envs or spare_envs(config),
        num_decoders=1,
        num_videos=0,
        max_failure_videos=0,
    )


def spare_envs(config: SweepConfig) -> int:
    """Environments on the CPUs that training leaves; 0, the farm's own default, where machines come on demand."""
    if grows():
        return 0
    left = int(total("CPU")) - max_concurrent(config) * config.train.num_workers
    return max(1, min(left, int(cpus_for("spvla_env"))))


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
