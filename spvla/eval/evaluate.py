"""`spvla evaluate`: plan, run what is missing, and say what came of it.

`run_evaluation` is the same for other commands: several checkpoints on one farm, results read back from the ledger.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from spvla.benchmarks.registry import perturbed
from spvla.config import EvaluateConfig
from spvla.eval.session import session
from spvla.eval.summary import Summary, table


def evaluate(config: EvaluateConfig) -> None:
    """The command. Its table goes to stdout, everything else to stderr."""
    if config.perturb:
        config = replace(config, task_suite_name=perturbed(config.task_suite_name, config.perturb), perturb="")
    if config.follow is not None:
        from spvla.eval.follow import follow

        return follow(config)
    checkpoints = [path for path in config.pretrained_checkpoint.split(",") if path]
    print(table(run_evaluation(config, checkpoints=checkpoints)))


def run_evaluation(config: EvaluateConfig, *, checkpoints: Sequence[str | Path]) -> list[Summary]:
    """Runs what the ledger misses, of these checkpoints or, where there are none, of the policy that the flags name.

    Returns a line for each task and one (`task` None) for each suite, by checkpoint.
    Raises UserError before any long work; InfrastructureError if no worker is left. What is done by then is kept.
    """
    with session(config) as opened:
        return opened.run(checkpoints)
