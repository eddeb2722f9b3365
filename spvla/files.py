"""Files, safely: whole or not at all, and never outside the folder they belong to."""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from spvla.errors import UserError

SHA256_LENGTH = 64  # hex digits
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,199}")


def safe_name(name: str, *, what: str) -> str:
    """Returns `name` if it can be one path component, else raises: no separators, no `..`, no control characters."""
    if _SAFE_NAME.fullmatch(name) and ".." not in name:
        return name
    raise UserError(
        f"{what} {name!r} cannot be a file name",
        expected="letters, digits and ._+=- (200 at most, the first a letter or digit)",
        remedy=f"Choose another {what}.",
    )


def readable_name(text: str, *, exact: str) -> str:
    """`text` as one path component. Where it had to be changed or cut, or says less than `exact`, a digest of that
    follows: what differs never shares a name."""
    safe = re.sub(r"[^A-Za-z0-9._+=-]", "_", text).replace("..", "__").lstrip("._+=-")
    if safe == exact and _SAFE_NAME.fullmatch(safe):
        return safe
    return f"{safe[:180]}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}".lstrip("-")


def paths_in(text: str) -> list[str]:
    """The paths of a comma-separated list. A comma inside a path belongs to it, if only so there is such a folder, as
    Ray Tune makes them; the longest wins."""
    words, found = text.split(","), []
    while words:
        joined = (",".join(words[:n]) for n in range(len(words), 1, -1))
        path = next((p for p in joined if is_folder(Path(os.path.expanduser(p)))), words[0])
        found.append(path)
        words = words[path.count(",") + 1 :]
    return [path for path in found if path]


def expanded(path: Path, *, flag: str) -> Path:
    """The absolute path, with a user's home for ~. Raises UserError for nobody's home or a circle of links."""
    try:
        return path.expanduser().resolve()
    except RuntimeError as e:
        expected = "a user who exists after ~, and no circle of links"
        raise UserError(f"{flag} {path}", expected=expected, remedy="Correct the path.") from e


def is_folder(path: Path) -> bool:
    """As `Path.is_dir`; False, too, for what can be no path: a name that is too long, another user's closed folder."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` that takes its name when the block ends well, and vanishes when it does not: a reader
    sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """The whole file or none of it, on the disk when this returns."""
    with new_file(path) as beside, beside.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a folder beside `path` that takes its name when the block ends well, and vanishes when it does not.

    An older folder of that name is whole until the moment of the rename. Where it can be removed but not renamed, as
    one of a container's image, it goes when the new one is complete.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        old = _set_aside(path) if path.exists() else None
        beside.replace(path)
        if old:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def create_once(path: Path, write: Callable[[Path], object]) -> Path:
    """`path`, filled by `write` where it is missing. Of several processes that come at once, the first one's stays."""
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        write(beside)
        beside.rename(path)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return path


def remembered(kind: str, files: Sequence[Path], digest: Callable[[], str]) -> str:
    """`digest()`, a sha256 of `files` taken in the way called `kind`.

    Kept in the cache folder for as long as none of the files changes its size or time of change. Several processes may
    ask at once. A cache that cannot be written costs only the time.
    """
    facts = [kind, *((str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns) for f in files)]
    memory = cache_dir() / "digests" / hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    with suppress(OSError):
        if len(known := memory.read_text()) == SHA256_LENGTH:
            return known
    found = digest()
    with suppress(OSError):
        write_text(memory, found)
    return found


def discard(folder: Path) -> None:
    """Removes a folder that others may read: renamed first, so that they find it whole or not at all."""
    if gone := _set_aside(folder):
        shutil.rmtree(gone)


def _set_aside(folder: Path) -> Path | None:
    """The folder's new name beside it; None where it had to be removed instead."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        return folder.replace(old)
    except OSError as e:
        if e.errno != errno.EXDEV:  # overlayfs's answer for a folder of a lower layer
            raise
    shutil.rmtree(folder)
    return None


def require_writable(folder: Path, *, flag: str) -> Path:
    """Creates `folder` and proves that a file can be written there; returns it absolute."""
    folder = expanded(folder, flag=flag)
    probe = folder / f".write-probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("x")
        probe.unlink()
    except OSError as e:
        raise UserError(
            f"{flag} {folder} cannot be written ({e.strerror})",
            expected="a folder this user can write to, on a disk with room",
            remedy=f"Give another {flag}, or free the disk.",
        ) from e
    return folder


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """What the disk refuses becomes one line."""
    try:
        yield
    except OSError as e:
        raise UserError(
            f"{folder} takes no more ({e.strerror})",
            expected="a disk with room, still mounted for writing",
            remedy="Free the disk and run the same command again; what was recorded is safe.",
        ) from e


def flock(file: IO[Any], how: int) -> str:
    """Takes fcntl's lock `how`. Empty, or why this file system knows no locks: nobody else is kept from it, then.
    Raises BlockingIOError where another holds it, if `how` says not to wait."""
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        raise
    except OSError as e:
        return str(e.strerror)
    return ""


@contextmanager
def locked(folder: Path, *, expected: str, remedy: str) -> Iterator[None]:
    """Holds a folder for this process; the lock ends with the process, however that ends. Raises UserError where
    another holds it. A file system that knows no locks is one that nobody else is kept from."""
    with (folder / ".lock").open("a+") as f:
        try:
            lacking = flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            f.seek(0)
            got = f"{folder} is being written by process {f.read().strip() or '(unknown)'}"
            raise UserError(got, expected=expected, remedy=remedy) from e
        if lacking:
            print(f"{folder} cannot be locked ({lacking}): start no second command on it", file=sys.stderr)
        f.truncate(0)
        f.write(str(os.getpid()))
        f.flush()
        yield


def cache_dir() -> Path:
    """Where generated things live between runs: SPVLA_CACHE, else the user's cache folder.

    Where the latter cannot be written (a container's HOME, say), a folder of this user's below the temporary one: it is
    as good until the machine is cleaned. Raises UserError where nothing can be written.
    """
    if given := os.environ.get("SPVLA_CACHE"):
        folder = expanded(Path(given), flag="SPVLA_CACHE")
        return folder if can_be_written(folder) else require_writable(folder, flag="SPVLA_CACHE")
    with suppress(RuntimeError):  # a user without a home
        own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spvla"
        if can_be_written(own):
            return own
    return _temporary_cache()


def can_be_written(folder: Path) -> bool:
    """Whether this user may create files in `folder`, which is made where that is possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _temporary_cache() -> Path:
    """A folder that this user alone can enter, since digests in it are believed."""
    try:
        folder = Path(tempfile.gettempdir()) / f"spvla-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as e:
        raise _no_cache(str(e)) from e
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise _no_cache(f"{folder} is not this user's alone")
    return folder


def _no_cache(why: str) -> UserError:
    return UserError(
        f"neither the user's cache folder nor the temporary one can be used ({why})",
        expected="a folder for generated files that this user can write to",
        remedy="Name one with SPVLA_CACHE.",
    )


@contextmanager
def without_stderr() -> Iterator[None]:
    """Drops what is written to file descriptor 2, C libraries' messages included. An exception still says its own."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
