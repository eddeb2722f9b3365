"""Merged models beside training: the adapter of each new checkpoint folded into the base, in OpenVLA's own layout.

It happens in a thread of the command's own process, while the workers train in theirs. An adapter waits in
--adapter_tmp_dir, since its checkpoint may be gone before its turn; checkpoints that came meanwhile are passed over
when only the latest is kept.
"""

import hashlib
import shutil
import sys
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

from spvla import runs
from spvla.errors import SpvlaError
from spvla.files import new_folder
from spvla.policies.checkpoint import save_merged
from spvla.train.resume import STATE, prune
from spvla.train.thread import in_thread


class Merger:
    """`poll` often; `finish` waits for the last."""

    def __init__(self, run: Path, waiting: Path, *, only_latest: bool) -> None:
        self.run, self.only_latest = run, only_latest
        place = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]  # every self-play run has an it-0
        self.waiting = waiting / f"{run.name}-{place}"
        self.busy: Future[None] | None = None
        self.given_up: set[str] = set()

    def poll(self) -> None:
        if self.busy is not None:
            if not self.busy.done():
                return
            self.busy.result()
        self.busy = None
        if missing := self._missing():
            chosen = missing[-1] if self.only_latest else missing[0]
            self.busy = in_thread(lambda: self._try(chosen))

    def finish(self) -> None:
        self.poll()
        while self.busy is not None:
            self.busy.result()
            self.poll()
        with suppress(OSError):
            self.waiting.rmdir()

    def _missing(self) -> list[Path]:
        every = [path for _, path in runs.checkpoints(self.run) if path.name not in self.given_up]
        return [path for path in every if not (self.run / runs.MERGED / path.name).exists()]

    def _try(self, checkpoint: Path) -> None:
        """A merge that fails, say on a full disk, is told and given up: the adapter stays, and training goes on."""
        try:
            self._merge(checkpoint)
        except (OSError, SpvlaError) as e:
            self.given_up.add(checkpoint.name)
            print(f"merge  {checkpoint.name} failed: {e}", file=sys.stderr)

    def _merge(self, checkpoint: Path) -> None:
        held = self.waiting / checkpoint.name
        try:
            with new_folder(held) as folder:
                shutil.copytree(checkpoint, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(f"{STATE}*"))
        except OSError:
            if checkpoint.exists():
                raise
            return  # a newer checkpoint has taken its place
        merged = self.run / runs.MERGED / checkpoint.name
        with new_folder(merged) as folder:
            save_merged(held, folder)
        shutil.rmtree(held)
        if self.only_latest:
            prune(merged.parent, keep=merged)
        print(f"merge  {merged}", file=sys.stderr)
