"""The line from sums of units to networks: found again under noise, disturbed timings and caches that end."""

import numpy as np
import pytest

from hwnas.line import FREE, Line, fit_line, fitted


def drawn(count=40, seed=0):
    rng = np.random.default_rng(seed)
    return rng.uniform(0.1, 5, count), np.exp(rng.uniform(np.log(1e5), np.log(1e7), count)).astype(int), rng


def test_a_straight_line_is_found_though_some_timings_were_disturbed():
    sums, counts, rng = drawn()
    truth = 0.03 + 1.05 * sums
    measured = truth * (1 + 0.003 * rng.standard_normal(len(sums)))
    measured[[7, 20]] *= (3, 1.5)
    found = fit_line(sums.tolist(), counts.tolist(), measured.tolist()).latency_ms(sums, counts)
    assert np.abs(found / truth - 1).mean() < 0.004
    assert np.abs(found / truth - 1).max() < 0.02


def test_a_slope_that_follows_the_number_of_parameters_is_found_on_networks_that_the_line_has_not_seen():
    def truth(sums, counts):
        return 0.02 + sums * (0.9 + 0.3 * (np.log(counts) - np.log(1e5)) / np.log(100))

    sums, counts, _ = drawn(60)
    line = fit_line(sums.tolist(), counts.tolist(), truth(sums, counts).tolist())
    sums, counts, _ = drawn(200, seed=1)
    assert np.abs(line.latency_ms(sums, counts) / truth(sums, counts) - 1).mean() < 0.005
    straight = np.polyfit(sums, truth(sums, counts), 1)
    assert np.abs(np.polyval(straight, sums) / truth(sums, counts) - 1).mean() > 0.04


def test_one_network_and_an_array_of_them_give_the_same_and_ends_are_not_left():
    line = Line(0.1, (1e5, 1e6), (1.0, 2.0), (0.0, 100.0))
    assert float(line.latency_ms(2.0, 10**5)) == pytest.approx(0.1 + 2.0)
    assert float(line.latency_ms(2.0, 10**6)) == pytest.approx(0.1 + 4.0 + 100.0)
    assert float(line.latency_ms(2.0, 10**7)) == pytest.approx(0.1 + 4.0 + 1000.0)
    assert line.latency_ms(np.array([2.0, 2.0]), np.array([10**5, 10**6])) == pytest.approx([2.1, 104.1])
    middle = float(line.latency_ms(0.0, 10**5.5))
    assert middle == pytest.approx(0.1 + 50.0 * 10**5.5 / 1e6)


def test_a_line_of_a_device_that_is_twice_as_slow_gives_twice_the_time():
    line = Line(0.1, (1e5, 1e6), (1.0, 2.0), (0.0, 100.0))
    assert float(line.scaled(2).latency_ms(3.0, 4 * 10**5)) == pytest.approx(2 * float(line.latency_ms(3.0, 4 * 10**5)))


def test_networks_of_one_size_give_one_knot():
    line = fit_line([1.0, 2.0, 3.0], [1000, 1000, 1000], [1.1, 2.1, 3.1])
    assert len(line.knots) == 1
    assert float(line.latency_ms(2.0, 1000)) == pytest.approx(2.1, rel=0.02)


def test_where_the_sum_alone_predicts_the_other_factors_do_not_learn_the_noise_of_the_fitted_networks():
    excess, freest = [], []
    for seed in range(8):
        sums, counts, rng = drawn(30, seed)
        measured = sums * (1 + 0.02 * rng.standard_t(2, len(sums)).clip(-8, 8))
        new_sums, new_counts, _ = drawn(200, 100 + seed)
        lines = fit_line(sums.tolist(), counts.tolist(), measured.tolist()), fitted(sums, counts, measured, FREE)
        for line, errors in zip(lines, (excess, freest), strict=True):
            errors.append(np.abs(line.latency_ms(new_sums, new_counts) / new_sums - 1).mean())
    assert np.mean(excess) < 0.01
    assert np.mean(freest) > 2 * np.mean(excess)
