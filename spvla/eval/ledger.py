"""Every trial's outcome, exactly once, in one SQLite file.

A trial's key is (policy digest, protocol digest, suite, task, init state). A driver claims a trial before it runs it
and may write its outcome only while it holds the claim and none is written, in one transaction; so neither a kill at
any moment nor two drivers on one ledger can lose an outcome or write two. A dead driver's claims lapse: at once where
its process can be looked up, else when its heartbeat stops. Errors of the infrastructure are kept beside the trials.

One transaction may carry many claims or outcomes (`together`): it costs a wait for the disk, they do not.
"""

import os
import socket
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from spvla.errors import LedgerError
from spvla.eval.ledger_file import RESTORE, connect, explained, transaction
from spvla.eval.protocol import Protocol, require_same
from spvla.reading import form_of, require_form
from spvla.types import Outcome, Status, Trial

BEGINNING = (0, 0)  # of a ledger's history: no outcome and no error read yet
LAPSE_S = 60.0  # a driver elsewhere that has not been heard of for so long is dead

_Row = TypeVar("_Row")
_NEXT = "SELECT coalesce(max(ended), 0) + 1 FROM trials WHERE ended IS NOT NULL"
_TRIAL = "policy, suite, task, init_state"
_KEY = "policy = ? AND protocol = ? AND suite = ? AND task = ? AND init_state = ?"


@dataclass(frozen=True, kw_only=True)
class PolicyRow:
    digest: str
    name: str
    path: str


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """A planned trial; `status` is "success", "failure", or None while it has no outcome."""

    policy: str
    policy_name: str
    protocol: str
    suite: str
    task: int
    init_state: int
    instruction: str
    status: Literal["success", "failure"] | None
    steps: int | None
    seconds: float | None
    state_digest: str | None
    note: str | None
    video: str | None  # path relative to the ledger's folder
    worker: str | None
    done_at: float | None  # Unix time
    errors: int  # infrastructure errors on the way

    @property
    def trial(self) -> Trial:
        return Trial(policy=self.policy, suite=self.suite, task=self.task, init_state=self.init_state)


@dataclass(frozen=True, kw_only=True)
class ErrorRow:
    """One infrastructure error; the trial went back to pending."""

    policy: str
    policy_name: str
    protocol: str
    suite: str
    task: int
    init_state: int
    kind: str  # "environment died", "hang", "policy actor died", "exception"
    message: str
    traceback: str
    worker: str
    at: float  # Unix time


@dataclass(frozen=True, kw_only=True)
class _Erred:
    policy: str
    suite: str
    task: int
    init_state: int
    id: int

    @property
    def trial(self) -> Trial:
        return Trial(policy=self.policy, suite=self.suite, task=self.task, init_state=self.init_state)


@dataclass(frozen=True, kw_only=True)
class _Ended(_Erred):
    status: Literal["success", "failure"]


@dataclass(frozen=True, kw_only=True)
class News:
    """What came into the ledger after a point in its history, from whatever driver."""

    outcomes: list[tuple[Trial, Status]]  # in the order in which they were written
    errors: list[Trial]  # the trial of each infrastructure error
    until: tuple[int, int] = BEGINNING  # where the next news begin


class Ledger:
    """Open with `Ledger.open` (must exist) or `Ledger.create` (made when missing). One object to a process."""

    def __init__(self, path: Path, db: sqlite3.Connection) -> None:
        self.path, self._db = path, db
        self._driver: str | None = None

    @classmethod
    def open(cls, path: str | Path) -> "Ledger":
        """A ledger that is there. Raises LedgerError for none, one of another schema, or a damaged one."""
        path = Path(path)
        if not path.is_file():
            raise LedgerError(
                f"no ledger at {path}",
                expected="a ledger.sqlite written by spvla evaluate",
                remedy="Give the folder that --local_log_dir named.",
            )
        return cls._connect(path)

    @classmethod
    def create(cls, path: Path) -> "Ledger":
        path.parent.mkdir(parents=True, exist_ok=True)
        return cls._connect(path)

    @classmethod
    def _connect(cls, path: Path) -> "Ledger":
        return cls(path, connect(path))

    def close(self) -> None:
        """Gives unfinished claims back and closes the file."""
        with explained(self.path):
            if self._driver is not None:
                self._db.execute("UPDATE trials SET driver = NULL WHERE driver = ? AND status IS NULL", (self._driver,))
                self._db.execute("DELETE FROM drivers WHERE id = ?", (self._driver,))
            self._db.close()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def together(self) -> Iterator[None]:
        """All that is written inside it is written at its end, or none of it; what was claimed is held only then."""
        with explained(self.path), transaction(self._db):
            yield

    def _rows(self, query: str, values: tuple[Any, ...] = ()) -> list[sqlite3.Row]:
        with explained(self.path):
            return self._db.execute(query, values).fetchall()

    def _objects(self, kind: type[_Row], rows: list[sqlite3.Row]) -> list[_Row]:
        """Raises LedgerError: SQLite lets a column hold anything."""
        found = [dict(row) for row in rows]
        require_form(found, _form(kind), str(self.path), remedy=RESTORE, error=LedgerError)
        return [kind(**row) for row in found]

    # --- what is to be done

    def protocol(self) -> Protocol | None:
        """The one protocol of this ledger; None while it is empty."""
        every = self.protocols()
        return every[-1] if every else None

    def add_protocol(self, protocol: Protocol) -> None:
        """Binds the ledger to its protocol. Raises LedgerError if it holds another."""
        with self.together():
            if (old := self.protocol()) is not None:
                require_same(old, protocol, where=str(self.path))
            values = (protocol.digest, protocol.to_json(), time.time())
            self._db.execute("INSERT OR IGNORE INTO protocols VALUES (?, ?, ?)", values)

    def add_policy(self, digest: str, *, name: str, path: str) -> None:
        """A policy keeps the name that it came with first; a name that another policy has gets a part of the digest."""
        with self.together():
            taken = self._db.execute("SELECT 1 FROM policies WHERE name = ? AND digest != ?", (name, digest)).fetchone()
            values = (digest, f"{name}@{digest[:8]}" if taken else name, path, time.time())
            self._db.execute("INSERT OR IGNORE INTO policies VALUES (?, ?, ?, ?)", values)

    def add_tasks(self, instructions: Mapping[tuple[str, int], str]) -> None:
        """(suite, task) -> instruction."""
        rows = [(*task, text) for task, text in instructions.items()]
        with self.together():
            self._db.executemany("INSERT OR REPLACE INTO tasks VALUES (?, ?, ?)", rows)

    def add_trials(self, protocol: str, trials: Iterable[Trial]) -> None:
        """Plans trials; those that are there already stay as they are."""
        rows = [(t.policy, protocol, t.suite, t.task, t.init_state) for t in trials]
        with self.together():
            self._db.executemany(
                "INSERT OR IGNORE INTO trials (policy, protocol, suite, task, init_state) VALUES (?, ?, ?, ?, ?)", rows
            )

    # --- what is being done

    def claim(self, protocol: str, trial: Trial) -> bool:
        """Takes a trial that has no outcome and no living driver but this one. False: leave it alone."""
        key = _key(protocol, trial)
        with self.together():
            driver = self._register()
            open_claim = f"UPDATE trials SET driver = ? WHERE {_KEY} AND status IS NULL AND driver IS NULL"
            if self._db.execute(open_claim, (driver, *key)).rowcount == 1:
                return True
            row = self._db.execute(f"SELECT driver, status FROM trials WHERE {_KEY}", key).fetchone()
            assert row is not None, f"{trial} was never planned"
            if row["status"] is not None or not self._free(row["driver"]):
                return False
            self._db.execute(f"UPDATE trials SET driver = ? WHERE {_KEY}", (driver, *key))
        return True

    def release(self, protocol: str, trial: Trial) -> None:
        """Gives a claim back without an outcome."""
        with self.together():
            values = (*_key(protocol, trial), self._driver)
            self._db.execute(f"UPDATE trials SET driver = NULL WHERE {_KEY} AND driver = ? AND status IS NULL", values)

    def record(self, protocol: str, trial: Trial, outcome: Outcome, *, video: str = "", worker: str = "") -> bool:
        """Writes the outcome if this driver still holds the claim. False: it lapsed, and the trial is another's."""
        o = outcome
        values = (str(o.status), o.steps, o.seconds, o.state_digest, o.note, video, worker, time.time())
        with self.together():
            done = self._db.execute(
                "UPDATE trials SET status = ?, steps = ?, seconds = ?, state_digest = ?, note = ?, video = ?,"
                f" worker = ?, done_at = ?, ended = ({_NEXT}) WHERE {_KEY} AND driver = ? AND status IS NULL",
                (*values, *_key(protocol, trial), self._driver),
            )
            return done.rowcount == 1

    def record_error(
        self, protocol: str, trial: Trial, *, kind: str, message: str, traceback: str = "", worker: str = ""
    ) -> None:
        with self.together():
            self._db.execute(
                "INSERT INTO errors (policy, protocol, suite, task, init_state, kind, message, traceback, worker, at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*_key(protocol, trial), kind, message, traceback, worker, time.time()),
            )

    def heartbeat(self) -> None:
        """Keeps this driver's claims. Call it more often than every LAPSE_S."""
        if self._driver is not None:
            with self.together():
                self._db.execute("UPDATE drivers SET heartbeat = ? WHERE id = ?", (time.time(), self._driver))

    def _register(self) -> str:
        if self._driver is None:
            self._driver = uuid.uuid4().hex
            row = (self._driver, _machine(), os.getpid(), _process_start(os.getpid()), time.time())
            self._db.execute("INSERT INTO drivers VALUES (?, ?, ?, ?, ?)", row)
        return self._driver

    def _free(self, driver: str | None) -> bool:
        if driver is None or driver == self._driver:
            return True
        row = self._db.execute("SELECT * FROM drivers WHERE id = ?", (driver,)).fetchone()
        if row is None or time.time() - row["heartbeat"] > LAPSE_S:
            return True
        return row["machine"] == _machine() and _process_start(row["pid"]) != row["started"]

    # --- what is known: the reading side, for reports

    def news(self, since: tuple[int, int] = BEGINNING) -> News:
        """What was written after `since`, which is an earlier answer's `until`. It reads that alone."""
        ended = self._rows(
            f"SELECT {_TRIAL}, status, ended AS id FROM trials WHERE ended > ? ORDER BY ended", since[:1]
        )
        errors = self._rows(f"SELECT {_TRIAL}, id FROM errors WHERE id > ? ORDER BY id", since[1:])
        return News(
            outcomes=[(row.trial, Status(row.status)) for row in self._objects(_Ended, ended)],
            errors=[row.trial for row in self._objects(_Erred, errors)],
            until=(ended[-1]["id"] if ended else since[0], errors[-1]["id"] if errors else since[1]),
        )

    def missing(self, protocol: str, trials: Iterable[Trial]) -> list[Trial]:
        """Those of the trials that have no outcome."""
        query = f"SELECT 1 FROM trials WHERE {_KEY} AND status IS NOT NULL"
        with explained(self.path):
            return [t for t in trials if self._db.execute(query, _key(protocol, t)).fetchone() is None]

    def trials(self) -> list[TrialRow]:
        """Every planned trial, in the order policy, suite, task, init state; policies as they were added."""
        rows = self._rows(
            "SELECT t.policy, p.name AS policy_name, t.protocol, t.suite, t.task, t.init_state,"
            " coalesce(k.instruction, '') AS instruction, t.status, t.steps, t.seconds, t.state_digest, t.note,"
            " t.video, t.worker, t.done_at, coalesce(e.n, 0) AS errors"
            " FROM trials t JOIN policies p ON p.digest = t.policy"
            " LEFT JOIN tasks k ON k.suite = t.suite AND k.task = t.task"
            f" LEFT JOIN (SELECT count(*) AS n, protocol, {_TRIAL} FROM errors"
            " GROUP BY policy, protocol, suite, task, init_state) e ON e.policy = t.policy"
            " AND e.protocol = t.protocol AND e.suite = t.suite AND e.task = t.task AND e.init_state = t.init_state"
            " ORDER BY p.made_at, t.suite, t.task, t.init_state"
        )
        return self._objects(TrialRow, rows)

    def outcomes(self) -> list[TrialRow]:
        """The trials that have an outcome."""
        return [row for row in self.trials() if row.status is not None]

    def errors(self) -> list[ErrorRow]:
        rows = self._rows(
            "SELECT e.policy, p.name AS policy_name, e.protocol, e.suite, e.task, e.init_state, e.kind, e.message,"
            " e.traceback, e.worker, e.at FROM errors e JOIN policies p ON p.digest = e.policy ORDER BY e.id"
        )
        return self._objects(ErrorRow, rows)

    def policies(self) -> list[PolicyRow]:
        return self._objects(PolicyRow, self._rows("SELECT digest, name, path FROM policies ORDER BY made_at"))

    def protocols(self) -> list[Protocol]:
        """At most one, unless the file was written by something else."""
        rows = self._rows("SELECT manifest FROM protocols ORDER BY made_at")
        try:
            return [Protocol.from_json(row["manifest"]) for row in rows]
        except (TypeError, ValueError, AttributeError, RecursionError) as e:
            raise LedgerError(
                f"{self.path} describes a protocol that this spvla does not know ({e})",
                expected="the fields of spvla.eval.protocol.Protocol",
                remedy="Use the spvla that wrote it, or give another --local_log_dir.",
            ) from e


@cache
def _form(kind: type) -> Any:
    return list[form_of(kind)]


def _key(protocol: str, trial: Trial) -> tuple[str, str, str, int, int]:
    return trial.policy, protocol, trial.suite, trial.task, trial.init_state


def _machine() -> str:
    """Names the process table that a pid belongs to: host, boot, and container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _process_start(pid: int) -> str:
    """Start time of a process in clock ticks since boot, so that a pid used again is not mistaken; "" if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if stat[0] == "Z" else stat[19]
