"""When a paired comparison may stop early without fooling itself.

Looking at a p value after every trial and stopping when it dips finds differences that are not there. Two rules do not:
an e-value, whose error holds at whatever moment one stops (Ville's inequality), ends it with a difference; and it ends
without one when no outcome of the remaining pairs could produce any.
"""

from dataclasses import dataclass
from math import exp, lgamma, log

from spvla.statistics import mcnemar
from spvla.types import Trial

LEVEL = 0.05


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Trials that both of two policies have ended."""

    both: int
    only_a: int  # solved by a alone
    only_b: int


class PairCounter:
    """Counts the pairs of `a` and `b`, which are digests of policies, as outcomes come: an equal suite, task and init
    state make a pair. Each trial is to be added once."""

    def __init__(self, a: str, b: str) -> None:
        self.policies = a, b
        self.waiting: dict[tuple[str, int, int], bool] = {}  # of one policy: whether it won, until the other has ended
        self.both = 0
        self.only = {a: 0, b: 0}  # solved by that one alone

    def add(self, trial: Trial, *, won: bool) -> None:
        if trial.policy not in self.policies:
            return
        place = trial.suite, trial.task, trial.init_state
        other_won = self.waiting.pop(place, None)
        if other_won is None:
            self.waiting[place] = won
            return
        a, b = self.policies
        self.both += 1
        if won != other_won:
            self.only[trial.policy if won else (b if trial.policy == a else a)] += 1

    @property
    def count(self) -> Pairs:
        a, b = self.policies
        return Pairs(both=self.both, only_a=self.only[a], only_b=self.only[b])


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
