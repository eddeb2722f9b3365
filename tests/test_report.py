"""The report: one file, no network, everything escaped, and it says what the ledger and the metrics hold."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from farm_parts import PROTOCOL

from spvla import runs
from spvla.config import EvaluateConfig, ReportConfig, StatusConfig
from spvla.errors import UserError
from spvla.farm.ledger import Ledger
from spvla.report import plots
from spvla.report.html import report
from spvla.report.story import tell
from spvla.status import describe
from spvla.types import Outcome, Status, Trial

HOSTILE = "pick up the <script>alert('x')</script> & place it"


def outcome(success: bool) -> Outcome:
    status = Status.SUCCESS if success else Status.FAILURE
    return Outcome(status=status, steps=60, seconds=3.0, state_digest="d")


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
            trials = [
                Trial(policy=name, suite="libero_object", task=t, init_state=i) for t in range(2) for i in range(4)
            ]
            ledger.add_trials(PROTOCOL.digest, trials)
            for trial in trials:
                assert ledger.claim(PROTOCOL.digest, trial)
                ledger.record(PROTOCOL.digest, trial, outcome(name == "policy-a" or trial.init_state < 2))
    rows = [{"step": s, "total_loss": 1 / (s + 1), "grad_norm": 1.0, "action_accuracy": 0.5} for s in range(5)]
    (run / runs.METRICS).write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 5, "total_l')
    sweep = [
        {"name": f"t{b}", "step": 4, "objective": b, "status": "done"}
        | {"parameters": {"beta": b, "learning_rate": 1e-4 * b}}
        for b in (0.3, 0.7)
    ]
    (run / "trials.json").write_text(json.dumps({"metric": "success_rate", "trials": sweep}))
    return run


def test_tables_hold_counts_and_wilson_intervals(run: Path) -> None:
    first, second = tell(run).evaluations
    assert [(r.successes, r.trials) for r in first.rows] == [(4, 4), (4, 4), (8, 8)]
    assert [(r.successes, r.trials) for r in second.rows] == [(2, 4), (2, 4), (4, 8)]
    # Wilson by hand: (0.5 + z²/16 -+ z sqrt(1/32 + z²/256)) / (1 + z²/8)
    assert second.rows[-1].interval == "21.5 to 78.5%"


def test_two_policies_are_compared_over_equal_init_states(run: Path) -> None:
    (comparison,) = tell(run).comparisons
    assert (comparison.pairs, comparison.only_first, comparison.only_second) == (8, 4, 0)
    assert (comparison.difference, comparison.p_value) == ("+50.0", "0.125")  # 2 / 2^4


def test_a_torn_last_line_of_metrics_is_left_out(run: Path) -> None:
    assert [row["step"] for row in runs.read_metrics(run)] == [0, 1, 2, 3, 4]


def test_what_a_run_contains_is_escaped(run: Path) -> None:
    page = report(ReportConfig(run=run)).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_a_sweep_is_drawn_as_a_heat_map_and_parallel_coordinates_over_words_too(run: Path) -> None:
    def trial(loss_type: str, beta: float, objective: float | None) -> dict:
        parameters = {"loss_type": loss_type, "beta": beta, "image_aug": True, "learning_rate": 1e-4}
        return {"name": "t", "step": 4, "objective": objective, "status": "done", "parameters": parameters}

    trials = [trial("hinge", 0.3, 0.25), trial("sigmoid", 0.7, 0.75), trial("<script>", 0.5, None)]
    (run / "trials.json").write_text(json.dumps({"metric": "success_rate", "trials": trials}))
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
