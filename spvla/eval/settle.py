"""When a paired comparison may stop early without fooling itself.

Looking at a p value after every trial and stopping when it dips finds differences that are not there. Two rules do not:
an e-value, whose error holds at whatever moment one stops (Ville's inequality), ends it with a difference; and it ends
without one when no outcome of the remaining pairs could produce any.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, lgamma, log

from spvla.eval.ledger import TrialRow
from spvla.statistics import mcnemar

LEVEL = 0.05


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Trials that both of two policies have ended."""

    both: int
    only_a: int  # solved by a alone
    only_b: int


def pairs_of(rows: Sequence[TrialRow], a: str, b: str) -> Pairs:
    """`a` and `b` are digests of policies; a pair is an equal suite, task and init state."""
    won = {(r.policy, r.suite, r.task, r.init_state): r.status == "success" for r in rows if r.status is not None}
    places = [(suite, task, k) for policy, suite, task, k in won if policy == a and (b, suite, task, k) in won]
    return Pairs(
        both=len(places),
        only_a=sum(won[(a, *p)] and not won[(b, *p)] for p in places),
        only_b=sum(won[(b, *p)] and not won[(a, *p)] for p in places),
    )


def e_value(only_a: int, only_b: int) -> float:
    """Evidence against a fair coin in n = only_a + only_b pairs that tell the two apart.

    The likelihood of the sequence under a coin drawn from Beta(1/2, 1/2), over its likelihood 2^-n under a fair one.
    Under a fair coin it exceeds 1/level at any time with probability at most `level`.
    """
    n = only_a + only_b
    mixture = _log_beta(only_a + 0.5, only_b + 0.5) - _log_beta(0.5, 0.5)
    return exp(min(700.0, mixture + n * log(2)))


def verdict(only_a: int, only_b: int, *, pairs_left: int, level: float = LEVEL) -> str:
    """Why the comparison is settled, or nothing. `pairs_left` have no outcome yet."""
    if (evidence := e_value(only_a, only_b)) >= 1 / level:
        leader = "first" if only_a > only_b else "second"
        return f"the {leader} is better (e-value {evidence:.0f}, {1 / level:.0f} suffice)"
    best_p = min(mcnemar(only_a + pairs_left, only_b), mcnemar(only_a, only_b + pairs_left))
    if best_p >= level:
        return f"no outcome of the {pairs_left} pairs left could tell them apart (p would be {best_p:.2f} at best)"
    return ""


def _log_beta(a: float, b: float) -> float:
    return lgamma(a) + lgamma(b) - lgamma(a + b)
