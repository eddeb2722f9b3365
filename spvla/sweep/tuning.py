"""Tune's side: the loop in a thread, and one trial in a process of Tune's."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from spvla.config import SweepConfig
from spvla.files import write_json
from spvla.selfplay.train import train
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
)
from spvla.sweep.judge import max_concurrent

POLL_S = 0.5


class Background:
    """A function in a daemon thread."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._call, args=(function,), daemon=True)
        self.thread.start()

    def ended(self) -> bool:
        return not self.thread.is_alive()

    def raise_if_failed(self) -> None:
        if self.ended() and self.error is not None:
            raise self.error

    def _call(self, function: Callable[[], Any]) -> None:
        try:
            function()
        except BaseException as e:
            self.error = e


class Tuning:
    """Tune's own loop, in a thread beside the judge; `total` trials."""

    def __init__(self, config: SweepConfig, space: dict[str, Any], folder: Path) -> None:
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C is ours
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
        self.loop = Background(tuner.fit)


class Marks(tune.Callback):
    """Writes into a trial's folder what only Tune knows of its end: stopped by ASHA, or failed for good."""

    def __init__(self, config: SweepConfig, folder: Path) -> None:
        self.config, self.folder = config, folder

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **_: Any) -> None:
        run, max_steps = self._of(trial)
        if status_of(run, max_steps) != "done":
            (run / STOPPED).touch()

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **_: Any) -> None:
        (self._of(trial)[0] / FAILED).touch()

    def _of(self, trial: Any) -> tuple[Path, int]:
        parameters = {k: v for k, v in trial.config.items() if k in self.config.space}
        mine = trial_config(self.config.train, self.folder, parameters)
        return run_folder(mine), mine.max_steps


def play(parameters: Parameters, *, config: SweepConfig, folder: Path) -> None:
    """One trial, in a process of Tune's: trains in a thread and reports each verdict as it comes."""
    mine = trial_config(config.train, folder, parameters)
    run = run_folder(mine)
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / PARAMETERS, parameters)
    (run / FAILED).unlink(missing_ok=True)
    if status_of(run, mine.max_steps) in ENDED:  # before a restart of the sweep
        for row in judged(run):
            tune.report(row)
        return
    training = Background(lambda: train(mine))
    told = 0
    while not (training.ended() and status_of(run, mine.max_steps) == "done" and told == len(judged(run))):
        for row in judged(run)[told:]:
            tune.report(row)
            told += 1
        training.raise_if_failed()
        time.sleep(POLL_S)
