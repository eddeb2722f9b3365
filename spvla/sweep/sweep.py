"""`spvla sweep`: Ray Tune over any training flags, judged on one shared farm.

Each Tune trial is a Ray Train run in SWEEP/trials/NAME. This process judges every checkpoint that such a run commits,
by success rate on one farm that holds all trials' adapters, or by the run's own validation accuracy, and writes the
verdict to NAME/judged.jsonl, which the trial reports to Tune; ASHA (arXiv 1810.05934) then stops the poor ones. The
folder is the truth: a sweep started again reports what was judged, leaves finished and stopped trials alone, and goes
on with the rest.
"""

import time
from dataclasses import replace

from spvla import runs
from spvla.cluster import connection
from spvla.config import SweepConfig
from spvla.files import require_writable
from spvla.progress import Progress
from spvla.selfplay.prepare import require_datasets, start_policy
from spvla.sweep.folder import ENDED, FAILED, SweepTrial, sweep_id, table, write_table
from spvla.sweep.judge import judge_new_checkpoints, judging
from spvla.sweep.space import search_space
from spvla.sweep.tuning import POLL_S, Tuning


def sweep(config: SweepConfig) -> list[SweepTrial]:
    """Runs, or goes on with, the sweep that the flags name. Prints its table, best first, and returns it."""
    space = search_space(config.space)
    require_datasets(config.train)
    folder = require_writable(config.train.run_root_dir / sweep_id(config), flag="--run_root_dir")
    if not (folder / runs.CONFIG).exists():
        runs.write_config(folder, "sweep", config)
    config = replace(
        config, train=replace(config.train, vla_path=start_policy(config.train, folder))
    )  # one base for all
    with connection(), judging(config, folder) as judge:
        tuning = Tuning(config, space, folder)
        with Progress("sweep", total=tuning.total, unit="trials") as progress:
            while not tuning.loop.ended():
                judge_new_checkpoints(folder, judge)
                rows = write_table(folder, config)
                best = rows[0].objective if rows and rows[0].objective is not None else None
                ended = sum(row.status in (*ENDED, FAILED) for row in rows)
                progress.update(ended, **({} if best is None else {"best": f"{best:.3f}"}))
                time.sleep(POLL_S)
        tuning.loop.raise_if_failed()
    rows = write_table(folder, config)
    print(table(rows, config.metric))
    print(f"\nsweep  {folder}\nreport  spvla report {folder}")
    return rows
