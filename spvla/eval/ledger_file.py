"""The ledger's file: its tables, how an older one is brought up to date, and SQLite's complaints in clear words."""

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spvla.errors import LedgerError

SCHEMA = 2
APPLICATION_ID = 0x53505641  # "SPVA", in the file's header
BUSY_S = 30.0
RESTORE = "The file is damaged: put a backup in its place, or move it away and run again."
CACHE_KIB = 16 * 1024

# Schema 1. A new file is made as it, and then brought up to date like an old one.
_TABLES = """
CREATE TABLE protocols (digest TEXT PRIMARY KEY, manifest TEXT NOT NULL, made_at REAL NOT NULL);
CREATE TABLE policies (digest TEXT PRIMARY KEY, name TEXT NOT NULL, path TEXT NOT NULL, made_at REAL NOT NULL);
CREATE TABLE tasks (suite TEXT, task INTEGER, instruction TEXT NOT NULL, PRIMARY KEY (suite, task));
CREATE TABLE drivers (id TEXT PRIMARY KEY, machine TEXT NOT NULL, pid INTEGER NOT NULL, started TEXT NOT NULL,
  heartbeat REAL NOT NULL);
CREATE TABLE trials (
  policy TEXT, protocol TEXT, suite TEXT, task INTEGER, init_state INTEGER, driver TEXT,
  status TEXT, steps INTEGER, seconds REAL, state_digest TEXT, note TEXT, video TEXT, worker TEXT, done_at REAL,
  PRIMARY KEY (policy, protocol, suite, task, init_state)) WITHOUT ROWID;
CREATE TABLE errors (
  id INTEGER PRIMARY KEY, policy TEXT, protocol TEXT, suite TEXT, task INTEGER, init_state INTEGER,
  kind TEXT NOT NULL, message TEXT NOT NULL, traceback TEXT NOT NULL, worker TEXT NOT NULL, at REAL NOT NULL);
"""

# Schema 2. `ended` counts outcomes in the order in which they were written: writers take turns, so whoever has read up
# to one number finds everything that came since above it.
_TO_SCHEMA_2 = """
ALTER TABLE trials ADD COLUMN ended INTEGER;
UPDATE trials SET ended = n FROM (
  SELECT policy AS p, protocol AS r, suite AS s, task AS k, init_state AS i, row_number() OVER (ORDER BY done_at) AS n
  FROM trials WHERE status IS NOT NULL)
  WHERE policy = p AND protocol = r AND suite = s AND task = k AND init_state = i;
CREATE INDEX trials_ended ON trials (ended) WHERE ended IS NOT NULL;
CREATE INDEX errors_of_trials ON errors (policy, protocol, suite, task, init_state);
"""


def connect(path: Path) -> sqlite3.Connection:
    """Opens the file, makes its tables if it is empty, and brings an older one up to date where it can be written.

    Raises LedgerError for anything that is not a sound ledger of this schema or an older one.
    """
    with explained(path):
        db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
        db.row_factory = sqlite3.Row
        try:
            _prepare(db, path)
        except BaseException:
            db.close()
            raise
        return db


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    empty = not db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()  # first: another may fill it now
    schema = db.execute("PRAGMA user_version").fetchone()[0]
    mark = db.execute("PRAGMA application_id").fetchone()[0]
    if not empty and mark != APPLICATION_ID:
        raise LedgerError(
            f"{path} is an SQLite file of something else",
            expected="a ledger written by spvla",
            remedy="Give another --local_log_dir.",
        )
    if schema > SCHEMA:
        raise LedgerError(
            f"{path} has ledger schema {schema}",
            expected=f"schema {SCHEMA} or older",
            remedy="It was written by a newer spvla: install that one, or give another --local_log_dir.",
        )
    if not empty and (found := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
        raise sqlite3.DatabaseError(found)
    db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
    writable = os.access(path.parent, os.W_OK) and os.access(path, os.W_OK)
    if writable:
        _journal(db)
        db.execute("PRAGMA synchronous = FULL")
    if schema < SCHEMA and (empty or writable):
        with transaction(db):
            _update(db)


def _update(db: sqlite3.Connection) -> None:
    """Inside a transaction; another process may just have done the same."""
    if not db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
        _run(db, _TABLES)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    if db.execute("PRAGMA user_version").fetchone()[0] < SCHEMA:
        _run(db, _TO_SCHEMA_2)
        db.execute(f"PRAGMA user_version = {SCHEMA}")


def _run(db: sqlite3.Connection, script: str) -> None:
    for statement in filter(str.strip, script.split(";")):
        db.execute(statement)


def _journal(db: sqlite3.Connection) -> None:
    """Two that change to a write-ahead log at once do not wait for each other by themselves."""
    deadline_s = time.monotonic() + BUSY_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as e:
            if "locked" not in str(e) or time.monotonic() > deadline_s:
                raise
            time.sleep(0.02)


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All of what is written inside it, or nothing. Inside another it is a part of that one."""
    if db.in_transaction:
        yield
        return
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # a full disk rolls back by itself
            db.execute("ROLLBACK")
        raise


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """SQLite's complaints, as one clear line. Nothing is ever deleted or overwritten."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise  # ours
    except (sqlite3.DatabaseError, UnicodeDecodeError) as e:  # the latter where its own message quotes the damage
        text = str(e)
        if "locked" in text or "busy" in text:
            remedy = "Another process holds it: wait for that one, or give another --local_log_dir."
        elif "full" in text or "I/O" in text:
            remedy = "Free the disk and run the same command again; what was recorded is safe."
        elif "readonly" in text or "unable to open" in text:
            remedy = "Give a --local_log_dir on a local disk that can be written."
        else:
            remedy = RESTORE
        raise LedgerError(f"{path} cannot be used ({text})", expected="a sound ledger", remedy=remedy) from e
