"""Self-play iterations: who is promoted, and the whole of it resumed from its folder."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from training_parts import DATASET, train_here, write_toy_dataset

from spvla import runs
from spvla.config import SelfplayConfig, TrainConfig
from spvla.errors import UserError
from spvla.eval.ledger import Ledger, TrialRow
from spvla.train.prepare import plain
from spvla.train.selfplay import Iteration, compare, judge, score, selfplay, standing, story


def row(policy: str, init_state: int, status: str | None) -> TrialRow:
    nothing: dict[str, Any] = dict.fromkeys(
        ("steps", "seconds", "state_digest", "note", "video", "worker", "done_at"), None
    )
    return TrialRow(
        policy=policy,
        policy_name=policy,
        protocol="p",
        suite="libero_object",
        task=0,
        init_state=init_state,
        instruction="",
        status=status,
        errors=0,
        **nothing,
    )


def rows_of(policy: str, outcomes: str) -> list[TrialRow]:
    """'+-' for success and failure, by init state."""
    return [row(policy, i, {"+": "success", "-": "failure"}[c]) for i, c in enumerate(outcomes)]


START = Iteration(
    name="start", checkpoint="s", policy="old", opponent="", successes=0, trials=0, verdict="baseline", best="start"
)


def test_a_policy_that_loses_many_trials_is_not_promoted() -> None:
    rows = rows_of("old", "++++++++++") + rows_of("new", "+++-------")
    verdict = judge(rows, "it-0", "c", "new", START, 0.05)
    assert (verdict.successes, verdict.trials) == (3, 10)
    assert verdict.difference == pytest.approx(-0.7) and verdict.p_value == 2 / 128
    assert verdict.best == "start" and verdict.verdict == "significantly worse: going on from start"


def test_a_policy_that_loses_by_chance_is_promoted() -> None:
    rows = rows_of("old", "++++++++++") + rows_of("new", "++++++++--")
    verdict = judge(rows, "it-0", "c", "new", START, 0.05)
    assert verdict.p_value == 0.5 and verdict.best == "it-0" and verdict.verdict == "promoted"


def test_only_trials_that_both_policies_have_are_compared() -> None:
    rows = rows_of("old", "+-+-") + rows_of("new", "++")
    assert compare(rows, "new", "old").trials == 2
    assert score(rows, "new") == {"successes": 2, "trials": 2}


def test_a_start_policy_that_cannot_act_is_followed_without_a_comparison() -> None:
    verdict = judge(rows_of("new", "+-"), "it-0", "c", "new", START, 0.05)
    assert verdict.difference is None and verdict.best == "it-0"
    assert "1/2 successes  promoted" in story([START, verdict])


def test_a_verdict_stands_whatever_trials_are_made_later() -> None:
    """Later iterations have begun from what it chose."""
    verdict = judge(rows_of("new", "+-"), "it-0", "c", "new", START, 0.05)
    assert standing([START, verdict], "it-0", "new", START.name) is verdict
    assert standing([START, verdict], "it-0", "other weights", START.name) is None
    assert standing([START, verdict], "it-0", "new", "another opponent") is None


def test_what_cannot_be_evaluated_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    write_toy_dataset(tmp_path / "data")
    places = {"data_root_dir": tmp_path / "data", "run_root_dir": tmp_path / "runs", "dataset_name": DATASET}
    sound = SelfplayConfig(vla_path="tiny", **places)
    for flags, says in (({"tasks": (10,)}, "--tasks names task 10"), ({"num_trials_per_task": 51}, "50 at most")):
        with pytest.raises(UserError, match=says):
            selfplay(replace(sound, **flags))
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_two_iterations_play_each_policy_against_the_one_before_and_resume_from_the_folder(tmp_path: Path) -> None:
    write_toy_dataset(tmp_path / "data")
    config = SelfplayConfig(
        vla_path="",
        data_root_dir=tmp_path / "data",
        dataset_name=DATASET,
        run_root_dir=tmp_path,
        run_id="play",
        lora_rank=4,
        batch_size=2,
        image_aug=False,
        max_steps=2,
        save_steps=2,
        learning_rate=1e-2,
        iterations=2,
        task_suite_name="libero_object",
        tasks=(0,),
        num_trials_per_task=2,
        num_envs=2,
        max_trial_steps=6,
    )
    warm = train_here(replace(plain(config), vla_path="tiny", run_id="warm", objective="sft", use_lora=False))
    config = replace(config, vla_path=str(runs.latest_checkpoint(warm)))
    history = selfplay(config)
    assert [h.name for h in history] == ["start", "it-0", "it-1"]
    assert [h.opponent for h in history] == ["", "start", "it-0"]
    assert [h.trials for h in history] == [2, 2, 2]
    assert len({h.policy for h in history}) == 3
    run = tmp_path / "play"
    lines = [json.loads(line) for line in (run / runs.HISTORY).read_text().splitlines()]
    assert [line["verdict"] for line in lines] == ["baseline", "promoted", "promoted"]
    second: dict[str, Any] = runs.read_config(run / "it-1")["config"]
    assert second["vla_path"] == history[1].checkpoint
    assert TrainConfig(seed=second["seed"]).seed == config.seed + 1

    (run / runs.HISTORY).unlink()  # as if killed before it was written
    played = outcomes(run)
    assert selfplay(config) == history
    assert (run / runs.HISTORY).exists()
    assert outcomes(run) == played  # when and where each trial was played included: none was played again


def outcomes(run: Path) -> list[TrialRow]:
    with Ledger.open(run / runs.LEDGER) as ledger:
        return ledger.outcomes()
