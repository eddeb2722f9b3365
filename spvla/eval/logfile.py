"""OpenVLA's evaluation log: the same lines, for the same scripts that read them.

The original plays one trial after another and prints as it goes. A farm ends them in any order, so the log is written
from the ledger, in the original's order, when the run ends or is interrupted.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from spvla.eval.ledger import TrialRow
from spvla.files import safe_name, write_text

TIME = "%Y_%m_%d-%H_%M_%S"
NAME_PART = 60  # characters of a policy's name


def log_name(suite: str, *, at: datetime, note: str | None) -> str:
    """EVAL-libero_spatial-openvla-2026_01_31-12_00_00--note.txt"""
    name = f"EVAL-{suite}-openvla-{at:{TIME}}"
    return safe_name(f"{name}--{note}.txt" if note else f"{name}.txt", what="run_id_note")


def name_part(text: str) -> str:
    """A policy's name as the end of a note: whatever its folder is called."""
    return re.sub(r"[^A-Za-z0-9._+=-]|\.\.+", "-", text)[-NAME_PART:]


def refuse_note(note: str | None, suites: Sequence[str]) -> None:
    """Raises UserError where some log of an evaluation of these suites could not be named so."""
    log_name(max(suites, key=len), at=datetime.now(), note=f"{note or ''}--{'x' * NAME_PART}")


def log_text(rows: Sequence[TrialRow]) -> str:
    """`rows` of one policy on one suite, in the order task, init state; those without an outcome are left out."""
    done = [r for r in rows if r.status is not None]
    lines = [f"Task suite: {rows[0].suite}"] if rows else []
    successes = of_task = of_task_won = 0
    for n, row in enumerate(done, start=1):
        won = row.status == "success"
        successes, of_task, of_task_won = successes + won, of_task + 1, of_task_won + won
        lines += ["", f"Task: {row.instruction}", f"Starting episode {of_task}...", f"Success: {won}"]
        lines += [f"# episodes completed so far: {n}", f"# successes: {successes} ({successes / n * 100:.1f}%)"]
        if n == len(done) or done[n].task != row.task:
            lines.append(f"Current task success rate: {of_task_won / of_task}")
            lines.append(f"Current total success rate: {successes / n}")
            of_task = of_task_won = 0
    return "\n".join(lines) + "\n"


def write_log(folder: Path, rows: Sequence[TrialRow], *, at: datetime, note: str | None) -> Path:
    """The log of outcomes, unless one that was written after the last of them is there: that one is returned."""
    path = folder / log_name(rows[0].suite, at=at, note=note)
    stamp = f"{at:{TIME}}"
    for older in folder.glob(path.name.replace(stamp, "?" * len(stamp))):
        if older.stat().st_mtime >= max(row.done_at or 0 for row in rows):
            return older
    write_text(path, log_text(rows))
    return path
