"""The live line: redrawn in place on a terminal of any width, plain lines elsewhere."""

import io
import os
import re
import termios
from collections.abc import Iterator
from typing import TextIO

import pytest

from spvla.progress import Progress, format_seconds

METRICS = {"loss": "0.6831", "accuracy": "0.09821", "margin": "9.537e-08", "samples/s": "40.12"}


@pytest.fixture
def terminal() -> Iterator[tuple[TextIO, int]]:
    """A terminal of 60 columns: its program's end, and a file descriptor of what is to be seen on it."""
    seen, end = os.openpty()
    termios.tcsetwinsize(end, (24, 60))
    with open(end, "w") as out:
        yield out, seen
    os.close(seen)


def test_a_line_is_cut_before_it_would_wrap_and_so_is_redrawn_in_place(terminal: tuple[TextIO, int]) -> None:
    out, seen = terminal
    with Progress("it-0", total=10_000, unit="steps", out=out) as progress:
        progress.update(1000, **METRICS)
        assert len(progress.line) > 60
    shown = ""
    while not shown.endswith("\r\n"):  # a busy system hands over in parts what was written at once
        shown += os.read(seen, 4096).decode()
    assert shown.startswith("\r\x1b[Kit-0  1000/10000 steps  ")
    assert len(shown.removeprefix("\r\x1b[K").rstrip()) <= 59


def test_what_a_narrow_terminal_cuts_off_is_a_metric_and_never_the_time_left() -> None:
    progress = Progress("it-0", total=10_000, unit="steps", out=io.StringIO())
    progress.update(1000, **METRICS)
    assert re.match(r"it-0  1000/10000 steps  0:0\d elapsed, \? left  loss 0.6831  accuracy", progress.line)


def test_a_file_gets_whole_lines() -> None:
    out = io.StringIO()
    with Progress("it-0", total=10_000, unit="steps", out=out) as progress:
        progress.update(1000, **METRICS)
    assert out.getvalue().endswith("samples/s 40.12\n") and "\x1b" not in out.getvalue()


def test_seconds_read_as_a_clock() -> None:
    assert [format_seconds(s) for s in (5, 75, 3675)] == ["0:05", "1:15", "1:01:15"]
