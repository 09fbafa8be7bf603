"""Property: the interval of Kendall's tau covers the true one as often as it says."""

import math

import numpy as np
import pytest

from hwnas.ranking import best_third, kendall_tau, rank_correlation


def test_kendall_tau_counts_concordant_less_discordant_pairs():
    assert kendall_tau([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert kendall_tau([1, 2, 3], [3, 2, 1]) == -1
    assert kendall_tau([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.95])
@pytest.mark.parametrize("count", [7, 20])
def test_about_19_of_20_intervals_hold_the_true_tau(rho: float, count: int):
    rng, true = np.random.default_rng(0), 2 / math.pi * math.asin(rho)
    pairs = rng.multivariate_normal((0, 0), ((1, rho), (rho, 1)), (800, count))
    found = [rank_correlation(pair[:, 0], pair[:, 1]) for pair in pairs]
    covered = np.mean([one.low <= true <= one.high for one in found])
    assert 0.92 <= covered <= 0.995
    assert all(one.low <= one.tau <= one.high for one in found)


def test_a_perfect_order_of_few_is_no_proof_of_a_perfect_one():
    few, many = (rank_correlation(range(count), range(count)) for count in (7, 40))
    assert few.tau == many.tau == few.high == 1
    assert few.low < many.low < 1
    assert (rank_correlation([1, 2, 3, 4], [1, 2, 3, 4]).low) == -1


def test_the_best_third_is_rounded_up_and_keeps_its_order():
    assert best_third([3, 9, 1, 7, 8, 0, 2]) == [1, 3, 4]
