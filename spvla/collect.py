"""`spvla collect` and `spvla regenerate`: environments as Ray actors make takes until each task has its episodes.

Finished takes wait in a hidden folder beside the data set, so the same command goes on after an interruption; the data
set appears whole, at the end, as the indexed store that training reads. DATA_ROOT/<suite>_no_noops/recording.json says
what was asked for: the same command again finds it done, and a data set of any other origin is never overwritten.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from spvla.benchmarks.libero.assets import AssetSet, resolve
from spvla.benchmarks.libero.env import tasks
from spvla.benchmarks.libero.recorders import Demonstrator, Recorder, Replayer
from spvla.cluster.connect import connection
from spvla.config import CollectConfig, RegenerateConfig
from spvla.data.demos import count_demos, demo_files
from spvla.data.recorded import write_index
from spvla.data.spool import Spool
from spvla.data.store import RECORDING, read_recording
from spvla.errors import DatasetError, InfrastructureError, UserError
from spvla.files import expanded, locked, require_writable, write_json
from spvla.takes import Tally, gather

LACKING = "tasks_without_demonstrations"  # entry of recording.json
BEGUN = "writing"  # marks, among the takes, that the data set is being written
SPARE_TAKES = 20  # beyond twice the wanted number, before a task is given up


def collect(config: CollectConfig) -> None:
    """Records the scripted experts. Raises UserError before any work on a bad request."""
    assets = resolve(config.libero_assets)
    noise = {"noise": config.noise, "noise_share": config.noise_share if config.noise else 0.0}
    how = {"starts": config.starts, **noise, "seed": config.seed}
    requests = []
    for suite in dict.fromkeys(config.task_suite_name.split(",")):
        wanted = dict.fromkeys(chosen(suite, config.tasks), config.num_demos_per_task)
        requests.append(Request(suite=suite, origin="experts", assets=assets, wanted=wanted, how=how))
    make = partial(Demonstrator, assets, seed=config.seed, test_starts=config.starts == "test", **noise)
    record(requests, make, config.data_root_dir, config.num_workers, spare=lambda count: count + SPARE_TAKES)


def chosen(suite: str, numbers: Sequence[int]) -> list[int]:
    """Those of a suite's tasks that `numbers` name, or all. Raises UserError for one that it does not have."""
    every = [task.id for task in tasks(suite)]
    for number in numbers:
        if number not in every:
            raise UserError(f"--tasks {number}", expected=f"0 to {every[-1]} in {suite}", remedy="Correct the number.")
    return [number for number in every if number in numbers or not numbers]


def regenerate(config: RegenerateConfig) -> None:
    """Replays LIBERO's HDF5 demonstrations. Raises UserError before any work on bad files."""
    names = [task.name for task in tasks(config.task_suite_name)]
    assets = resolve(config.libero_assets)
    folder = expanded(config.demos, flag="--demos")
    files = demo_files(folder, names)
    counts = {task: count_demos(file) for task, file in files.items()}
    request = Request(suite=config.task_suite_name, origin=str(folder), assets=assets, wanted=counts, how={})
    record([request], partial(Replayer, assets, files=files), config.data_root_dir, config.num_workers)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a data set is made of; its note is what recording.json holds."""

    suite: str
    origin: str  # "experts", or the folder of HDF5 files
    assets: AssetSet
    wanted: dict[int, int]  # task -> episodes
    how: dict[str, Any]  # an expert's starts, noise and seed

    @property
    def name(self) -> str:
        return f"{self.suite}_no_noops"

    def to_json(self) -> dict[str, Any]:
        assets = {"name": self.assets.name, "digest": self.assets.digest}
        wanted = {str(task): count for task, count in self.wanted.items()}
        return {"suite": self.suite, "from": self.origin, **self.how, "assets": assets, "episodes": wanted}

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.to_json()).encode()).hexdigest()[:12]


def record(
    requests: Sequence[Request],
    make: Callable[[], Recorder],
    data_root_dir: Path,
    num_workers: int,
    *,
    spare: Callable[[int], int] = lambda count: 0,
) -> None:
    """Makes every data set that is not there yet, all of them at once; `spare`: takes beyond the wanted number."""
    root = require_writable(data_root_dir, flag="--data_root_dir")
    folders: dict[str, Path] = {}
    for request in requests:
        waiting = root / f".{request.name}.{request.digest}.takes"
        print(f"{request.name}  {sum(request.wanted.values())} episodes, assets {request.assets.name}")
        if is_done(root / request.name, request, waiting):
            if LACKING not in read_recording(root / request.name):
                print(f"{request.name}  already recorded in {root / request.name}")
        else:
            folders[request.suite] = waiting
    pending = {request.suite: request for request in requests if request.suite in folders}
    with ExitStack() as held:
        for suite in pending:
            folders[suite].mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folders[suite], expected="one recording at a time", remedy="Wait for that one."))
        if pending:
            fill(pending, folders, make, root, num_workers, spare)
    require_every_task([root / request.name for request in requests])


def fill(
    pending: Mapping[str, Request],
    folders: Mapping[str, Path],
    make: Callable[[], Recorder],
    root: Path,
    num_workers: int,
    spare: Callable[[int], int],
) -> None:
    """Makes the data sets of `pending`, by suite; their takes wait in `folders`."""
    spools = {suite: Spool(waiting) for suite, waiting in folders.items()}
    wanted = {(suite, task): count for suite, r in pending.items() for task, count in r.wanted.items()}
    done = {((suite, task), k): solved for suite, s in spools.items() for (task, k), solved in s.takes().items()}
    tally = Tally(wanted, {task: count + spare(count) for task, count in wanted.items()}, done)
    with connection():
        gather(tally, spools, make, num_workers)
    print(table(tally))
    require_no_crash(tally)
    for suite, request in pending.items():
        write(request, spools[suite], [(task, k) for (of, task), k in tally.kept() if of == suite], root)


def write(request: Request, spool: Spool, kept: Sequence[tuple[int, int]], root: Path) -> None:
    """Turns the takes into the data set, whose note comes last; then they go."""
    (spool.folder / BEGUN).touch()
    names = [spool.name(*take) for take in kept]
    folder = write_index(names, spool.read, root, request.name, starts=request.how.get("starts"))
    lacking = sorted(request.wanted.keys() - {task for task, _ in kept})
    write_json(root / request.name / RECORDING, request.to_json() | ({LACKING: lacking} if lacking else {}))
    shutil.rmtree(spool.folder, ignore_errors=True)  # the lock in it is held: some file systems keep it until then
    print(f"{request.name}  written to {folder}")


def require_no_crash(tally: Tally) -> None:
    """Raises InfrastructureError where a task has nothing and takes of it crashed: these are worth another start."""
    for task, _ in tally.crashed:
        if tally.wanted[task] and not tally.successes(task):
            raise InfrastructureError(
                f"takes of {task[0]} task {task[1]} crashed, and it has no demonstration; the same command tries again"
            )


def require_every_task(folders: Sequence[Path]) -> None:
    """Raises DatasetError where a task is left without any demonstration, today as on the day of the recording: a
    policy would never see it, and fail at it."""
    lacks = {folder: found for folder in folders if (found := read_recording(folder).get(LACKING))}
    if lacks:
        got = "; ".join(
            f"{folder} has no demonstration of tasks {', '.join(map(str, t))}" for folder, t in lacks.items()
        )
        raise DatasetError(
            got,
            expected="at least one of each: every take of these failed, or had nothing but no-ops",
            remedy="It serves the other tasks; for these, record more demonstrations into another --data_root_dir.",
        )


def is_done(folder: Path, request: Request, waiting: Path) -> bool:
    """Whether the data set is there and is what was asked for. Raises DatasetError when it is anything else."""
    wanted = request.to_json()
    found = {key: value for key, value in read_recording(folder).items() if key != LACKING}
    if found == wanted:
        return True
    if not folder.exists() or (waiting / BEGUN).exists():  # cut short between data set and note: write both again
        return False
    others = [f"{key} {found[key]}, not {wanted.get(key)}" for key in found if found[key] != wanted.get(key)]
    raise DatasetError(
        f"{folder} already exists and was made from something else" + (f" ({'; '.join(others)})" if others else ""),
        expected="no data set of that name, or one that the same command made",
        remedy="Give another --data_root_dir, or move the data set away.",
    )


def table(tally: Tally) -> str:
    """One line a task: episodes kept, takes made, and the share of successes among the takes."""
    instructions = {(suite, t.id): t.instruction for suite in {of for of, _ in tally.wanted} for t in tasks(suite)}
    lines = [f"{'':14} {'task':>4} {'kept':>5} {'takes':>6} {'success':>8}"]
    for task, count in tally.wanted.items():
        successes, tried = tally.successes(task), tally.tried(task)
        rate = 100 * successes / max(1, tried)
        kept = min(successes, count)
        lines.append(f"{task[0]:14} {task[1]:>4} {kept:>5} {tried:>6} {rate:>7.1f}%  {instructions[task]}")
    tried, successes = len(tally.done), sum(tally.done.values())
    kept = sum(1 for _ in tally.kept())
    lines.append(f"{'all':14} {'':>4} {kept:>5} {tried:>6} {100 * successes / max(1, tried):>7.1f}%")
    lines += [f"crashed  {why}" for why in tally.crashed.values()]
    return "\n".join(lines)
