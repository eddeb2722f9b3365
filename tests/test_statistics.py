"""Intervals and paired tests, against numbers worked by hand and exact coverage."""

from itertools import product
from math import comb, factorial

import pytest

from spvla.statistics import mcnemar, paired, tango, wilson

Z2 = 1.959963984540054**2


def test_wilson_gives_the_textbook_interval() -> None:
    # 8 of 10: (0.8 + z2/20 +- z sqrt(0.016 + z2/400)) / (1 + z2/10)
    assert wilson(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0, Z2 / (10 + Z2)))
    assert wilson(10, 10) == pytest.approx((10 / (10 + Z2), 1))


def test_wilson_of_nothing_says_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


def test_wilson_refuses_more_successes_than_trials() -> None:
    with pytest.raises(ValueError, match="11 successes of 10"):
        wilson(11, 10)


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5, 0.9])
def test_wilson_covers_the_truth_about_as_often_as_it_says(rate: float) -> None:
    n = 50
    covered = sum(
        comb(n, k) * rate**k * (1 - rate) ** (n - k) for k in range(n + 1) if wilson(k, n)[0] <= rate <= wilson(k, n)[1]
    )
    assert 0.92 < covered < 0.985


def test_mcnemar_counts_coin_tosses() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == 2 / 32  # five heads or five tails
    assert mcnemar(1, 5) == mcnemar(5, 1) == 2 * (1 + 6) / 64
    assert mcnemar(3, 3) == 1.0


def test_paired_looks_only_at_trials_that_tell_the_two_apart() -> None:
    a = [True] * 20 + [True] * 8 + [False] * 1 + [False] * 11
    b = [True] * 20 + [False] * 8 + [True] * 1 + [False] * 11
    result = paired(a, b)
    assert (result.only_a, result.only_b, result.trials) == (8, 1, 40)
    assert result.difference == pytest.approx(7 / 40)
    assert result.p_value == 2 * (1 + 9) / 512
    assert 0 < result.low < result.difference < result.high < 1


def test_swapping_the_policies_mirrors_the_comparison() -> None:
    a, b = [True, True, True, False], [False, True, False, True]
    ab, ba = paired(a, b), paired(b, a)
    assert ab.difference == -ba.difference
    assert (ab.low, ab.high) == pytest.approx((-ba.high, -ba.low))
    assert ab.p_value == ba.p_value


def test_equal_outcomes_still_leave_an_interval() -> None:
    # with no discordant trial Tango's bound is z2 / (n + z2)
    assert tango(0, 0, 50) == pytest.approx((-Z2 / (50 + Z2), Z2 / (50 + Z2)))
    assert paired([], []).low == -1.0


def test_paired_refuses_unequal_trials() -> None:
    with pytest.raises(ValueError, match="3 and 2 trials"):
        paired([True] * 3, [True] * 2)


@pytest.mark.parametrize("only_a, only_b", [(0.1, 0.1), (0.3, 0.1), (0.05, 0.4)])
def test_the_interval_of_the_difference_covers_about_as_often_as_it_says(only_a: float, only_b: float) -> None:
    n, same = 30, 1 - only_a - only_b
    covered = 0.0
    for i, j in product(range(n + 1), repeat=2):
        if i + j > n:
            continue
        low, high = tango(i, j, n)
        if low <= only_a - only_b <= high:
            ways = factorial(n) / (factorial(i) * factorial(j) * factorial(n - i - j))
            covered += ways * only_a**i * only_b**j * same ** (n - i - j)
    assert 0.93 < covered < 0.98
