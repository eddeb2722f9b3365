"""One Ray Train worker: load, go on from the newest checkpoint, step, report, save.

`loop` knows no Ray: it also runs in-process. `work`, below it, is what Ray runs.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import ray.train
import ray.train.torch
import torch
from annotated_types import Len
from typing_extensions import TypedDict

from spvla import runs
from spvla.errors import SpvlaError, TrainingError, UserError
from spvla.files import write_json
from spvla.reading import read_json
from spvla.train.metrics import MetricsFile, Row
from spvla.train.prepare import Job
from spvla.train.resume import commit
from spvla.train.session import Place, Session
from spvla.train.settings import ALLOCATOR

NCCL = {"NCCL_NVLS_ENABLE": "0"}  # NVLink multicast hangs on some virtualised hosts
STOP, FAILURE = ".stop", ".failure.json"  # in the run's folder: please save and leave; what no restart can mend
_EVERY_STEP_UP_TO = 5000  # steps; longer runs log every tenth

Report = Callable[[Row, Path | None], None]


def loop(job: Job, place: Place, report: Report) -> None:
    """Goes on until the end, or until someone asks to stop; either way the last step is saved."""
    session, config, leads = Session(job, place), job.config, place.rank == 0
    if newest := place.agree(str(runs.latest_checkpoint(job.run) or "")):
        session.load(Path(newest))
    file = MetricsFile(job.run) if leads else None
    log_steps = 1 if config.max_steps <= _EVERY_STEP_UP_TO else 10
    while session.step < config.max_steps:
        rows = session.advance()
        stop = place.any((job.run / STOP).exists())
        last = stop or session.step == config.max_steps
        saves = last or session.step % config.save_steps == 0
        validates = config.val_steps and (session.step % config.val_steps == 0 or session.step == config.max_steps)
        if saves or validates:
            rows += session.settle()
        if validates:
            rows[-1] |= session.validate()
        for row in rows if file else []:
            if row["step"] % log_steps == 0 or ((saves or validates) and row is rows[-1]):
                file.append(row)
        if saves:
            only_latest = config.save_latest_checkpoint_only
            saved = commit(job.run, session.step, session.write, only_latest=only_latest) if leads else None
            report(rows[-1], saved)
        elif validates:
            report(rows[-1], None)
        if stop:
            return


def work(arguments: dict[str, Job]) -> None:
    """What Ray Train runs in every worker. An error of ours is noted, so that a restarted group does not repeat it."""
    job = arguments["job"]
    if failure_of(job.run) is not None:
        return
    os.environ.update({**ALLOCATOR, **NCCL, **os.environ})  # what is set already stays
    context, device = ray.train.get_context(), ray.train.torch.get_device()
    place = Place(rank=context.get_world_rank(), world=context.get_world_size(), device=device)
    threads = 1 if device.type == "cpu" else 4  # those that wait for a busy core cost more than they give
    torch.set_num_threads(threads)
    try:
        loop(job, place, _report)
    except SpvlaError as e:
        _note_failure(job.run, e)
        raise
    except torch.OutOfMemoryError as e:
        _note_failure(job.run, out_of_memory(job, e))
        raise


def out_of_memory(job: Job, error: torch.OutOfMemoryError) -> TrainingError:
    return TrainingError(
        f"the GPU is full at --batch_size {job.config.batch_size}; the last checkpoint stays. Lower it, and raise "
        f"--grad_accumulation_steps by the same factor ({str(error).splitlines()[0]})"
    )


def _report(row: Row, checkpoint: Path | None) -> None:
    """Hands the folder to Ray as it lies there: it is committed already."""
    numbers = {k: v for k, v in row.items() if v is not None}
    ray.train.report(
        numbers | {"training_step": int(row["step"])},
        checkpoint=ray.train.Checkpoint.from_directory(checkpoint) if checkpoint else None,
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.NO_UPLOAD,
    )


def _note_failure(run: Path, error: SpvlaError) -> None:
    parts = [error.got, error.expected, error.remedy] if isinstance(error, UserError) else []
    write_json(run / FAILURE, {"message": str(error), "parts": parts})


class Failure(TypedDict):
    """An error of ours, noted: `parts` are a UserError's got, expected and remedy."""

    message: str
    parts: Annotated[list[str], Len(3, 3)] | Annotated[list[str], Len(0, 0)]


def failure_of(run: Path) -> SpvlaError | None:
    """What the workers found that no restart can mend."""
    path = run / FAILURE
    if not path.exists():
        return None
    note = read_json(path, Failure, remedy=f"Delete {path}, and run the same command again.")
    if not note["parts"]:
        return TrainingError(note["message"])
    got, expected, remedy = note["parts"]
    return UserError(got, expected=expected, remedy=remedy)
