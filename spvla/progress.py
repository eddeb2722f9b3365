"""One progress line for a long job: redrawn in place on a terminal, a plain line every few seconds elsewhere."""

import os
import shutil
import sys
import time
from contextlib import suppress
from typing import TextIO


def format_seconds(seconds: float) -> str:
    """75 -> '1:15', 3675 -> '1:01:15'."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def width_of(terminal: TextIO) -> int:
    """Its columns; a guess where it does not say."""
    with suppress(OSError):
        if columns := os.get_terminal_size(terminal.fileno()).columns:
            return columns
    return shutil.get_terminal_size().columns


class Progress:
    """`with Progress("index", total=40, unit="episodes") as p: p.update(3, skipped=1)`.

    `update` takes the count so far, not an increment, so that a resumed job starts where it stands; time left is
    estimated from what this process did. What a narrow terminal cuts off are the fields, last ones first.
    """

    def __init__(self, label: str, *, total: int, unit: str = "", every_s: float = 10.0, out: TextIO | None = None):
        self.label, self.total, self.unit, self.every_s = label, total, unit, every_s
        self.out = out or sys.stderr
        self.start_s = time.monotonic()
        self.first: int | None = None
        self.shown_s = -float("inf")
        self.line = self.shown = ""

    def __enter__(self) -> "Progress":
        return self

    def update(self, done: int, **fields: object) -> None:
        if self.first is None:
            self.first = done
        self.line = self._format(done, fields)
        now = time.monotonic()
        if now - self.shown_s >= (0.2 if self.out.isatty() else self.every_s) or done >= self.total:
            self.shown_s = now
            self._show()

    def __exit__(self, *_: object) -> None:
        if self.line:
            if self.line != self.shown:
                self._show()
            if self.out.isatty():
                self.out.write("\n")

    def _format(self, done: int, fields: dict[str, object]) -> str:
        elapsed = time.monotonic() - self.start_s
        made = done - (self.first or 0)
        left = format_seconds(elapsed / made * (self.total - done)) if made > 0 else "?"
        extra = "".join(f"  {k.replace('_', ' ')} {v}" for k, v in fields.items())
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.label}  {done}/{self.total}{unit}  {format_seconds(elapsed)} elapsed, {left} left{extra}"

    def _show(self) -> None:
        self.shown = self.line
        if self.out.isatty():  # a line that wraps could not be redrawn in place; the last column wraps on some
            self.out.write(f"\r\x1b[K{self.line[: width_of(self.out) - 1]}")
        else:
            self.out.write(f"{self.line}\n")
        self.out.flush()
