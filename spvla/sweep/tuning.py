"""Tune's side: the loop in a thread, and one trial in a process of Tune's."""

import logging
import os
import time
from concurrent.futures import wait
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from spvla.config import SweepConfig
from spvla.errors import SpvlaError, UserError
from spvla.files import write_json
from spvla.sweep.folder import (
    ENDED,
    FAILED,
    PARAMETERS,
    STOPPED,
    Parameters,
    judged,
    run_folder,
    status_of,
    trial_config,
    trial_folders,
)
from spvla.sweep.judge import max_concurrent
from spvla.train.prepare import locked
from spvla.train.run import train
from spvla.train.thread import in_thread
from spvla.train.worker import STOP

POLL_S = 0.5
SAVE_PATIENCE_S, STOP_PATIENCE_S = 120.0, 15.0
LEAVE, END = ".stop", ".end"  # in the sweep's folder: trials save and leave; Tune's loop ends


class Tuning:
    """Tune's own loop, in a thread beside the judge; `total` trials."""

    def __init__(self, config: SweepConfig, space: dict[str, Any], folder: Path) -> None:
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C is ours
        os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # a trial may fail before its first verdict
        os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the newer output prints boxes whatever `verbose` says
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failures are told in the table
        self.folder = folder
        for mark in (LEAVE, END):
            (folder / mark).unlink(missing_ok=True)
        ranges = any(not isinstance(d, dict) for d in space.values())
        samples = config.num_samples if ranges else 1
        grid = [len(d["grid_search"]) for d in space.values() if isinstance(d, dict)]
        self.total = samples
        for size in grid:
            self.total *= size
        first = max(1, config.train.max_steps // 4)
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(play, config=config, folder=folder), {"node:__internal_head__": 0.001}
            ),
            param_space=space,
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(folder),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=2),
                stop=AtEnd(folder),
                callbacks=[Marks(config, folder)],
            ),
            tune_config=tune.TuneConfig(
                metric="objective",
                mode="max",
                num_samples=samples,
                search_alg=BasicVariantGenerator(random_state=config.train.seed, max_concurrent=max_concurrent(config)),
                scheduler=ASHAScheduler(time_attr="step", max_t=config.train.max_steps, grace_period=first),
            ),
        )
        self.loop = in_thread(tuner.fit)

    def interrupt(self) -> None:
        """Lets the trials that are training save their last step; a second Ctrl-C does not wait."""
        (self.folder / LEAVE).touch()
        deadline = time.monotonic() + SAVE_PATIENCE_S
        while (training := training_runs(self.folder)) and time.monotonic() < deadline:
            for run in training:
                (run / STOP).touch()  # again and again: a run that is just starting removes it once
            time.sleep(POLL_S)

    def close(self) -> None:
        """Ends Tune's loop, and with it every process of its trials."""
        (self.folder / END).touch()
        wait([self.loop], timeout=STOP_PATIENCE_S)


class AtEnd(tune.Stopper):
    """Stops all trials once the sweep's folder says so."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return (self.folder / END).exists()


class Marks(TrialProgressCallback):
    """Writes into a trial's folder what only Tune knows of its end: stopped by ASHA, or failed for good.

    In place of Tune's own callback of this kind, which prints.
    """

    def __init__(self, config: SweepConfig, folder: Path) -> None:
        self.config, self.folder = config, folder

    def on_trial_result(self, *_: Any, **__: Any) -> None:
        pass

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        run, max_steps = self._of(trial)
        if status_of(run, max_steps) == "running" and not self._interrupted():
            (run / STOPPED).touch()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        if not self._interrupted():
            (self._of(trial)[0] / FAILED).write_text(last_line(trial.error_file))

    def _interrupted(self) -> bool:
        return any((self.folder / mark).exists() for mark in (LEAVE, END))

    def _of(self, trial: Any) -> tuple[Path, int]:
        parameters = {k: v for k, v in trial.config.items() if k in self.config.space}
        mine = trial_config(self.config.train, self.folder, parameters)
        return run_folder(mine), mine.max_steps


def last_line(error_file: str | None) -> str:
    text = Path(error_file).read_text(errors="replace").strip() if error_file else ""
    return text.splitlines()[-1] if text else "its process died"


def training_runs(folder: Path) -> list[Path]:
    return [run for run in trial_folders(folder) if is_locked(run)]


def is_locked(run: Path) -> bool:
    try:
        with locked(run):
            return False
    except UserError:
        return True


def play(parameters: Parameters, *, config: SweepConfig, folder: Path) -> None:
    """One trial, in a process of Tune's: trains in a thread and reports each verdict as it comes.

    What a repetition cannot mend is noted here; anything else is raised, so that Tune tries again.
    """
    mine = trial_config(config.train, folder, parameters)
    run = run_folder(mine)
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / PARAMETERS, parameters)
    (run / FAILED).unlink(missing_ok=True)
    if status_of(run, mine.max_steps) in ENDED:  # before a restart of the sweep
        for row in judged(run):
            tune.report(row)
        return
    training = None if (folder / LEAVE).exists() else in_thread(lambda: train(mine))
    told = 0
    while not (status_of(run, mine.max_steps) == "done" and told == len(judged(run))):
        for row in judged(run)[told:]:
            tune.report(row)
            told += 1
        if training and training.done() and not (folder / LEAVE).exists():
            try:
                training.result()
            except SpvlaError as e:
                (run / FAILED).write_text(str(e))
                return
        time.sleep(POLL_S)
