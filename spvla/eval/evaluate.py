"""`spvla evaluate`: plan, run what is missing, and say what came of it.

`run_evaluation` is the same for other commands: several checkpoints on one farm, results read back from the ledger.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spvla.benchmarks.registry import perturbed
from spvla.config import EvaluateConfig
from spvla.eval.session import session
from spvla.eval.summary import Summary, table
from spvla.files import paths_in


def evaluate(config: EvaluateConfig) -> None:
    """The command. Its table goes to stdout, everything else to stderr."""
    if config.perturb:
        config = replace(config, task_suite_name=perturbed(config.task_suite_name, config.perturb), perturb="")
    if config.follow is not None:
        from spvla.eval.follow import follow

        return follow(config)
    print(table(run_evaluation(config, checkpoints=paths_in(config.pretrained_checkpoint))))


def evaluate_policies(*checkpoints: str | Path, **flags: Any) -> list[Summary]:
    """`spvla evaluate` from Python: every trial exactly once, on a Ray cluster that is joined or started.

    checkpoints: folders or names; none with `policy_server` or `policy` among the flags. flags: those of the command
    (`EvaluateConfig`), such as task_suite_name="libero_object", tasks=(0, 3), local_log_dir=Path("logs").
    Returns a line for each task and one (`task` None) for each suite, by checkpoint. Raises UserError before any long
    work; InfrastructureError if no worker is left, and then the same call goes on where it stopped.
    """
    config = EvaluateConfig(pretrained_checkpoint=",".join(map(str, checkpoints)), **flags)
    config.check()
    return run_evaluation(config, checkpoints=checkpoints)


def run_evaluation(config: EvaluateConfig, *, checkpoints: Sequence[str | Path]) -> list[Summary]:
    """Runs what the ledger misses, of these checkpoints or, where there are none, of the policy that the flags name.

    Returns a line for each task and one (`task` None) for each suite, by checkpoint.
    Raises UserError before any long work; InfrastructureError if no worker is left. What is done by then is kept.
    """
    with session(config) as opened:
        return opened.run(checkpoints)
