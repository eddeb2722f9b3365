"""What a success rate is worth: Wilson intervals, and paired comparisons of two policies over equal trials."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import NormalDist


def wilson(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927); (0, 1) where nothing was tried."""
    if not 0 <= successes <= trials:
        raise ValueError(f"got {successes} successes of {trials} trials; expected 0 <= successes <= trials")
    if trials == 0:
        return 0.0, 1.0
    z = _z(level)
    rate, weight = successes / trials, z * z / trials
    middle = (rate + weight / 2) / (1 + weight)
    half = z * sqrt(rate * (1 - rate) / trials + weight / (4 * trials)) / (1 + weight)
    # at the ends the exact bound is 0 or 1, which rounding would miss by 1e-17
    return (0.0 if successes == 0 else middle - half), (1.0 if successes == trials else middle + half)


@dataclass(frozen=True, kw_only=True)
class Paired:
    """How policy a compares with policy b on the same trials."""

    difference: float  # success rate of a minus that of b
    low: float  # interval of the difference
    high: float
    p_value: float  # two-sided, exact McNemar
    only_a: int  # trials that a alone solved
    only_b: int
    trials: int


def paired(a: Sequence[bool], b: Sequence[bool], *, level: float = 0.95) -> Paired:
    """Compares two policies; `a[i]` and `b[i]` say whether each solved the i-th trial (same suite, task, init state).

    The p value is McNemar's exact one. The interval is Tango's score interval (Statistics in Medicine 17, 1998),
    which stays honest where no trial tells the two apart. The two methods may disagree near the border.
    """
    if len(a) != len(b):
        raise ValueError(f"got {len(a)} and {len(b)} trials; expected the same trials of both policies")
    only_a = sum(bool(x) and not y for x, y in zip(a, b, strict=True))
    only_b = sum(bool(y) and not x for x, y in zip(a, b, strict=True))
    low, high = tango(only_a, only_b, len(a), level)
    return Paired(
        difference=(only_a - only_b) / len(a) if a else 0.0,
        low=low,
        high=high,
        p_value=mcnemar(only_a, only_b),
        only_a=only_a,
        only_b=only_b,
        trials=len(a),
    )


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p value: were the trials that tell a from b tosses of a fair coin?"""
    n, k = only_a + only_b, min(only_a, only_b)
    tail = sum(comb(n, i) for i in range(k + 1))
    return min(1.0, 2 * tail / 2**n)


def tango(only_a: int, only_b: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Score interval of rate a - rate b over paired trials; (-1, 1) where nothing was tried."""
    if trials == 0:
        return -1.0, 1.0
    z, d = _z(level), (only_a - only_b) / trials

    def score(delta: float) -> float:
        """(observed - delta) in standard errors under delta; falls as delta grows."""
        gap = only_a - only_b - trials * delta
        # the likeliest share of trials that b alone solves, given delta: root of 2n q^2 + B q + C
        big_b = (2 * trials - only_a + only_b) * delta - only_a - only_b
        c = -only_b * delta * (1 - delta)
        q = (sqrt(max(big_b * big_b - 8 * trials * c, 0.0)) - big_b) / (4 * trials)
        variance = trials * (2 * q + delta * (1 - delta))
        if variance <= 0:
            return 0.0 if gap == 0 else float("inf") * gap
        return gap / sqrt(variance)

    return _crossing(lambda x: score(x) - z, -1.0, d), _crossing(lambda x: score(x) + z, d, 1.0)


def _crossing(falling: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function meets zero, by bisection to the last bit that matters."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2


def _z(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"got level {level}; expected a number between 0 and 1, such as 0.95")
    return NormalDist().inv_cdf(0.5 + level / 2)
