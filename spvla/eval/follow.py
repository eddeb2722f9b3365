"""`spvla evaluate --follow RUN`: each new checkpoint of a training run, evaluated while training goes on.

A checkpoint is first pinned, by hard links beside the ledger: training may delete its own copy at any moment, and a
policy actor that dies needs it again. Newest first, so that the curve's end is never far behind; then those skipped.
"""

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from spvla import runs
from spvla.config import EvaluateConfig
from spvla.errors import UserError
from spvla.eval.session import session
from spvla.eval.summary import summarise, table
from spvla.files import expanded, new_folder, writing_to

PINNED = "followed"
POLL_S = 0.5
QUIET_S = 300.0  # without a logged step: worth a word, since the run may have died


def follow(config: EvaluateConfig) -> None:
    """Ends when the run's last checkpoint is evaluated; Ctrl-C ends it earlier, and the same command goes on."""
    assert config.follow is not None
    run = expanded(config.follow, flag="--follow")
    last_step = steps_of(run)
    with session(config) as opened:
        pins, say = pins_of(run, opened.folder), opened.console.say
        for step, checkpoint in checkpoints_to_come(run, pins, last_step, say):
            say(f"follow  step {step}: {checkpoint}")
            for s in opened.run([checkpoint], step=step):
                if s.task is None:
                    say(f"follow  step {step}: {s.suite} {s.successes}/{s.done} = {s.rate:.1%}")
        print(table([s for s in summarise(opened.ledger.trials()) if s.task is None]))


def pins_of(run: Path, folder: Path) -> Path:
    """Runs of one name lie in different places; the last part is the name that tables give their policies."""
    place = run.resolve()
    return folder / PINNED / hashlib.sha256(str(place).encode()).hexdigest()[:8] / place.name


def steps_of(run: Path) -> int:
    """The step at which the run is to end. Raises UserError if it is no training run."""
    written = runs.read_config(run)
    steps = written["config"].get("max_steps")
    if written["command"] != "train" or not isinstance(steps, int):
        raise UserError(
            f"--follow {run} is the folder of spvla {written['command']}",
            expected="the folder of one training run",
            remedy="Give a run of spvla train, such as RUN/it-0 of a self-play run.",
        )
    return steps


def checkpoints_to_come(
    run: Path, pins: Path, last_step: int, say: Callable[[str], None] = lambda line: None
) -> Iterator[tuple[int, Path]]:
    """(step, pinned folder) of each checkpoint, the newest one first whenever there are several."""
    seen: set[int] = set()
    told = False
    with pinning(run, pins) as pin_now:
        while True:
            pin_now()
            waiting = [(step, path) for step, path in runs.checkpoints(pins) if step not in seen]
            if waiting:
                seen.add(waiting[-1][0])
                yield waiting[-1]
            elif any(step >= last_step for step in seen):
                return
            else:
                quiet_s = quiet_for_s(run)
                if quiet_s > QUIET_S and not told:
                    say(
                        f"follow  {run} has logged nothing for {quiet_s / 60:.0f} minutes; still waiting for step"
                        f" {last_step}. If training died, its own command goes on; Ctrl-C ends the waiting."
                    )
                told = quiet_s > QUIET_S
                time.sleep(POLL_S)


def quiet_for_s(run: Path) -> float:
    """Seconds since a run logged a step, or began."""
    metrics = run / runs.METRICS
    return time.time() - (metrics if metrics.exists() else run / runs.CONFIG).stat().st_mtime


@contextmanager
def pinning(run: Path, pins: Path) -> Iterator[Callable[[], None]]:
    """Pins what comes while one is busy evaluating an older one; yields what pins at once, and raises what is wrong."""
    one_at_a_time, over = threading.Lock(), threading.Event()

    def pin_now() -> None:
        with one_at_a_time, writing_to(pins):
            pin_new(run, pins)

    def pin_on() -> None:
        while not over.wait(POLL_S):
            with suppress(UserError):  # the next look of who reads the pins will tell
                pin_now()

    thread = threading.Thread(target=pin_on, name="pinning", daemon=True)
    thread.start()
    try:
        yield pin_now
    finally:
        over.set()
        thread.join()


def pin_new(run: Path, pins: Path) -> None:
    """Links each whole checkpoint that is not pinned yet into `pins`, without its training state.

    Raises UserError where one that is pinned has been trained anew.
    """
    for _, folder in runs.checkpoints(run):
        kept = pins / runs.CHECKPOINTS / folder.name
        try:
            names = [name for name in os.listdir(folder) if not name.startswith("training_state")]
            if kept.exists():
                require_same(folder, kept, names)
                continue
            with new_folder(kept) as fresh:
                for name in names:
                    link_or_copy(folder / name, fresh / name)
        except FileNotFoundError:
            continue  # training has deleted it meanwhile


def require_same(folder: Path, kept: Path, names: Sequence[str]) -> None:
    for name in names:
        ours, theirs = ((place / name).stat() for place in (kept, folder))
        if (ours.st_size, ours.st_mtime_ns) != (theirs.st_size, theirs.st_mtime_ns):
            raise UserError(
                f"{folder} is not the checkpoint that was followed under this name before",
                expected="the run that this --local_log_dir has followed",
                remedy="It was trained anew: give another --local_log_dir.",
            )


def link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another file system
        shutil.copy2(source, target)
