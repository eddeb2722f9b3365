"""The driver's loop and its counts without a cluster: against the simulated workers of bench/driver.py."""

import importlib.util
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from farm_parts import PROTOCOL, SUITE, VERSION, open_ledger, trials

from spvla.eval.driver import MOST_AT_ONCE
from spvla.eval.ledger import Ledger
from spvla.eval.messages import PolicyVersion
from spvla.eval.plan import Plan
from spvla.eval.progress import Progress
from spvla.types import Outcome, Status, Trial

BENCH = Path(__file__).resolve().parent.parent / "bench" / "driver.py"
P = PROTOCOL.digest


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> object:
    spec = importlib.util.spec_from_file_location("bench_driver", BENCH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_driver", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "START_S", 0.1)
    return module


def test_a_simulated_farm_loses_nothing_and_writes_in_few_transactions(
    bench: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors, deaths of workers and of policy servers; bench/driver.py checks that each trial has its one outcome."""
    flags = ["--workers", "600", "--servers", "4", "--trials", "3000", "--per_second", "1500", "--server_deaths", "2"]
    monkeypatch.setattr("sys.argv", ["bench/driver.py", *flags, "--errors", "0.02", "--deaths", "0.01"])
    commits: list[str] = []
    with Ledger.create(tmp_path / "ledger.sqlite") as ledger:
        ledger._db.set_trace_callback(lambda text: commits.append(text) if text == "COMMIT" else None)
        found = bench.play(bench.arguments(), ledger)
        kinds = {e.kind for e in ledger.errors()}
    assert kinds == {"exception", "environment died", "policy actor gone"}
    assert len(commits) <= 3 * found["ticks"] + 20  # not one for each of 3,000 claims and 3,000 outcomes
    assert len(commits) < 1500


def test_no_tick_begins_more_trials_than_it_may(bench: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--workers", "600", "--servers", "4", "--trials", "1200", "--per_second", "3000", "--server_deaths", "0"]
    monkeypatch.setattr("sys.argv", ["bench/driver.py", *flags])
    running = [0]
    tick = bench.Meter.tick

    def look(meter: object, driver: object) -> None:
        running.append(len(driver.running))
        tick(meter, driver)

    monkeypatch.setattr(bench.Meter, "tick", look)
    with Ledger.create(tmp_path / "ledger.sqlite") as ledger:
        bench.play(bench.arguments(), ledger)
    assert 0 < max(b - a for a, b in pairwise(running)) <= MOST_AT_ONCE


def plan_of(wanted: list[Trial], versions: list[PolicyVersion]) -> Plan:
    return Plan(
        versions=versions,
        trials=wanted,
        unnorm_keys={(v.digest, SUITE): SUITE for v in versions},
        instructions={(t.suite, t.task): f"task {t.task}" for t in wanted},
    )


def end(ledger: Ledger, trial: Trial, *, won: bool) -> None:
    status = Status.SUCCESS if won else Status.FAILURE
    assert ledger.claim(P, trial)
    assert ledger.record(P, trial, Outcome(status=status, steps=9, seconds=1.0, state_digest="d"))


def test_progress_counts_what_every_driver_wrote_and_reads_nothing_twice(tmp_path: Path) -> None:
    wanted = trials(tasks=2, init_states=3)
    with open_ledger(tmp_path, wanted) as mine, open_ledger(tmp_path, wanted) as theirs:
        end(theirs, wanted[0], won=True)
        progress = Progress(plan_of(wanted[:5], [VERSION]), mine)  # the sixth is not of this plan
        progress.refresh()
        assert progress.missing == wanted[1:5]
        end(mine, wanted[1], won=False)
        end(theirs, wanted[4], won=True)
        end(theirs, wanted[5], won=True)
        theirs.record_error(P, wanted[2], kind="hang", message="no step", worker="env-0")
        progress.refresh()
        since = progress.until
        progress.refresh()
        counts = {task: (c.done, c.planned, c.successes, c.errors) for (_, task), c in progress.tasks.items()}
    assert counts == {0: (2, 3, 1, 1), 1: (1, 2, 1, 0)}
    assert progress.missing == wanted[2:4] and progress.until == since == (4, 1)


def test_progress_settles_a_comparison_from_pairs_of_both_drivers(tmp_path: Path) -> None:
    versions = [VERSION, replace(VERSION, digest="p1", name="other")]
    wanted = trials(tasks=1, init_states=12, versions=versions)
    with open_ledger(tmp_path, wanted, versions) as mine, open_ledger(tmp_path, wanted, versions) as theirs:
        progress = Progress(plan_of(wanted, versions), mine)
        for trial in wanted[:6]:
            end(mine, trial, won=True)
        progress.refresh()
        assert progress.settled == ""
        for trial in wanted[12:20]:  # of the other policy: six of its eight make pairs
            end(theirs, trial, won=False)
        for trial in wanted[6:8]:
            end(mine, trial, won=True)
        progress.refresh()
        assert "settled after 8 of 12 pairs: the first is better" in progress.settled
