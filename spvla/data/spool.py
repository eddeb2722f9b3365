"""Episodes that wait on disk until their data set is complete: a long recording goes on after a kill.

FOLDER/task_03_take_0012.npz      an episode
FOLDER/task_03_take_0013.failed   a take that was no success
"""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from spvla.errors import DatasetError
from spvla.files import new_file, writing_to
from spvla.types import Episode

_NAME = re.compile(r"task_(\d+)_take_(\d+)\.(npz|failed)")


class Spool:
    """Takes, by (task, take). One that was cut short while being written was never there."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def takes(self) -> dict[tuple[int, int], bool]:
        """(task, take) -> whether it was a success. Reads them all: a damaged one is removed, and so made again."""
        names = filter(None, (_NAME.fullmatch(file.name) for file in sorted(self.folder.iterdir())))
        return {(int(m[1]), int(m[2])): m[3] == "npz" for m in names if m[3] == "failed" or self._is_whole(m[0])}

    def _is_whole(self, file_name: str) -> bool:
        try:
            self.read(Path(file_name).stem)
        except DatasetError as e:
            print(f"{e.got}: it is made again", file=sys.stderr)
            (self.folder / file_name).unlink()
            return False
        return True

    def put(self, task: int, take: int, episode: Episode | None) -> None:
        file = self.folder / self.name(task, take)
        with writing_to(self.folder):
            if episode is None:
                file.with_suffix(".failed").touch()
                return
            with new_file(file.with_suffix(".npz")) as beside, beside.open("wb") as opened:
                np.savez(opened, **_to_arrays(episode))

    @staticmethod
    def name(task: int, take: int) -> str:
        return f"task_{task:02d}_take_{take:04d}"

    def read(self, name: str) -> Episode:
        """Raises DatasetError for a damaged one."""
        file = self.folder / f"{name}.npz"
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return _from_arrays(arrays)
        except Exception as e:  # zipfile and numpy raise a dozen kinds for bytes that are not theirs
            raise DatasetError(
                f"the take {file} is damaged ({type(e).__name__})",
                expected="an episode as it was written",
                remedy="Run the same command again: it makes this take anew.",
            ) from e


def _to_arrays(episode: Episode) -> dict[str, np.ndarray]:
    return {
        "images": _joined(episode.images),
        "image_sizes": np.array([len(image) for image in episode.images]),
        "wrist_images": _joined(episode.wrist_images),
        "wrist_image_sizes": np.array([len(image) for image in episode.wrist_images]),
        "states": episode.states,
        "joint_states": episode.joint_states,
        "actions": episode.actions,
        "words": np.array([episode.instruction, episode.source]),
    }


def _from_arrays(arrays: np.lib.npyio.NpzFile) -> Episode:
    instruction, source = arrays["words"]
    return Episode(
        images=list(_split(arrays["images"], arrays["image_sizes"])),
        wrist_images=list(_split(arrays["wrist_images"], arrays["wrist_image_sizes"])),
        states=arrays["states"],
        joint_states=arrays["joint_states"],
        actions=arrays["actions"],
        instruction=str(instruction),
        source=str(source),
    )


def _joined(images: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(images), np.uint8)


def _split(joined: np.ndarray, sizes: np.ndarray) -> Iterator[bytes]:
    ends = np.cumsum(sizes)
    for start, end in zip(ends - sizes, ends, strict=True):
        yield joined[start:end].tobytes()
