"""A frame's picture at the policy's size, (224, 224, 3) uint8, in one of two ways that give the same bits:

StoredFrames     decodes and resizes the store's JPEG each time it is asked for
DecodedFrames    copies from a file of uint8 in which every picture was put once, by all cores

FOLDER/<digest of the data set>-<camera>-224-v1.u8    N pictures of 150,528 bytes, memory-mapped, shared by the machine
FOLDER/.lock                                          held while such a file is being made: the others wait, and use it

FOLDER is in /dev/shm if that has room, else in the cache folder. Whoever uses a file holds a shared lock on it, so what
nobody uses is told from what somebody does; where a file system knows no locks, it is left. Files in /dev/shm are
memory: the last one who leaves removes them, and what a killed process left there goes when the next file is made, or
by `spvla clean`.
"""

import fcntl
import os
import weakref
from collections.abc import Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import numpy as np

from spvla.config import FrameMode
from spvla.data.store import FrameStore
from spvla.errors import DatasetError, UserError
from spvla.files import cache_dir, flock, new_file, writing_to
from spvla.policies.openvla.images import decode_jpeg, resize_lanczos
from spvla.types import IMAGE_SIZE

SHAPE = (IMAGE_SIZE, IMAGE_SIZE, 3)
PICTURE_BYTES = IMAGE_SIZE * IMAGE_SIZE * 3
VERSION = 1  # raise when decoding or resizing gives other bits
FOLDER = "frames"  # in the cache folder
SHARE = 0.75  # of the memory that is available may be filled
SHARED_MEMORY = Path("/dev/shm")
STRIDE = 32  # pictures that a thread decodes at a time


class Frames(Protocol):
    """One data set's pictures. Threads may read at once."""

    def read(self, number: int, camera: str, out: np.ndarray) -> None:
        """Writes frame `number` of the store, as `camera` saw it, to `out` (224, 224, 3) uint8. Raises DatasetError."""


class StoredFrames:
    """From the JPEG, each time."""

    def __init__(self, store: FrameStore) -> None:
        self.store = store

    def read(self, number: int, camera: str, out: np.ndarray) -> None:
        try:
            out[...] = resize_lanczos(decode_jpeg(self.store.jpeg(number, camera)))
        except UserError as e:
            raise DatasetError(
                f"frame {number} of {self.store.folder}: {e.got}",
                expected=e.expected,
                remedy="Run spvla index again.",
            ) from e


class Held:
    """A file on which this process holds a shared lock."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, path.open("rb")
        flock(self.file, fcntl.LOCK_SH)

    def leave(self) -> None:
        """The last one who leaves a file in /dev/shm removes it."""
        with suppress(OSError), self.file:
            if self.path.is_relative_to(SHARED_MEMORY):
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.path.unlink()


class DecodedFrames:
    """From a file for each camera, which stays at least as long as this object."""

    def __init__(self, files: Mapping[str, Held]) -> None:
        self.pictures = {
            camera: np.memmap(held.file, np.uint8, "r").reshape(-1, *SHAPE) for camera, held in files.items()
        }
        for held in files.values():
            weakref.finalize(self, held.leave)

    def read(self, number: int, camera: str, out: np.ndarray) -> None:
        out[...] = self.pictures[camera][number]


def open_frames(
    stores: Sequence[FrameStore],
    cameras: Sequence[str],
    mode: FrameMode = "auto",
    *,
    threads: int = 1,
    folders: Sequence[Path] | None = None,
    memory_bytes: int | None = None,
) -> list[Frames]:
    """The pictures of each store: decoded, on `threads` cores, if `mode` says so or if they fit ("auto").

    Raises DatasetError if they are to be decoded and fit nowhere, or if a JPEG is torn.
    """
    if mode == "stored":
        return [StoredFrames(store) for store in stores]
    memory = available_memory() if memory_bytes is None else memory_bytes
    wanted = {file_name(store, camera): (store, camera) for store in stores for camera in cameras}
    for folder in own_folders() if folders is None else folders:
        with suppress(OSError), locked(folder):
            if make_missing(wanted, folder, threads, memory):
                return [DecodedFrames({c: Held(folder / file_name(s, c)) for c in cameras}) for s in stores]
    size_gib = PICTURE_BYTES * sum(len(store) for store, _ in wanted.values()) / 2**30
    if mode == "decoded":
        raise DatasetError(
            f"decoded pictures of {size_gib:.1f} GiB for --frames decoded",
            expected=f"a disk or /dev/shm that holds them, and at most {SHARE:.0%} of the free memory",
            remedy="Use a larger machine, or leave --frames out.",
        )
    return [StoredFrames(store) for store in stores]


def file_name(store: FrameStore, camera: str) -> str:
    return f"{store.digest[:32]}-{camera}-{IMAGE_SIZE}-v{VERSION}.u8"


def make_missing(wanted: Mapping[str, tuple[FrameStore, str]], folder: Path, threads: int, memory_bytes: int) -> bool:
    """Whether the folder now holds all that is wanted; False where it has no room for it."""
    missing = {
        name: (store, camera)
        for name, (store, camera) in wanted.items()
        if not (folder / name).exists() or (folder / name).stat().st_size != len(store) * PICTURE_BYTES
    }
    if not missing:
        return True
    remove_unused(folder, keep=wanted.keys() - missing.keys())
    if PICTURE_BYTES * sum(len(store) for store, _ in missing.values()) > room(folder, memory_bytes):
        return False
    for name, (store, camera) in missing.items():
        decode_all(store, camera, folder / name, threads)
    return True


def decode_all(store: FrameStore, camera: str, path: Path, threads: int) -> None:
    """Writes beside, then renames. All files of it are whole."""
    source = StoredFrames(store)
    with (
        new_file(path) as beside,
        beside.open("wb") as file,
        ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool,
    ):
        flock(file, fcntl.LOCK_EX)

        def some(first: int) -> None:
            picture = np.empty(SHAPE, np.uint8)
            for number in range(first, min(first + STRIDE, len(store))):
                source.read(number, camera, picture)
                os.pwrite(file.fileno(), picture, number * PICTURE_BYTES)

        with writing_to(path.parent):
            for _ in pool.map(some, range(0, len(store), STRIDE)):
                pass


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time makes files. Raises OSError where this user cannot write."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} is another user's")
    with (folder / ".lock").open("w") as lock:
        flock(lock, fcntl.LOCK_EX)
        yield


def remove_unused(folder: Path, *, keep: Container[str] = ()) -> None:
    """Removes the files on which no process holds a lock."""
    for path in (*folder.glob("*.u8"), *folder.glob(".*.tmp")):
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.name not in keep:
                path.unlink()


def own_folders() -> tuple[Path, Path]:
    """Where decoded pictures may lie, in the order of preference; `spvla clean` removes both."""
    return SHARED_MEMORY / f"spvla-{os.getuid()}", cache_dir() / FOLDER


def room(folder: Path, memory_bytes: int) -> float:
    """Bytes that may be written there: on a disk, too, no more than the memory that is to hold them."""
    disk = os.statvfs(folder)
    return min(0.95 * disk.f_bavail * disk.f_frsize, SHARE * memory_bytes)


def available_memory(
    meminfo: Path = Path("/proc/meminfo"),
    cgroups: Path = Path("/sys/fs/cgroup"),
    own: Path = Path("/proc/self/cgroup"),
) -> int:
    """Bytes that this process may still use: what the machine has left, and what its container does (cgroup v2, v1)."""
    lines = meminfo.read_text().splitlines()
    left = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    place = own.read_text().rpartition("0::")[2].strip().strip("/") if own.exists() else ""
    for group in {cgroups / place, cgroups, cgroups / "memory"}:
        for most, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with suppress(OSError, ValueError):  # "max" is no number
                spare = int((group / most).read_text()) - int((group / used).read_text())
                left = min(left, spare + _cached(group))
    return left


def _cached(group: Path) -> int:
    """Bytes of files in the page cache that a container's usage counts and the kernel would give back."""
    with suppress(OSError):
        entries = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(entries.get("inactive_file", entries.get("total_inactive_file", 0)))
    return 0
