"""`spvla train`: check everything, then let Ray Train run the workers, follow their numbers, and take over what breaks.

The run's folder is the truth: a checkpoint is committed by a rename (see resume.py), and every start of the workers, be
it after a crash of one, of Ray's controller or of this process, goes on from the newest one there.
"""

import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from spvla import runs
from spvla.cluster.connect import connection
from spvla.config import TrainConfig
from spvla.errors import TrainingError
from spvla.files import require_writable
from spvla.train.merge import Merger
from spvla.train.metrics import Console, Follower, Row, Sink, WandbCurves
from spvla.train.objectives import objective_of
from spvla.train.prepare import (
    Job,
    locked,
    prepare,
    require_datasets,
    require_flags,
    require_same_run,
    require_startable,
    run_id,
    start_policy,
)
from spvla.train.resume import sweep_out
from spvla.train.thread import in_thread
from spvla.train.worker import FAILURE, STOP, failure_of, work

_STOP_PATIENCE_S = 120.0
_PATIENCE = 30  # minutes, about, for workers to find room on a busy or growing cluster
_HANG_S = 600  # a collective that takes longer means a lost worker; the group is then restarted


@dataclass(frozen=True, kw_only=True)
class Trained:
    """How a run ended."""

    run: Path
    checkpoint: Path
    step: int
    metrics: Row  # the last value of each


def train(config: TrainConfig, *, label: str = "train", callbacks: Sequence[UserCallback] = ()) -> Trained:
    """Runs, or goes on with, the run that the flags name. Raises UserError, TrainingError, KeyboardInterrupt.

    `callbacks` are handed to Ray Train; a sweep passes Tune's.
    """
    require_flags(config)
    require_datasets(config)
    require_startable(config)
    if config.save_merged:
        require_writable(config.adapter_tmp_dir, flag="--adapter_tmp_dir")
    run = require_writable(config.run_root_dir / run_id(config), flag="--run_root_dir")
    with locked(run):
        start = start_policy(config, run)
        require_same_run(config, run, start)
        sweep_out(run)
        if (done := finished(config, run)) is not None:
            _say(label, f"{run} is already at its last step")
            if merger := merger_of(config, run):  # of a run that was ended while it merged, or that is to be merged now
                merger.finish()
            return done
        # before Ray, so that a missing login shows at once
        sinks: list[Sink] = [WandbCurves(run, config)] if config.use_wandb else []
        with connection():
            job = prepare(config, run, start)
            _announce(label, job)
            with Follower(run, [Console(label, config.max_steps), *sinks]) as follower:
                _run(job, follower, callbacks)
    done = finished(config, run)
    if done is None:
        raise TrainingError(f"the workers of {run} ended before step {config.max_steps}; the same command goes on")
    _say(label, f"done  {done.checkpoint}")
    return done


def finished(config: TrainConfig, run: Path) -> Trained | None:
    """The result, if the last step's checkpoint stands."""
    every = runs.checkpoints(run)
    if not every or every[-1][0] < config.max_steps:
        return None
    metrics: Row = {}
    for row in runs.read_metrics(run):
        metrics |= row
    step, checkpoint = every[-1]
    return Trained(run=run, checkpoint=checkpoint, step=step, metrics=metrics)


def merger_of(config: TrainConfig, run: Path) -> Merger | None:
    if not config.save_merged or not config.use_lora:
        return None
    return Merger(run, config.adapter_tmp_dir.resolve(), only_latest=config.save_latest_checkpoint_only)


def _run(job: Job, follower: Follower, callbacks: Sequence[UserCallback]) -> None:
    """Fits in a thread, so that this one can follow the numbers and hear Ctrl-C."""
    for marker in (STOP, FAILURE):
        (job.run / marker).unlink(missing_ok=True)
    merger = merger_of(job.config, job.run)
    done = in_thread(lambda: _fit(job, callbacks))
    try:
        while not done.done():
            follower.poll()
            if merger:
                merger.poll()
            time.sleep(0.2)
        done.result()
        if merger:
            merger.finish()
    except BaseException:  # Ctrl-C above all; whatever it is, the workers must not go on alone
        if not done.done():
            _stop(job, done)
        raise


def _stop(job: Job, done: Future[None]) -> None:
    """Asks the workers to save and leave, and waits for them; a second Ctrl-C does not wait."""
    _say("train", "stopping after this step, with a checkpoint")
    (job.run / STOP).touch()
    deadline = time.monotonic() + _STOP_PATIENCE_S
    while not done.done() and time.monotonic() < deadline:
        time.sleep(0.1)


def _fit(job: Job, callbacks: Sequence[UserCallback]) -> None:
    """One Ray Train run; again when Ray's controller itself was lost. Raises what the workers could not overcome."""
    config = job.config
    for attempt in range(config.max_failures + 1):
        # Ray's record of checkpoints may be torn or stale; the folders tell what is whole
        (job.run / runs.CHECKPOINTS / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
        try:
            _trainer(job, callbacks).fit()
        except RayActorError as e:
            if attempt == config.max_failures:
                raise TrainingError(f"Ray's controller of {job.run} was lost {attempt + 1} times: {e}") from e
            continue
        except TrainingFailedError as e:
            raise failure_of(job.run) or TrainingError(
                f"the workers of {job.run} failed more than --max_failures {config.max_failures} times; "
                f"the last checkpoint stays. {e}"
            ) from e
        break
    if (error := failure_of(job.run)) is not None:
        raise error


class Trainer(TorchTrainer):
    """Without Ray 2.60's cleaner of placement groups.

    It takes an empty answer from a busy dashboard for the controller's death, and then ends all workers of a healthy
    run. A group whose controller really died goes with it all the same.
    """

    def _create_default_callbacks(self) -> list[Any]:
        every = super()._create_default_callbacks()
        return [c for c in every if type(c).__name__ != "PlacementGroupCleanerCallback"]


def _trainer(job: Job, callbacks: Sequence[UserCallback]) -> TorchTrainer:
    """Ray's experiment folder is RUN/checkpoints, so that its checkpoints are ours."""
    config = job.config
    return Trainer(
        work,
        train_loop_config={"job": job},
        # CPU tensors by gloo even on GPUs: the workers agree on when to stop without touching the device
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if job.use_gpu else "gloo", timeout_s=_HANG_S),
        scaling_config=ScalingConfig(num_workers=config.num_workers, use_gpu=job.use_gpu),
        run_config=RunConfig(
            name=runs.CHECKPOINTS,
            storage_path=str(job.run),
            callbacks=list(callbacks),
            failure_config=FailureConfig(max_failures=config.max_failures, controller_failure_limit=_PATIENCE),
        ),
    )


def _announce(label: str, job: Job) -> None:
    c = job.config
    effective = c.batch_size * c.num_workers * c.grad_accumulation_steps
    last = runs.checkpoints(job.run)
    begins = f"goes on from step {last[-1][0]}" if last else "starts"
    _say(label, f"{begins}, {c.max_steps} steps, run folder {job.run}")
    _say(
        label,
        f"{c.objective}; effective batch {effective} = {c.batch_size} x {c.num_workers} workers x "
        f"{c.grad_accumulation_steps} accumulation steps; {'one GPU a worker' if job.use_gpu else 'on CPU'}",
    )
    if objective_of(c).has_reference:
        _say(label, f"opponent: {job.start}, {'frozen' if c.opponent_update == 'iteration' else 'averaged on'}")


def _say(label: str, message: str) -> None:
    print(f"{label}  {message}", file=sys.stderr, flush=True)
