"""`spvla sweep`: Ray Tune over any training flags, judged on one shared farm.

Each Tune trial is a Ray Train run in SWEEP/trials/NAME. This process judges every checkpoint that such a run commits,
by success rate on one farm that holds all trials' adapters, or by the run's own validation accuracy, and writes the
verdict to NAME/judged.jsonl, which the trial reports to Tune; ASHA (arXiv 1810.05934) then stops the poor ones. The
folder is the truth: a sweep started again reports what was judged, leaves finished and stopped trials alone, and goes
on with the rest.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from draccus import encode

from spvla import runs
from spvla.cluster.connect import connection
from spvla.config import SweepConfig, TrainConfig
from spvla.errors import TrainingError, UserError
from spvla.files import expanded, require_writable
from spvla.progress import Progress
from spvla.sweep.folder import ENDED, FAILED, SweepTrial, sweep_id, table, write_table
from spvla.sweep.judge import (
    Judge,
    index_data,
    judge_new_checkpoints,
    judging,
    require_room,
    require_trials,
    with_validation,
)
from spvla.sweep.space import search_space
from spvla.sweep.tuning import POLL_S, Tuning
from spvla.train.prepare import locked, require_datasets, require_flags, require_startable, start_policy

_JUDGING = ("metric", "space", "task_suite_name", "tasks", "num_trials_per_task", "max_trial_steps")
_Flags = TypeVar("_Flags", SweepConfig, TrainConfig)


def sweep(config: SweepConfig) -> list[SweepTrial]:
    """Runs, or goes on with, the sweep that the flags name. Prints its table, best first, and returns it.

    Raises UserError, KeyboardInterrupt, and TrainingError when no trial came to a verdict.
    """
    config.check()
    require_flags(config.train)
    space = search_space(config.space, config.train)
    config = absolute(replace(config, train=absolute(config.train)))
    require_trials(config)
    require_datasets(config.train)
    require_startable(config.train)
    folder = require_writable(config.train.run_root_dir / sweep_id(config), flag="--run_root_dir")
    with locked(folder):
        require_same_sweep(config, folder)
        start = start_policy(config.train, folder)  # one base for all
        config = with_validation(replace(config, train=replace(config.train, vla_path=start)))
        with connection():
            require_room(config)
            index_data(config)
            with judging(config, folder) as judge:
                _play(Tuning(config, space, folder), config, folder, judge)
        rows = write_table(folder, config)
    print(table(rows, config.metric))
    print(f"\nsweep  {folder}\nreport  spvla report {folder}")
    if all(row.objective is None for row in rows):
        raise TrainingError(f"no trial of {folder} came to a verdict; the same command tries again")
    return rows


def absolute(flags: _Flags) -> _Flags:
    """With every path absolute, because a trial's process has a working folder of Tune's."""
    paths: dict[str, Any] = {
        name: expanded(value, flag=f"--{name}") for name, value in vars(flags).items() if isinstance(value, Path)
    }
    return replace(flags, **paths)


def require_same_sweep(config: SweepConfig, folder: Path) -> None:
    """Writes SWEEP/config.json at first; later raises UserError if trials would be judged by another measure."""
    now = {name: encode(getattr(config, name)) for name in _JUDGING}
    if not (folder / runs.CONFIG).exists():
        runs.write_config(folder, "sweep", config)
    before = runs.read_config(folder)["config"]
    for name, value in now.items():
        if before.get(name) != value:
            raise UserError(
                f"{folder} was started with another --{name} than {value}",
                expected=f"{before.get(name)}, as when it began",
                remedy="Give the flags it began with, another --run_id, or delete the folder.",
            )


def _play(tuning: Tuning, config: SweepConfig, folder: Path, judge: Judge) -> None:
    try:
        with Progress("sweep", total=tuning.total, unit="trials") as progress:
            while not tuning.loop.done():
                judge_new_checkpoints(folder, judge)
                _show(progress, write_table(folder, config))
                time.sleep(POLL_S)
            _show(progress, write_table(folder, config))
        tuning.loop.result()
    except KeyboardInterrupt:
        print("sweep  stopping: the trials save their last step", file=sys.stderr, flush=True)
        tuning.interrupt()
        raise
    finally:
        tuning.close()


def _show(progress: Progress, rows: Sequence[SweepTrial]) -> None:
    best = rows[0].objective if rows and rows[0].objective is not None else None
    ended = sum(row.status in (*ENDED, FAILED) for row in rows)
    progress.update(ended, **({} if best is None else {"best": f"{best:.3f}"}))
