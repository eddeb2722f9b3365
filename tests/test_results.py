"""What the ledger's rows become: tables, OpenVLA's log, exports, the live view, videos."""

import csv
import io
import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
from farm_parts import PROTOCOL, SUITE, VERSION, open_ledger, trials

from spvla.config import EvaluateConfig
from spvla.errors import UserError
from spvla.eval.batcher import BatchStats
from spvla.eval.console import EvaluationConsole, ProgressView, TaskCounts, rich_table
from spvla.eval.exports import export, log_results, open_wandb
from spvla.eval.ledger import Ledger
from spvla.eval.logfile import log_name, log_text, name_part, refuse_note
from spvla.eval.settle import PairCounter, Pairs
from spvla.eval.summary import summarise, table
from spvla.eval.videos import FilmQuota, encode_mp4, video_name
from spvla.types import Outcome, Status, Trial


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Task 0: success, failure; task 1: success, and one that fell twice to errors."""
    wanted = trials(tasks=2, init_states=2)
    ledger = open_ledger(tmp_path, wanted)
    for trial, status in zip(wanted[:3], [Status.SUCCESS, Status.FAILURE, Status.SUCCESS], strict=True):
        ledger.claim(PROTOCOL.digest, trial)
        ledger.record(PROTOCOL.digest, trial, Outcome(status=status, steps=9, seconds=1.0, state_digest="d"))
    for _ in range(2):
        ledger.record_error(PROTOCOL.digest, wanted[3], kind="hang", message="no step", worker="env-0")
    return ledger


def test_a_summary_counts_each_task_and_then_the_suite(ledger: Ledger) -> None:
    found = [(s.task, s.successes, s.done, s.planned, s.errors) for s in summarise(ledger.trials())]
    assert found == [(0, 1, 2, 2, 0), (1, 1, 1, 2, 1), (None, 2, 3, 4, 1)]
    assert summarise(ledger.trials())[0].interval == pytest.approx((0.0945, 0.9055), abs=1e-4)  # Wilson, 1 of 2


def test_the_table_says_what_is_missing(ledger: Ledger) -> None:
    text = table(summarise(ledger.trials()))
    assert "0 task 0" in text and "9.5% - 90.5%" in text
    assert text.splitlines()[-1].startswith("all tasks") and "(1 of 4 missing)" in text


def test_the_log_has_the_originals_lines_in_the_originals_order(ledger: Ledger) -> None:
    assert log_text(ledger.trials()) == (
        "Task suite: libero_object\n"
        "\nTask: task 0\nStarting episode 1...\nSuccess: True\n"
        "# episodes completed so far: 1\n# successes: 1 (100.0%)\n"
        "\nTask: task 0\nStarting episode 2...\nSuccess: False\n"
        "# episodes completed so far: 2\n# successes: 1 (50.0%)\n"
        "Current task success rate: 0.5\nCurrent total success rate: 0.5\n"
        "\nTask: task 1\nStarting episode 1...\nSuccess: True\n"
        "# episodes completed so far: 3\n# successes: 2 (66.7%)\n"
        "Current task success rate: 1.0\nCurrent total success rate: 0.6666666666666666\n"
    )


def test_the_log_is_named_as_the_originals() -> None:
    at = datetime(2026, 1, 31, 12, 0, 5)
    assert log_name("libero_goal", at=at, note=None) == "EVAL-libero_goal-openvla-2026_01_31-12_00_05.txt"
    assert log_name("libero_goal", at=at, note="X") == "EVAL-libero_goal-openvla-2026_01_31-12_00_05--X.txt"
    with pytest.raises(UserError, match="run_id_note"):
        log_name("libero_goal", at=at, note="../../etc")


def test_any_policys_name_can_end_a_logs_name() -> None:
    assert name_part("runs/my adapter (2)@0123") == "runs-my-adapter--2--0123"
    log_name("libero_spatial", at=datetime(2026, 1, 31), note=f"X--{name_part('../' + 'x' * 300)}")
    refuse_note("x" * 80, [SUITE])
    with pytest.raises(UserError, match="run_id_note"):
        refuse_note("x" * 120, [SUITE])


def test_exports_hold_every_trial_result_and_error(ledger: Ledger) -> None:
    results, trial_table = (path.read_text() for path in export(ledger))
    rows = list(csv.DictReader(io.StringIO(trial_table)))
    assert [(r["task"], r["init_state"], r["status"], r["errors"]) for r in rows] == [
        ("0", "0", "success", "0"),
        ("0", "1", "failure", "0"),
        ("1", "0", "success", "0"),
        ("1", "1", "", "2"),
    ]
    found = json.loads(results)
    assert found["protocol_digest"] == PROTOCOL.digest and found["protocol"]["center_crop"] is True
    assert [r["rate"] for r in found["results"]] == [0.5, 1.0, pytest.approx(2 / 3)]
    assert [e["kind"] for e in found["errors"]] == ["hang", "hang"]


def test_wandb_gets_a_table_without_a_network(ledger: Ledger, tmp_path: Path) -> None:
    config = EvaluateConfig(pretrained_checkpoint="x", use_wandb=True, wandb_mode="offline")
    opened = open_wandb(config, folder=tmp_path, name="EVAL")
    log_results(opened, summarise(ledger.trials()))
    opened.close()
    (found,) = tmp_path.glob("wandb/offline-run-*/files/media/table/results_*.json")
    content = json.loads(found.read_text())
    assert content["columns"][:3] == ["policy", "suite", "task"]
    assert [row[2:7] for row in content["data"]] == [
        [0, "task 0", 1, 2, 0.5],
        [1, "task 1", 1, 1, 1.0],
        [-1, "", 2, 3, pytest.approx(2 / 3)],
    ]


def view() -> ProgressView:
    counts = {(SUITE, 0): TaskCounts("pick the soup", 10, 4, 3, 1)}
    shown = ProgressView("evaluate", counts, made=4, workers=2, servers=1)
    shown.batch_size, shown.batches = 4, BatchStats(batches=10, requests=30, actions=240)
    return shown


def test_without_a_terminal_progress_is_plain_lines() -> None:
    out = io.StringIO()
    with EvaluationConsole(out) as console:
        console.show(view())
        console.say("env-0 fell")
        console.show(view())  # too soon for another
    lines = out.getvalue().splitlines()
    assert len(lines) == 2 and "\x1b" not in out.getvalue()
    for part in ("4/10 trials", "success 75.0%", "errors 1", "trials/min", "batch fill 75%", "240 actions", "2 envs"):
        assert part in lines[0]
    assert lines[0].endswith(" left")


@pytest.mark.parametrize("width", [80, 120])
def test_on_a_terminal_the_headline_is_first_and_each_task_has_one_row(width: int) -> None:
    from rich.console import Console as RichConsole

    shown = view()
    long = "put the white mug on the left plate and put the yellow and white mug on the right plate [both]"
    shown.task_counts[SUITE, 1] = TaskCounts(long, 10, 0, 0, 0)
    out = io.StringIO()
    RichConsole(file=out, width=width).print(rich_table(shown))
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("evaluate  4/20 trials") and "240 actions" in " ".join(lines[:2])
    counts = [line.split()[-3:] for line in lines[-3:]]
    assert counts == [["done", "success", "errors"], ["4/10", "3", "1"], ["0/10", "0", "0"]]
    assert "pick the soup" in lines[-2] and "…" in lines[-1] and max(map(len, lines)) <= width


def test_a_video_is_an_mp4_of_thirty_frames_a_second(tmp_path: Path) -> None:
    frames = [np.full((256, 256, 3), 8 * i, np.uint8) for i in range(15)]
    (tmp_path / "v.mp4").write_bytes(encode_mp4(frames))
    with imageio.get_reader(tmp_path / "v.mp4") as reader:
        meta, read = reader.get_meta_data(), [frame for frame in reader]
    assert meta["fps"] == 30 and meta["codec"] == "h264" and len(read) == 15
    assert abs(int(read[10].mean()) - 80) < 6


def test_pairs_are_trials_that_both_have_ended() -> None:
    a, b = VERSION, replace(VERSION, digest="p1", name="other")
    wanted = trials(tasks=1, init_states=4, versions=[a, b])
    outcomes = {("p0", 0): True, ("p0", 1): True, ("p0", 2): False, ("p0", 3): True, ("p1", 0): False, ("p1", 1): True}
    for order in (wanted, wanted[::-1]):  # whichever of a pair ends first
        forth, back = PairCounter("p0", "p1"), PairCounter("p1", "p0")
        for trial in order:
            if (won := outcomes.get((trial.policy, trial.init_state))) is not None:
                forth.add(trial, won=won)
                back.add(trial, won=won)
        assert forth.count == Pairs(both=2, only_a=1, only_b=0)
        assert back.count == Pairs(both=2, only_a=0, only_b=1)


def test_videos_are_named_as_the_originals() -> None:
    name = video_name(episode=3, success=False, instruction="Pick up the black bowl next to the plate and place it")
    assert name == "episode=3--success=False--task=pick_up_the_black_bowl_next_to_the_plate_and_place.mp4"


def test_no_more_videos_than_asked_for_even_of_trials_at_once() -> None:
    quota = FilmQuota(successes=1, failures=2)
    a, b, c = (Trial(policy="p", suite=SUITE, task=0, init_state=i) for i in range(3))
    assert quota.begin(a) == {Status.SUCCESS, Status.FAILURE}
    wanted = quota.begin(b)
    assert wanted == {Status.FAILURE}  # a may yet be the success
    quota.end(a, frozenset(Status), Status.FAILURE)
    quota.end(b, wanted, None)
    assert quota.begin(c) == {Status.SUCCESS, Status.FAILURE}
