"""The ledger: one outcome to a trial whatever is killed or run twice, and clear words about unsound files."""

import os
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
from farm_parts import PROTOCOL

from spvla.errors import LedgerError
from spvla.eval.ledger import Ledger
from spvla.types import Outcome, Status, Trial

P = PROTOCOL.digest
TRIALS = [Trial(policy="p0", suite="libero_object", task=t, init_state=i) for t in range(2) for i in range(3)]
WON = Outcome(status=Status.SUCCESS, steps=12, seconds=1.5, state_digest="d0")
LOST = Outcome(status=Status.FAILURE, steps=280, seconds=9.0, state_digest="d1", note="NaN action at step 3")


def planned(folder: Path) -> Ledger:
    ledger = Ledger.create(folder / "ledger.sqlite")
    ledger.add_protocol(PROTOCOL)
    ledger.add_policy("p0", name="tiny", path="/policies/tiny")
    ledger.add_tasks({("libero_object", 0): "pick the soup", ("libero_object", 1): "pick the milk"})
    ledger.add_trials(P, TRIALS)
    return ledger


def test_an_outcome_is_read_back_with_its_policy_and_instruction(tmp_path: Path) -> None:
    with planned(tmp_path) as ledger:
        assert ledger.claim(P, TRIALS[4])
        assert ledger.record(P, TRIALS[4], LOST, video="videos/x.mp4", worker="env-1")
        (row,) = ledger.outcomes()
    assert (row.trial, row.policy_name, row.instruction) == (TRIALS[4], "tiny", "pick the milk")
    assert (row.status, row.steps, row.seconds, row.state_digest) == ("failure", 280, 9.0, "d1")
    assert (row.note, row.video, row.worker, row.errors) == ("NaN action at step 3", "videos/x.mp4", "env-1", 0)


def test_an_outcome_is_written_once(tmp_path: Path) -> None:
    with planned(tmp_path) as ledger:
        ledger.claim(P, TRIALS[0])
        assert ledger.record(P, TRIALS[0], WON)
        assert not ledger.record(P, TRIALS[0], LOST)
        assert not ledger.claim(P, TRIALS[0])
        assert ledger.outcomes()[0].status == "success"


def test_an_outcome_without_a_claim_is_refused(tmp_path: Path) -> None:
    with planned(tmp_path) as ledger:
        assert not ledger.record(P, TRIALS[0], WON)


def test_planning_again_keeps_what_is_done(tmp_path: Path) -> None:
    with planned(tmp_path) as ledger:
        ledger.claim(P, TRIALS[0])
        ledger.record(P, TRIALS[0], WON)
    with planned(tmp_path) as ledger:
        assert [row.status for row in ledger.trials()] == ["success", None, None, None, None, None]


def test_two_drivers_at_once_share_the_trials(tmp_path: Path) -> None:
    with planned(tmp_path) as one, Ledger.create(tmp_path / "ledger.sqlite") as two:
        taken_by_one = [one.claim(P, t) for t in TRIALS[:4]]
        taken_by_two = [two.claim(P, t) for t in TRIALS]
        assert taken_by_one == [True] * 4
        assert taken_by_two == [False] * 4 + [True] * 2
        assert not two.record(P, TRIALS[0], LOST)
        assert one.record(P, TRIALS[0], WON)
        one.release(P, TRIALS[1])
        assert two.claim(P, TRIALS[1])


def test_closing_gives_claims_back(tmp_path: Path) -> None:
    with planned(tmp_path) as one:
        one.claim(P, TRIALS[0])
    with planned(tmp_path) as two:
        assert two.claim(P, TRIALS[0])


def test_the_claims_of_a_killed_driver_lapse_at_once(tmp_path: Path) -> None:
    planned(tmp_path).close()
    script = (
        "import sys; from pathlib import Path; from test_ledger import *\n"
        "ledger = Ledger.open(Path(sys.argv[1])); assert ledger.claim(P, TRIALS[0]); print('claimed', flush=True)\n"
        "sys.stdin.read()"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "ledger.sqlite")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"PYTHONPATH": "tests"},
    )
    assert driver.stdout.readline() == b"claimed\n"
    with Ledger.open(tmp_path / "ledger.sqlite") as ledger:
        assert not ledger.claim(P, TRIALS[0])
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
        assert ledger.claim(P, TRIALS[0])


def test_a_driver_that_lost_its_claim_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with planned(tmp_path) as slow, Ledger.open(tmp_path / "ledger.sqlite") as quick:
        slow.claim(P, TRIALS[0])
        monkeypatch.setattr("spvla.eval.ledger.LAPSE_S", -1.0)
        assert quick.claim(P, TRIALS[0])
        assert not slow.record(P, TRIALS[0], LOST)
        assert quick.record(P, TRIALS[0], WON)


def test_drivers_that_start_at_once_make_one_ledger(tmp_path: Path) -> None:
    for i in range(15):
        together = Barrier(8)

        def start(path: Path = tmp_path / str(i) / "ledger.sqlite", together: Barrier = together) -> None:
            together.wait()
            Ledger.create(path).close()

        with ThreadPoolExecutor(8) as threads:
            for started in [threads.submit(start) for _ in range(8)]:
                started.result()


def test_policies_of_one_name_are_told_apart(tmp_path: Path) -> None:
    with planned(tmp_path) as ledger:
        ledger.add_policy("0123456789", name="tiny", path="/elsewhere/tiny")
        ledger.add_policy("0123456789", name="tiny", path="/elsewhere/tiny")
        assert [p.name for p in ledger.policies()] == ["tiny", "tiny@01234567"]


def test_errors_stand_beside_the_trial_and_not_in_it(tmp_path: Path) -> None:
    with planned(tmp_path) as ledger:
        ledger.claim(P, TRIALS[0])
        ledger.record_error(P, TRIALS[0], kind="hang", message="no step for 120 s", worker="env-2")
        ledger.release(P, TRIALS[0])
        assert ledger.trials()[0].status is None and ledger.trials()[0].errors == 1
        (error,) = ledger.errors()
        assert (error.kind, error.worker, error.policy_name) == ("hang", "env-2", "tiny")


def test_another_protocol_is_refused_naming_the_difference(tmp_path: Path) -> None:
    with planned(tmp_path) as ledger, pytest.raises(LedgerError, match="center_crop: True -> False"):
        ledger.add_protocol(replace(PROTOCOL, center_crop=False))
    with planned(tmp_path) as ledger, pytest.raises(LedgerError, match="assets: primitives -> libero"):
        ledger.add_protocol(replace(PROTOCOL, world={**PROTOCOL.world, "assets": "libero"}))


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    planned(tmp_path).close()
    db = sqlite3.connect(tmp_path / "ledger.sqlite")
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(LedgerError, match=r"schema 99.*newer"):
        Ledger.open(tmp_path / "ledger.sqlite")


@pytest.mark.parametrize("damage", ["not a database", "torn pages"])
def test_a_corrupt_file_is_refused_and_kept(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "ledger.sqlite"
    if damage == "not a database":
        path.write_bytes(b"x" * 5000)
    else:
        planned(tmp_path).close()
        path.write_bytes(path.read_bytes()[:5000])
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="move it away"):
        Ledger.open(path)
    assert path.read_bytes() == before


def test_a_foreign_database_is_refused(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "ledger.sqlite")
    db.execute("CREATE TABLE songs (name TEXT)")
    db.close()
    with pytest.raises(LedgerError, match="something else"):
        Ledger.create(tmp_path / "ledger.sqlite")


def test_a_missing_ledger_is_not_made_by_reading(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="no ledger"):
        Ledger.open(tmp_path / "ledger.sqlite")
    assert not (tmp_path / "ledger.sqlite").exists()


def test_a_full_disk_is_said_and_loses_nothing(tmp_path: Path) -> None:
    with planned(tmp_path) as ledger:
        ledger.claim(P, TRIALS[0])
        ledger.record(P, TRIALS[0], WON)
        pages = ledger._db.execute("PRAGMA page_count").fetchone()[0]
        ledger._db.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own way to a full disk
        with pytest.raises(LedgerError, match=r"full.*Free the disk"):
            ledger.record_error(P, TRIALS[1], kind="hang", message="x" * 100_000)
        ledger._db.execute(f"PRAGMA max_page_count = {pages + 1000}")
        assert len(ledger.outcomes()) == 1
        assert ledger.claim(P, TRIALS[1])


def test_what_is_written_together_is_written_together_or_not_at_all(tmp_path: Path) -> None:
    with planned(tmp_path) as one, Ledger.open(tmp_path / "ledger.sqlite") as two:
        with one.together():
            assert [one.claim(P, t) for t in TRIALS[:3]] == [True] * 3
            assert two.missing(P, TRIALS) == TRIALS
        with pytest.raises(KeyboardInterrupt), one.together():
            assert one.record(P, TRIALS[0], WON)
            one.record_error(P, TRIALS[1], kind="hang", message="no step", worker="env-0")
            raise KeyboardInterrupt
        assert two.outcomes() == [] and two.errors() == []
        with one.together():
            assert one.record(P, TRIALS[0], WON) and not one.record(P, TRIALS[0], LOST)
            assert one.record(P, TRIALS[1], LOST) and not one.record(P, TRIALS[3], LOST)  # never claimed
        assert [row.status for row in two.outcomes()] == ["success", "failure"]
        assert two.missing(P, TRIALS) == TRIALS[2:]


def test_a_commit_that_fails_leaves_nothing_half_open(tmp_path: Path) -> None:
    with planned(tmp_path) as ledger:
        pages = ledger._db.execute("PRAGMA page_count").fetchone()[0]
        ledger._db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(LedgerError, match="full"), ledger.together():
            ledger.claim(P, TRIALS[0])
            ledger.record_error(P, TRIALS[0], kind="hang", message="x" * 100_000)
        ledger._db.execute(f"PRAGMA max_page_count = {pages + 1000}")
        assert ledger.claim(P, TRIALS[1]) and ledger.record(P, TRIALS[1], WON)
        with Ledger.open(tmp_path / "ledger.sqlite") as other:
            assert [row.trial for row in other.outcomes()] == [TRIALS[1]] and other.errors() == []


def test_news_are_what_came_since_from_whatever_driver(tmp_path: Path) -> None:
    with planned(tmp_path) as one, Ledger.open(tmp_path / "ledger.sqlite") as two:
        assert (one.news().outcomes, one.news().errors) == ([], [])
        for ledger, trial, outcome in ((one, TRIALS[2], WON), (two, TRIALS[0], LOST)):
            ledger.claim(P, trial)
            ledger.record(P, trial, outcome)
        first = one.news()
        assert first.outcomes == [(TRIALS[2], Status.SUCCESS), (TRIALS[0], Status.FAILURE)]
        two.record_error(P, TRIALS[1], kind="hang", message="no step", worker="env-0")
        second = one.news(first.until)
        assert (second.outcomes, second.errors) == ([], [TRIALS[1]])
        two.claim(P, TRIALS[1])
        two.record(P, TRIALS[1], WON)
        third = one.news(second.until)
        assert (third.outcomes, third.errors) == ([(TRIALS[1], Status.SUCCESS)], [])
        assert one.news(third.until).until == third.until


def test_a_tick_reads_by_indices_alone(tmp_path: Path) -> None:
    """Each statement of claiming, recording and news: none may pass over a whole table."""
    with planned(tmp_path) as ledger:
        said: list[str] = []
        ledger._db.set_trace_callback(said.append)
        ledger.claim(P, TRIALS[0])
        ledger.record(P, TRIALS[0], WON)
        ledger.claim(P, TRIALS[1])
        ledger.release(P, TRIALS[1])
        ledger.news((1, 1))
        ledger.missing(P, TRIALS)
        ledger._db.set_trace_callback(None)
        statements = [text for text in said if text.startswith(("SELECT", "UPDATE"))]
        plans = [row["detail"] for text in statements for row in ledger._db.execute(f"EXPLAIN QUERY PLAN {text}")]
    assert len(statements) >= 8 and any("trials_ended" in plan for plan in plans)
    assert not [plan for plan in plans if plan.startswith("SCAN") and "CONSTANT" not in plan]


OLD_TABLES = """
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
PRAGMA application_id = 1397773889;
PRAGMA user_version = 1;
INSERT INTO policies VALUES ('p0', 'tiny', '/policies/tiny', 1.0);
INSERT INTO tasks VALUES ('libero_object', 0, 'pick the soup');
"""


def old_ledger(path: Path) -> None:
    """As the first version wrote them: three trials, of which the second ended before the first."""
    db = sqlite3.connect(path)
    db.executescript(OLD_TABLES)
    db.execute("INSERT INTO protocols VALUES (?, ?, 1.0)", (P, PROTOCOL.to_json()))
    rows = [(0, "success", 20.0), (1, "failure", 10.0), (2, None, None)]
    query = "INSERT INTO trials VALUES ('p0', ?, 'libero_object', 0, ?, 'd', ?, 9, 1.0, 's', '', '', 'env-0', ?)"
    db.executemany(query, [(P, *row) for row in rows])
    db.execute("INSERT INTO errors VALUES (1, 'p0', ?, 'libero_object', 0, 2, 'hang', 'm', '', 'env-0', 5.0)", (P,))
    db.commit()
    db.close()


def test_an_older_ledger_is_brought_up_to_date_and_goes_on(tmp_path: Path) -> None:
    old_ledger(tmp_path / "ledger.sqlite")
    one, two, three = TRIALS[:3]
    with Ledger.open(tmp_path / "ledger.sqlite") as ledger:
        assert [(row.status, row.errors) for row in ledger.trials()] == [("success", 0), ("failure", 0), (None, 1)]
        news = ledger.news()
        assert news.outcomes == [(two, Status.FAILURE), (one, Status.SUCCESS)] and news.errors == [three]
        assert ledger.claim(P, three) and ledger.record(P, three, WON)
        assert ledger.news(news.until).outcomes == [(three, Status.SUCCESS)]
    with Ledger.open(tmp_path / "ledger.sqlite") as ledger:
        assert len(ledger.news().outcomes) == 3


def test_an_older_ledger_that_may_not_be_written_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old_ledger(tmp_path / "ledger.sqlite")
    before = (tmp_path / "ledger.sqlite").read_bytes()
    monkeypatch.setattr("spvla.eval.ledger_file.os.access", lambda *_: False)  # root may write everywhere
    with Ledger.open(tmp_path / "ledger.sqlite") as ledger:
        assert [row.errors for row in ledger.trials()] == [0, 0, 1]
    assert (tmp_path / "ledger.sqlite").read_bytes() == before
