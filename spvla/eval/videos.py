"""Rollout videos: mp4 (H.264) at 30 frames a second, named as OpenVLA's evaluation names them."""

import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from spvla.types import Status, Trial

FPS = 30  # the control rate is 20 Hz: videos run half as fast again, as the original's do


def encode_mp4(frames: Sequence[np.ndarray]) -> bytes:
    """frames: T of (H, W, 3) uint8, H and W multiples of 16."""
    import imageio.v2 as imageio

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        with imageio.get_writer(path, fps=FPS, macro_block_size=16, ffmpeg_log_level="error") as writer:
            for frame in frames:
                writer.append_data(np.ascontiguousarray(frame))
        return path.read_bytes()


def video_name(*, episode: int, success: bool, instruction: str) -> str:
    """episode counts from 1 within its task: init state + 1."""
    words = re.sub(r"[ \n.]", "_", instruction.lower())[:50]
    return f"episode={episode}--success={success}--task={words}.mp4"


class FilmQuota:
    """Which trials to film: so many successes and failures of each task. A trial on its way holds its place."""

    def __init__(self, *, successes: int, failures: int) -> None:
        self.limit = {Status.SUCCESS: successes, Status.FAILURE: failures}
        self.taken: Counter[tuple[str, str, int, Status]] = Counter()

    def begin(self, trial: Trial) -> frozenset[Status]:
        """The outcomes for which this trial's video is wanted."""
        wanted = frozenset(s for s, n in self.limit.items() if self.taken[_place(trial, s)] < n)
        self.taken.update(_place(trial, s) for s in wanted)
        return wanted

    def end(self, trial: Trial, wanted: frozenset[Status], filmed: Status | None) -> None:
        """Gives back the places of `wanted` that were not used."""
        self.taken.subtract(_place(trial, s) for s in wanted if s != filmed)

    def count(self, trial: Trial, status: Status) -> None:
        """A video that is there already."""
        self.taken[_place(trial, status)] += 1


def _place(trial: Trial, status: Status) -> tuple[str, str, int, Status]:
    return trial.policy, trial.suite, trial.task, status
