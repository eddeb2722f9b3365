"""The report: one file, no network, everything escaped, and it says what the ledger and the metrics hold."""

import json
import re
import shutil
import sqlite3
import subprocess
import warnings
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from farm_parts import PROTOCOL, open_ledger, trials

from spvla import runs
from spvla.config import EvaluateConfig, ReportConfig, SelfplayConfig, StatusConfig
from spvla.errors import UserError
from spvla.eval.ledger import Ledger
from spvla.report import plots
from spvla.report.html import render, report
from spvla.report.story import interval, notes, tell
from spvla.status import describe
from spvla.train.selfplay import Iteration, judge
from spvla.types import Outcome, Status, Trial

HOSTILE = "pick up the <script>alert('x')</script> & place it"


def play(ledger: Ledger, trial: Trial, *, success: bool) -> None:
    status = Status.SUCCESS if success else Status.FAILURE
    assert ledger.claim(PROTOCOL.digest, trial)
    ledger.record(PROTOCOL.digest, trial, Outcome(status=status, steps=60, seconds=3.0, state_digest="d"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with two policies on two tasks (a solves all, b half of them), training curves and a sweep."""
    run = tmp_path / "run"
    runs.write_config(run, "evaluate", EvaluateConfig(pretrained_checkpoint="a", run_id_note="n"))
    with Ledger.create(run / runs.LEDGER) as ledger:
        ledger.add_protocol(PROTOCOL)
        ledger.add_tasks({("libero_object", 0): HOSTILE, ("libero_object", 1): "second task"})
        for name in ("policy-a", "policy-b"):
            ledger.add_policy(name, name=name, path=f"/{name}")
            planned = [
                Trial(policy=name, suite="libero_object", task=t, init_state=i) for t in range(2) for i in range(4)
            ]
            ledger.add_trials(PROTOCOL.digest, planned)
            for trial in planned:
                play(ledger, trial, success=name == "policy-a" or trial.init_state < 2)
    rows = [{"step": s, "total_loss": 1 / (s + 1), "grad_norm": 1.0, "action_accuracy": 0.5} for s in range(5)]
    (run / runs.METRICS).write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 5, "total_l')
    sweep = [
        {"name": f"t{b}", "step": 4, "objective": b, "status": "done", "checkpoint": f"/t{b}", "error": ""}
        | {"parameters": {"beta": b, "learning_rate": 1e-4 * b}}
        for b in (0.3, 0.7)
    ]
    (run / runs.SWEEP).write_text(json.dumps({"metric": "success_rate", "trials": sweep}))
    return run


def test_tables_hold_counts_and_wilson_intervals(run: Path) -> None:
    first, second = tell(run).evaluations
    assert [(s.successes, s.done) for s in first] == [(4, 4), (4, 4), (8, 8)]
    assert [(s.successes, s.done) for s in second] == [(2, 4), (2, 4), (4, 8)]
    # Wilson by hand: (0.5 + z²/16 -+ z sqrt(1/32 + z²/256)) / (1 + z²/8)
    assert interval(second[-1].interval) == "21.5 to 78.5%"


def test_two_policies_are_compared_over_equal_init_states_the_later_minus_the_earlier(run: Path) -> None:
    (comparison,) = tell(run).comparisons
    assert (comparison.first, comparison.second) == ("policy-b", "policy-a")
    assert (comparison.pairs, comparison.only_first, comparison.only_second) == (8, 0, 4)
    assert (comparison.difference, comparison.p_value) == ("-50.0", "0.125")  # 2 / 2^4


def test_an_iteration_and_its_comparison_have_one_sign(run: Path) -> None:
    with Ledger.open(run / runs.LEDGER) as ledger:
        rows = ledger.outcomes()
    start = Iteration(
        name="start", checkpoint="", policy="policy-a", opponent="", successes=8, trials=8, verdict="", best="start"
    )
    judged = judge(rows, "it-0", "", "policy-b", start, 0.05)
    (run / runs.HISTORY).write_text("".join(json.dumps(asdict(i)) + "\n" for i in (start, judged)))
    story = tell(run)
    assert [row.difference for row in story.history] == ["", "-50.0"]
    assert [c.difference for c in story.comparisons] == ["-50.0"]


def test_an_unfinished_evaluation_says_what_is_missing(run: Path) -> None:
    assert not tell(run).notes[1:]
    lost, waiting, mended = (Trial(policy="policy-b", suite="libero_object", task=1, init_state=i) for i in (4, 5, 6))
    with Ledger.open(run / runs.LEDGER) as ledger:
        ledger.add_trials(PROTOCOL.digest, [lost, waiting, mended])
        for trial in (lost, lost, mended):
            ledger.record_error(PROTOCOL.digest, trial, kind="hang", message="no step")
        play(ledger, mended, success=True)
    story = tell(run)
    total = story.evaluations[1][-1]
    assert (total.done, total.planned, total.errors) == (9, 11, 1)
    assert "2 of 19 trials have no outcome yet: rates are of the others." in story.notes
    assert "3 errors of the infrastructure met, 1 trial lost to them." in story.notes
    assert story.tiles[1].detail == "5 of 9 trials, 2 missing"
    assert ">9 of 11<" in render(story)
    assert any(line.endswith("9/11 trials done, 5 successes (55.6%), 1 lost to errors") for line in describe(run))


def test_a_policy_that_learnt_from_test_starts_has_seen_its_exam(run: Path, tmp_path: Path) -> None:
    for name, starts in (("policy-a", "fresh"), ("policy-b", "test")):
        learnt = {"libero_object_no_noops": {"starts": starts}, "libero_goal_no_noops": {"starts": "test"}}
        (tmp_path / name).mkdir()
        (tmp_path / name / "dataset_statistics.json").write_text(json.dumps(learnt))
        with closing(sqlite3.connect(run / runs.LEDGER)) as db, db:
            db.execute("UPDATE policies SET path = ? WHERE name = ?", (str(tmp_path / name), name))
    (note,) = [note for note in tell(run).notes if "exam" in note]
    assert note.startswith("policy-b has seen its exam: its demonstrations of libero_object begin at")


def test_every_world_that_a_ledger_has_trials_of_is_named() -> None:
    own, primitive, altered = (
        replace(PROTOCOL, world={**PROTOCOL.world, "assets": name})
        for name in ("libero", "primitives", "mine-1a2b3c4d")
    )
    said = notes([own, replace(own, seed=8), primitive, altered], [], [])
    assert len(said) == 3 and "published checkpoints" in said[0]
    assert "embedded primitive geometry" in said[1] and "mine-1a2b3c4d, whose files differ" in said[2]


def test_two_policies_of_one_name_stay_apart(run: Path) -> None:
    with closing(sqlite3.connect(run / runs.LEDGER)) as db, db:
        db.execute("UPDATE policies SET name = 'twin'")
    assert [rows[-1].successes for rows in tell(run).evaluations] == [8, 4]
    assert sum("8/8 trials done" in line for line in describe(run)) == 2
    assert [c.difference for c in tell(run).comparisons] == ["-50.0"]


def test_an_evaluation_without_any_outcome_is_told_without_a_rate(tmp_path: Path) -> None:
    runs.write_config(tmp_path, "evaluate", EvaluateConfig(pretrained_checkpoint="a"))
    open_ledger(tmp_path, trials(tasks=2, init_states=2)).close()
    story = tell(tmp_path)
    assert (story.tiles[0].value, story.success_plots) == ("-", [])
    assert ">0 of 4<" in render(story)
    assert list(describe(tmp_path))[1].endswith("0/4 trials done, 0 successes (-)")


def test_iterations_are_told_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    runs.write_config(tmp_path, "selfplay", SelfplayConfig(max_steps=100))
    for k in range(12):
        (tmp_path / f"it-{k}").mkdir()
        row = {"step": 100 + k, "total_loss": 1.0, "action_accuracy": k / 100}
        (tmp_path / f"it-{k}" / runs.METRICS).write_text(json.dumps(row) + "\n")
    (tmp_path / "it-notes").mkdir()
    assert [p.name for p in runs.iterations(tmp_path)] == [f"it-{k}" for k in range(12)]
    assert [c.title for c in tell(tmp_path).curves] == [f"Training, it-{k}" for k in range(12)]
    assert [line.split()[1] for line in list(describe(tmp_path))[1:]] == [f"it-{k}" for k in range(12)]
    steps, accuracy = tell(tmp_path).tiles
    assert (steps.value, steps.detail, accuracy.value) == ("1266", "in 12 training runs", "11.0%")  # 1200 + 66


@pytest.mark.parametrize("policies", [1, 2, 8])
def test_the_success_plot_holds_every_task_and_policy_however_long_their_names(policies: int) -> None:
    names = [f"{'a-long-name+of-a-run' * 5}/step_{n:06d}" for n in range(policies)]
    tasks = [f"{t}  {'pick up the black bowl ' * 2}" for t in range(10)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns where the labels leave no room
        drawn = plots.intervals("Success", tasks, [(name, [(0.5, 0.2, 0.8)] * 9 + [None]) for name in names])
    assert all(f">{t}  pick up" in drawn for t in range(10))
    assert [f">{name}<" in drawn for name in names] == [policies > 1] * policies


def test_one_suite_is_one_plot(run: Path) -> None:
    (drawn,) = tell(run).success_plots
    assert drawn.count("second task") == 1 and drawn.count(">policy-a<") == drawn.count(">policy-b<") == 1


def test_a_torn_last_line_of_metrics_is_left_out(run: Path) -> None:
    assert [row["step"] for row in runs.read_metrics(run)] == [0, 1, 2, 3, 4]


def test_what_a_run_contains_is_escaped(run: Path) -> None:
    page = report(ReportConfig(run=run)).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_a_sweep_is_drawn_as_a_heat_map_and_parallel_coordinates_over_words_too(run: Path) -> None:
    def trial(loss_type: str, beta: float, objective: float | None) -> dict:
        ended = {"status": "done", "checkpoint": "", "error": ""}
        parameters = {"loss_type": loss_type, "beta": beta, "image_aug": True, "learning_rate": 1e-4}
        return {"name": "t", "step": 4, "objective": objective, "parameters": parameters} | ended

    trials = [trial("hinge", 0.3, 0.25), trial("sigmoid", 0.7, 0.75), trial("<script>", 0.5, None)]
    (run / runs.SWEEP).write_text(json.dumps({"metric": "success_rate", "trials": trials}))
    section = tell(run).sweep
    assert section is not None
    assert [row[:5] for row in section.rows] == [
        ["sigmoid", "0.7", "True", "0.0001", "0.7500"],
        ["hinge", "0.3", "True", "0.0001", "0.2500"],
        ["<script>", "0.5", "True", "0.0001", "-"],
    ]
    heat_map, parallel = section.plots
    assert all(word in heat_map for word in (">beta<", ">learning_rate<", ">0.25<", ">0.75<"))
    assert "hinge" not in heat_map and "hinge" in parallel and "sigmoid" in parallel
    assert "<script" not in report(ReportConfig(run=run)).read_text()


def test_a_failed_trial_says_why(run: Path) -> None:
    failed = {"name": "t", "step": 0, "objective": None, "status": "failed", "parameters": {"beta": 0.3}}
    failed |= {"checkpoint": "", "error": "the loss is not finite"}
    (run / runs.SWEEP).write_text(json.dumps({"metric": "success_rate", "trials": [failed]}))
    assert tell(run).sweep.rows == [["0.3", "-", "failed: the loss is not finite", ""]]
    assert list(describe(run))[-1] == "trial  t  success_rate - at step 0  failed: the loss is not finite"


def test_a_heat_maps_numbers_can_be_read_on_their_colours() -> None:
    x, y = plots.Scale.of("x", [0.0, 1.0]), plots.Scale.of("y", [0.0, 1.0])
    drawn = plots.heat_map("rate", x, y, [0.41, 0.93])
    ink = {text: re.search(rf'<text style="([^"]*)"[^>]*>{text}<', drawn)[1] for text in ("0.41", "0.93")}
    assert "fill: #ffffff" in ink["0.41"] and f"fill: {plots.INK}" in ink["0.93"]


def test_words_stand_side_by_side_on_an_axis() -> None:
    words = plots.Scale.of("loss_type", ["sigmoid", "hinge", "sigmoid"])
    assert (words.numbers, words.words, words.ends) == ([1, 0, 1], ["hinge", "sigmoid"], (0, 1))
    drawn = plots.heat_map("rate", words, plots.Scale.of("beta", [0.1, 0.2, 0.3]), [0.1, 0.2, 0.3])
    assert ">hinge<" in drawn and ">sigmoid<" in drawn


def test_the_page_needs_no_network(run: Path) -> None:
    page = report(ReportConfig(run=run)).read_text()
    assert not [word for word in ('src="http', 'href="http', "url(http", "@import", "<link") if word in page]


def test_status_reads_the_folder_alone(run: Path) -> None:
    lines = "\n".join(describe(run))
    assert "policy-b  libero_object  8/8 trials done, 4 successes (50.0%)" in lines
    assert "step 4/" in lines
    assert "trial  t0.7  success_rate 0.7000 at step 4  done" in lines


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no config.json"):
        report(ReportConfig(run=tmp_path))
    with pytest.raises(UserError, match="holds no config.json"):
        list(describe(StatusConfig(run=tmp_path).run))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
def test_headless_chromium_shows_it_from_disk(run: Path, tmp_path: Path) -> None:
    page = report(ReportConfig(run=run)).resolve()
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    browser = ["chromium", *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    dom = subprocess.run(browser, capture_output=True, text=True, timeout=60).stdout
    assert "policy-a" in dom and "Version against version" in dom and dom.count("<svg") >= 5
