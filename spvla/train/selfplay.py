"""`spvla selfplay`: it-0, it-1, ...: train against the policy before, evaluate on the farm, promote the better one.

    RUN/it-k/            iteration k, a training run of its own
    RUN/ledger.sqlite    the trials of every policy, the start policy's among them
    RUN/history.jsonl    one line an iteration

Nothing here remembers anything: a second start walks through the iterations again, and those whose checkpoint and
trials exist cost only a look. So it may be killed anywhere.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from spvla import runs
from spvla.cluster.connect import connection
from spvla.config import EvaluateConfig, SelfplayConfig
from spvla.errors import CheckpointError, InfrastructureError
from spvla.eval.evaluate import run_evaluation
from spvla.eval.ledger import Ledger, TrialRow
from spvla.eval.plan import benchmark_of, chosen_tasks, describe, unnorm_key
from spvla.files import require_writable, write_text
from spvla.policies.checkpoint import policy_digest
from spvla.statistics import Paired, paired
from spvla.train.prepare import (
    evaluation_key,
    plain,
    require_datasets,
    require_flags,
    require_startable,
    run_id,
    start_policy,
)
from spvla.train.run import train

BASELINE = "start"


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """One line of RUN/history.jsonl. The first is the start policy's own."""

    name: str  # "start", "it-0", "it-1", ...
    checkpoint: str
    policy: str  # digest
    opponent: str  # name of the policy it was trained against and is compared with
    successes: int
    trials: int
    difference: float | None = None  # success rate minus the opponent's, over trials that both have
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    verdict: str
    best: str  # name of the policy to go on from


def selfplay(config: SelfplayConfig) -> list[Iteration]:
    """Runs, or goes on with, all iterations; returns the history. Raises as `train` and `run_evaluation` do."""
    require_flags(config)
    require_datasets(config)
    require_startable(config)
    evaluated_tasks(config)
    run = require_writable(config.run_root_dir / selfplay_id(config), flag="--run_root_dir")
    runs.write_config(run, "selfplay", config)
    earlier = read_history(run)
    with connection():
        history = [baseline(config, run, earlier)]
        for k in range(config.iterations):
            best = next(h for h in history if h.name == history[-1].best)
            history.append(iterate(config, run, k, best, earlier))
            if history != earlier[: len(history)]:
                write_text(run / runs.HISTORY, "".join(json.dumps(asdict(h)) + "\n" for h in history))
                earlier = list(history)
    print(story(history))
    return history


def selfplay_id(config: SelfplayConfig) -> str:
    return run_id(plain(config)) if config.run_id else f"selfplay+{run_id(plain(config))}"


def read_history(run: Path) -> list[Iteration]:
    known = {f.name for f in fields(Iteration)}
    return [Iteration(**{k: v for k, v in row.items() if k in known}) for row in runs.read_history(run)]


def standing(earlier: Sequence[Iteration], name: str, policy: str, opponent: str) -> Iteration | None:
    """A verdict once given stays, since later iterations have begun from it, whatever trials have been made since."""
    every = (h for h in earlier if (h.name, h.policy, h.opponent) == (name, policy, opponent))
    return next(every, None)


def baseline(config: SelfplayConfig, run: Path, earlier: Sequence[Iteration]) -> Iteration:
    """The start policy's success, with which iteration 0 is compared.

    A policy that was never trained on the suite has no action statistics for it, and so cannot act in it.
    """
    start = start_policy(config, run)
    digest, cannot = policy_digest(start), why_it_cannot_act(config, start)
    rows = [] if cannot else evaluate_on_farm(config, run, start, name=BASELINE)
    return standing(earlier, BASELINE, digest, "") or Iteration(
        name=BASELINE,
        checkpoint=start,
        policy=digest,
        opponent="",
        **score(rows, digest),
        verdict=f"not evaluated: {cannot}" if cannot else "baseline",
        best=BASELINE,
    )


def why_it_cannot_act(config: SelfplayConfig, policy: str) -> str:
    try:
        key = evaluation_key(config.dataset_name, config.task_suite_name)
        unnorm_key(describe(policy), config.task_suite_name, key)
    except CheckpointError:
        return f"it has no action statistics for {key or config.task_suite_name}"
    return ""


def iterate(config: SelfplayConfig, run: Path, k: int, best: Iteration, earlier: Sequence[Iteration]) -> Iteration:
    """Trains against `best`, evaluates over the same trials, and decides which of the two to go on from."""
    name = f"it-{k}"
    # a seed of its own: after a policy that was not promoted, the next try must not repeat it
    flags = replace(plain(config), vla_path=best.checkpoint, run_root_dir=run, run_id=name, seed=config.seed + k)
    trained = train(flags, label=name)
    checkpoint, digest = str(trained.checkpoint), policy_digest(str(trained.checkpoint))
    rows = evaluate_on_farm(config, run, checkpoint, name=name)
    if not score(rows, digest)["trials"]:
        raise InfrastructureError(f"no trial of {name} came to an outcome; the same command tries them again")
    iteration = standing(earlier, name, digest, best.name) or judge(
        rows, name, checkpoint, digest, best, config.promote_level
    )
    print(f"{name}  {line(iteration)}", file=sys.stderr)
    return iteration


def judge(
    rows: Sequence[TrialRow], name: str, checkpoint: str, digest: str, best: Iteration, level: float
) -> Iteration:
    """Promotes a policy unless it is significantly worse than `best` over the trials that both have."""
    result = compare(rows, digest, best.policy)
    promoted = not significantly_worse(result, level)
    measured = {"difference": result.difference, "low": result.low, "high": result.high, "p_value": result.p_value}
    return Iteration(
        name=name,
        checkpoint=checkpoint,
        policy=digest,
        opponent=best.name,
        **score(rows, digest),
        **(measured if result.trials else {}),
        verdict="promoted" if promoted else f"significantly worse: going on from {best.name}",
        best=name if promoted else best.name,
    )


def evaluate_on_farm(config: SelfplayConfig, run: Path, checkpoint: str, *, name: str) -> list[TrialRow]:
    """Makes the trials that the run's ledger misses; returns its outcomes of the trials asked for, of any policy.

    `name` tells the logs apart.
    """
    farm = EvaluateConfig(
        pretrained_checkpoint=checkpoint,
        task_suite_name=config.task_suite_name,
        tasks=config.tasks,
        num_trials_per_task=config.num_trials_per_task,
        num_steps_wait=config.num_steps_wait,
        unnorm_key=evaluation_key(config.dataset_name, config.task_suite_name),
        center_crop=config.image_aug if config.center_crop is None else config.center_crop,
        libero_assets=config.libero_assets,
        any_mujoco=config.any_mujoco,
        num_envs=config.num_envs,
        num_decoders=config.num_decoders,
        max_steps=config.max_trial_steps,
        seed=config.seed,
        local_log_dir=run,
        run_id_note=name,
    )
    run_evaluation(farm, checkpoints=[checkpoint])
    tasks = set(evaluated_tasks(config))
    with Ledger.open(run / runs.LEDGER) as ledger:
        rows = ledger.outcomes()
    return [r for r in rows if (r.suite, r.task) in tasks and r.init_state < config.num_trials_per_task]


def evaluated_tasks(config: SelfplayConfig) -> list[tuple[str, int]]:
    """(suite, task). Raises UserError unless all are there, with as many init states as trials are asked for."""
    return chosen_tasks(benchmark_of(config), config.task_suite_name, config.tasks, trials=config.num_trials_per_task)


def score(rows: Sequence[TrialRow], policy: str) -> dict[str, int]:
    mine = [r for r in rows if r.policy == policy]
    return {"successes": sum(r.status == "success" for r in mine), "trials": len(mine)}


def compare(rows: Sequence[TrialRow], candidate: str, reference: str) -> Paired:
    """Both policies over the trials that both have; trials lost to the machines' errors count for neither."""
    outcomes = {
        policy: {(r.suite, r.task, r.init_state): r.status == "success" for r in rows if r.policy == policy}
        for policy in (candidate, reference)
    }
    shared = sorted(outcomes[candidate].keys() & outcomes[reference].keys())
    return paired([outcomes[candidate][t] for t in shared], [outcomes[reference][t] for t in shared])


def significantly_worse(result: Paired, level: float) -> bool:
    return result.difference < 0 and result.p_value < level


def story(history: Sequence[Iteration]) -> str:
    return "\n".join(f"{h.name:<8}{line(h)}" for h in history)


def line(iteration: Iteration) -> str:
    i = iteration
    success = f"{i.successes}/{i.trials} successes"
    if i.difference is None or i.low is None or i.high is None:
        return f"{success}  {i.verdict}"
    return (
        f"{success}  {100 * i.difference:+.1f} points against {i.opponent} "
        f"({100 * i.low:+.1f} to {100 * i.high:+.1f}, p {i.p_value:.3f})  {i.verdict}"
    )
