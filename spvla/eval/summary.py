"""From the ledger's rows to what a table says: successes of n, a 95% interval, and errors in a column of their own."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from spvla.eval.ledger import TrialRow
from spvla.statistics import wilson


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Trials of one policy: of one task, or (`task` None) of a whole suite."""

    policy: str  # digest
    policy_name: str
    suite: str
    task: int | None
    instruction: str
    planned: int
    done: int
    successes: int
    errors: int  # trials without an outcome that fell to infrastructure errors

    @property
    def rate(self) -> float:
        """Of the trials done; 0 where none is."""
        return self.successes / self.done if self.done else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.successes, self.done)


def summarise(rows: Sequence[TrialRow]) -> list[Summary]:
    """Each task's line, then its suite's, policy by policy; rows in the ledger's order."""
    summaries = []
    for _, of_suite in groupby(rows, key=lambda r: (r.policy, r.suite)):
        suite_rows = list(of_suite)
        for task, of_task in groupby(suite_rows, key=lambda r: r.task):
            summaries.append(_summary(list(of_task), task))
        summaries.append(_summary(suite_rows, None))
    return summaries


def _summary(rows: Sequence[TrialRow], task: int | None) -> Summary:
    first = rows[0]
    return Summary(
        policy=first.policy,
        policy_name=first.policy_name,
        suite=first.suite,
        task=task,
        instruction=first.instruction if task is not None else "",
        planned=len(rows),
        done=sum(r.status is not None for r in rows),
        successes=sum(r.status == "success" for r in rows),
        errors=sum(r.status is None and r.errors > 0 for r in rows),
    )


def table(summaries: Sequence[Summary]) -> str:
    """Plain text, one block for each policy and suite."""
    lines: list[str] = []
    previous = None
    for s in summaries:
        if (s.policy, s.suite) != previous:
            previous = (s.policy, s.suite)
            header = f"{'task':<64} {'success':>9} {'rate':>7}  {'95% interval':<15} {'errors':>6}"
            lines += ["", f"{s.policy_name}  {s.suite}", header]
        name = "all tasks" if s.task is None else f"{s.task} {s.instruction}"
        low, high = s.interval
        interval = f"{low:.1%} - {high:.1%}"
        lines.append(
            f"{shorten(name, 64):<64} {f'{s.successes}/{s.done}':>9} {s.rate:>7.1%}  {interval:<15} {s.errors:>6}"
        )
        if s.done < s.planned:
            lines[-1] += f"  ({s.planned - s.done} of {s.planned} missing)"
    return "\n".join(lines[1:])


def shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
