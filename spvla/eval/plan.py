"""From flags to trials: every mistake in them is found here, before anything long begins."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spvla.benchmarks import registry
from spvla.benchmarks.registry import BenchmarkFlags
from spvla.config import EvaluateConfig, SelfplayConfig, SweepConfig
from spvla.errors import CheckpointError, UserError
from spvla.eval.messages import PolicyVersion
from spvla.policies import checkpoint
from spvla.policies import registry as families
from spvla.policies.registry import NO_FLAGS, PolicyFlags, flags_of
from spvla.types import Benchmark, Trial


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be evaluated."""

    versions: list[PolicyVersion]
    trials: list[Trial]  # version by version, or init state by init state if `paired`
    unnorm_keys: dict[tuple[str, str], str]  # (policy digest, suite) -> key
    instructions: dict[tuple[str, int], str]  # (suite, task) -> text

    @property
    def suites(self) -> list[str]:
        return sorted({suite for suite, _ in self.instructions})


def make_plan(config: EvaluateConfig, benchmark: Benchmark, checkpoints: Sequence[str | Path]) -> Plan:
    """Raises UserError for a checkpoint, suite, task, key or number of trials that does not exist.

    No checkpoints: the policy that --policy_server or --policy names.
    """
    tasks = chosen_tasks(benchmark, config.task_suite_name, config.tasks, trials=config.num_trials_per_task)
    versions = [describe(str(path), flags_of(config)) for path in checkpoints] or [describe_external(config)]
    suites = {suite: benchmark.trained_on(suite) for suite, _ in tasks}
    keys = {(v.digest, s): unnorm_key(v, trained, config.unnorm_key) for v in versions for s, trained in suites.items()}
    trials = [
        Trial(policy=v.digest, suite=suite, task=task, init_state=i)
        for v in versions
        for suite, task in tasks
        for i in range(config.num_trials_per_task)
    ]
    if config.stop_when_settled:
        trials.sort(key=lambda t: t.init_state)  # stable: pairs end together
    return Plan(
        versions=versions,
        trials=list(dict.fromkeys(trials)),
        unnorm_keys=keys,
        instructions={(suite, task): benchmark.instructions(suite)[task] for suite, task in tasks},
    )


def benchmark_of(config: EvaluateConfig | SelfplayConfig | SweepConfig) -> Benchmark:
    """The one that its suites are of. Raises UserError."""
    flags = BenchmarkFlags(libero_assets=config.libero_assets, any_mujoco=config.any_mujoco)
    return registry.find(config.task_suite_name, flags)


def chosen_tasks(
    benchmark: Benchmark, task_suite_name: str, numbers: Sequence[int], *, trials: int
) -> list[tuple[str, int]]:
    """(suite, task) of what is to be evaluated. Raises UserError unless all are there, with so many init states, and
    this machine has what they are made of."""
    chosen = []
    for suite in task_suite_name.split(","):
        every = range(len(benchmark.instructions(suite)))
        for task in numbers or every:
            if task not in every:
                raise UserError(
                    f"--tasks names task {task} of {suite}", expected=f"0 to {every[-1]}", remedy="Correct --tasks."
                )
            if trials > (there := benchmark.num_init_states(suite, task)):
                raise UserError(
                    f"--num_trials_per_task {trials}",
                    expected=f"{there} at most, the init states of {suite} task {task}",
                    remedy="A trial is an init state, so more trials would repeat some: lower it.",
                )
            chosen.append((suite, task))
    benchmark.require(chosen)
    return chosen


def describe(path: str, flags: PolicyFlags = NO_FLAGS) -> PolicyVersion:
    """Identifies a checkpoint by what decides its behaviour. Raises UserError where the flags do not fit its files."""
    base, adapter = checkpoint.base_of(path)
    folder = Path(adapter or base)
    return PolicyVersion(
        digest=checkpoint.policy_digest(path),
        name=readable_name(folder),
        path=str(folder),
        base=str(base),
        is_adapter=adapter is not None,
        description=families.describe(path, flags),
    )


def describe_external(config: EvaluateConfig) -> PolicyVersion:
    """Who is behind --policy_server or --policy. Raises UserError."""
    kind, source = ("server", config.policy_server) if config.policy_server else ("object", config.policy)
    found = families.external(kind).describe(source, flags_of(config))
    return PolicyVersion(
        digest=found.digest,
        name=found.name,
        path=source,
        base=source,
        is_adapter=False,
        description=found.description,
    )


def readable_name(folder: Path) -> str:
    """.../runs/x/checkpoints/step_000300 -> x/step_000300."""
    if folder.parent.name in ("checkpoints", "merged"):
        return f"{folder.parent.parent.name}/{folder.name}"
    return folder.name


def unnorm_key(version: PolicyVersion, suite: str, asked: str | None) -> str:
    """The key of the action statistics: the flag's, else the suite's name or that + "_no_noops".

    What the policy was trained on comes before what its base knows. A policy that keeps no statistics here needs none.
    """
    if not version.description.has_statistics:
        return asked or suite
    own, base = checkpoint.norm_stats(Path(version.path)), checkpoint.norm_stats(Path(version.base))
    wanted, there = (asked,) if asked else (suite, f"{suite}_no_noops"), base | own
    for key in (key for stats in (own, base) for key in wanted if key in stats):
        return key
    raise CheckpointError(
        f"{version.path} has no action statistics for {' or '.join(wanted)}",
        expected=f"one of its keys: {', '.join(there) or '(none)'}",
        remedy="Name one with --unnorm_key, or evaluate the suite it was trained on.",
    )
