"""Whether a policy learnt from demonstrations that begin where it is evaluated: its statistics say how they began."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from spvla.errors import UserError
from spvla.eval.ledger import PolicyRow
from spvla.eval.summary import Summary
from spvla.reading import read_json

STATISTICS = "dataset_statistics.json"  # in every checkpoint


def exams_seen(policies: Sequence[PolicyRow], tables: Sequence[Sequence[Summary]]) -> list[str]:
    """A note for each policy and suite whose demonstrations began at LIBERO's init states."""
    found = []
    for policy in policies:
        known = read_statistics(Path(policy.path))
        for suite in sorted({rows[-1].suite for rows in tables if rows[-1].policy == policy.digest}):
            learnt = known.get(f"{suite}_no_noops", known.get(suite, {}))
            if learnt.get("starts") == "test":
                found.append(
                    f"{policy.name} has seen its exam: its demonstrations of {suite} begin at the very init states of "
                    "this evaluation, so its rates are not those of unseen starts."
                )
    return found


def read_statistics(checkpoint: Path) -> dict[str, Any]:
    """Nothing where the checkpoint has gone since, is damaged, or never had any."""
    with suppress(UserError):
        return read_json(checkpoint / STATISTICS, dict[str, dict[str, Any]], remedy="")
    return {}
