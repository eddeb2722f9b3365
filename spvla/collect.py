"""`spvla collect` and `spvla regenerate`: environments as Ray actors make takes until each task has its episodes.

Finished takes wait in a hidden folder beside the data set, so the same command goes on after an interruption; the data
set appears whole, at the end. With DATA_ROOT/<suite>_no_noops/recording.json, which says what was asked for, the same
command again finds it done; a data set of any other origin is never overwritten.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ray
from ray.exceptions import RayActorError, RayTaskError

from spvla.benchmarks.libero.assets import AssetSet, resolve
from spvla.benchmarks.libero.env import tasks
from spvla.benchmarks.libero.recorders import Demonstrator, Recorder, Replayer
from spvla.cluster.connect import connection
from spvla.cluster.machines import cpus_to_use, request_for, require_resources
from spvla.config import CollectConfig, RegenerateConfig
from spvla.data.demos import count_demos, demo_files
from spvla.data.spool import Spool
from spvla.errors import DatasetError, InfrastructureError, UserError
from spvla.files import require_writable, write_json
from spvla.progress import Progress
from spvla.render.rendering import draw_on_one_core
from spvla.types import Episode

RECORDING = "recording.json"
BEGUN = "writing"  # marks, among the takes, that the data set is being written
SPARE_TAKES = 20  # beyond twice the wanted number, before a task is given up
CRASHES = 3  # of the process that makes one take, before the command ends


def collect(config: CollectConfig) -> None:
    """Records the scripted experts. Raises UserError before any work on a bad request."""
    every = tasks(config.task_suite_name)
    for task in config.tasks:
        if not 0 <= task < len(every):
            raise UserError(f"--tasks {task}", expected=f"0 to {len(every) - 1}", remedy="Correct the number.")
    assets = resolve(config.libero_assets)
    wanted = {task.id: config.num_demos_per_task for task in every if task.id in config.tasks or not config.tasks}
    limits = {task: 2 * count + SPARE_TAKES for task, count in wanted.items()}
    request = Request(suite=config.task_suite_name, what="experts", assets=assets, seed=config.seed, wanted=wanted)
    make = partial(Demonstrator, config.task_suite_name, assets, seed=config.seed)
    record(request, limits, make, config.data_root_dir, config.num_workers)


def regenerate(config: RegenerateConfig) -> None:
    """Replays LIBERO's HDF5 demonstrations. Raises UserError before any work on bad files."""
    names = [task.name for task in tasks(config.task_suite_name)]
    assets = resolve(config.libero_assets)
    folder = config.demos.expanduser().resolve()
    files = demo_files(folder, names)
    counts = {task: count_demos(file) for task, file in files.items()}
    request = Request(suite=config.task_suite_name, what=str(folder), assets=assets, seed=0, wanted=counts)
    make = partial(Replayer, config.task_suite_name, assets, files=files)
    record(request, counts, make, config.data_root_dir, config.num_workers)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a data set is made of."""

    suite: str
    what: str  # "experts", or the folder of HDF5 files
    assets: AssetSet
    seed: int
    wanted: dict[int, int]  # task -> episodes

    @property
    def name(self) -> str:
        return f"{self.suite}_no_noops"

    def to_json(self) -> dict[str, object]:
        assets = {"name": self.assets.name, "digest": self.assets.digest}
        wanted = {str(task): count for task, count in self.wanted.items()}
        return {"suite": self.suite, "from": self.what, "assets": assets, "seed": self.seed, "episodes": wanted}

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.to_json()).encode()).hexdigest()[:12]


def record(
    request: Request, limits: dict[int, int], make: Callable[[], Recorder], data_root_dir: Path, num_workers: int
) -> None:
    root = require_writable(data_root_dir, flag="--data_root_dir")
    waiting = root / f".{request.name}.{request.digest}.takes"
    print(f"{request.name}  {sum(request.wanted.values())} episodes, assets {request.assets.name}")
    if is_done(root / request.name, request, waiting):
        print(f"{request.name}  already recorded in {root / request.name}")
        return
    spool = Spool(waiting)
    tally = Tally(request.wanted, limits, spool.takes())
    with connection():
        gather(tally, spool, make, num_workers)
    print(table(request, tally))
    from spvla.data.rlds import write_dataset  # TensorFlow only now: takes seconds to import

    (waiting / BEGUN).touch()
    folder = write_dataset((spool.get(*take) for take in tally.kept()), root, request.name)
    write_json(root / request.name / RECORDING, request.to_json())
    shutil.rmtree(waiting)
    print(f"{request.name}  written to {folder}")


def is_done(folder: Path, request: Request, waiting: Path) -> bool:
    """Whether the data set is there and is what was asked for. Raises DatasetError when it is anything else."""
    note = folder / RECORDING
    if note.exists() and json.loads(note.read_text()) == request.to_json():
        return True
    if not folder.exists() or (waiting / BEGUN).exists():  # cut short between data set and note: write both again
        return False
    raise DatasetError(
        f"{folder} already exists and was made from something else",
        expected="no data set of that name, or one that the same command made",
        remedy="Give another --data_root_dir, or move the data set away.",
    )


class Tally:
    """Which takes are made, failed and due. Kept are each task's first successes, whatever order takes end in."""

    def __init__(self, wanted: dict[int, int], limits: dict[int, int], done: dict[tuple[int, int], bool]) -> None:
        self.wanted, self.limits, self.done = wanted, limits, dict(done)
        self.running: set[tuple[int, int]] = set()

    def due(self, task: int) -> int | None:
        """The task's next take; None when enough are made or under way, or its limit is reached."""
        under_way = sum(t == task for t, _ in self.running)
        if self.successes(task) + under_way >= self.wanted[task]:
            return None
        taken = {k for t, k in (*self.done, *self.running) if t == task}
        return next((k for k in range(self.limits[task]) if k not in taken), None)

    def next(self, preferred: int | None) -> tuple[int, int] | None:
        """The take that an idle worker should make, of its own task if that has any left."""
        for task in sorted(self.wanted, key=lambda task: (task != preferred, self.under_way(task), task)):
            if (take := self.due(task)) is not None:
                return task, take
        return None

    def under_way(self, task: int) -> int:
        return sum(t == task for t, _ in self.running)

    def successes(self, task: int) -> int:
        return sum(solved for (t, _), solved in self.done.items() if t == task)

    def tried(self, task: int) -> int:
        return sum(t == task for t, _ in self.done)

    def kept(self) -> Iterator[tuple[int, int]]:
        for task, count in self.wanted.items():
            takes = sorted(k for (t, k), solved in self.done.items() if t == task and solved)
            yield from ((task, k) for k in takes[:count])


def gather(tally: Tally, spool: Spool, make: Callable[[], Recorder], num_workers: int) -> None:
    """Runs takes on actors until none is due. Raises what a recorder raised, or InfrastructureError after crashes."""
    require_resources("recording", CPU=1)
    total = sum(tally.wanted.values())
    count = num_workers or cpus_to_use()
    with closing(Workers(make, count)) as workers, Progress("record", total=total, unit="episodes") as progress:
        show(progress, tally)
        while workers.start(tally):
            for take, episode in workers.finished():
                tally.running.discard(take)
                spool.put(*take, episode)
                tally.done[take] = episode is not None
                show(progress, tally)


def show(progress: Progress, tally: Tally) -> None:
    made = sum(min(tally.successes(task), count) for task, count in tally.wanted.items())
    progress.update(made, takes=len(tally.done), failed=sum(not solved for solved in tally.done.values()))


class Workers:
    """At most `count` actors, each with the environment of its last task. A dead one's take is made again."""

    def __init__(self, make: Callable[[], Recorder], count: int) -> None:
        self.make, self.count = make, count
        self.idle: list[tuple[ray.actor.ActorHandle, int | None]] = []
        self.busy: dict[ray.ObjectRef, tuple[ray.actor.ActorHandle, tuple[int, int]]] = {}
        self.crashes: dict[tuple[int, int], int] = {}

    def start(self, tally: Tally) -> bool:
        """Gives idle actors their takes. False when nothing is due and nothing runs."""
        while len(self.busy) < self.count:
            actor, last = self.idle.pop() if self.idle else (None, None)
            take = tally.next(last)
            if take is None:
                if actor is not None:
                    self.idle.append((actor, last))
                break
            tally.running.add(take)
            self._run(actor or self._new(), take)
        return bool(self.busy)

    def _new(self) -> ray.actor.ActorHandle:
        place = request_for("spvla_env")
        return ray.remote(num_cpus=1, resources=place, max_restarts=0)(_Actor).remote(self.make)

    def _run(self, actor: ray.actor.ActorHandle, take: tuple[int, int]) -> None:
        self.busy[actor.record.remote(*take)] = actor, take

    def finished(self) -> Iterator[tuple[tuple[int, int], Episode | None]]:
        """Waits for one take or more. A take whose actor died is started again elsewhere."""
        for ref in ray.wait(list(self.busy), num_returns=1)[0]:
            actor, take = self.busy.pop(ref)
            try:
                episode = ray.get(ref)
            except RayTaskError as e:
                raise e.cause from None
            except RayActorError as e:
                self.crashes[take] = self.crashes.get(take, 0) + 1
                if self.crashes[take] >= CRASHES:
                    raise InfrastructureError(
                        f"task {take[0]}, take {take[1]}: its process died {CRASHES} times"
                    ) from e
                fresh = self._new()
                self.busy[fresh.record.remote(*take)] = fresh, take
                continue
            self.idle.append((actor, take[0]))
            yield take, episode

    def close(self) -> None:
        for actor in [*(actor for actor, _ in self.busy.values()), *(actor for actor, _ in self.idle)]:
            ray.kill(actor)


class _Actor:
    """A recorder in a process of its own."""

    def __init__(self, make: Callable[[], Recorder]) -> None:
        draw_on_one_core()
        self.recorder = make()

    def record(self, task: int, take: int) -> Episode | None:
        return self.recorder.record(task, take)


def table(request: Request, tally: Tally) -> str:
    """One line a task: episodes kept, takes made, and the share of successes among the takes."""
    instructions = {task.id: task.instruction for task in tasks(request.suite)}
    lines = [f"{'task':>4} {'kept':>5} {'takes':>6} {'success':>8}"]
    for task, count in request.wanted.items():
        successes, tried = tally.successes(task), tally.tried(task)
        rate = 100 * successes / max(1, tried)
        lines.append(f"{task:>4} {min(successes, count):>5} {tried:>6} {rate:>7.1f}%  {instructions[task]}")
    tried, successes = len(tally.done), sum(tally.done.values())
    lines.append(f" all {sum(1 for _ in tally.kept()):>5} {tried:>6} {100 * successes / max(1, tried):>7.1f}%")
    return "\n".join(lines)
