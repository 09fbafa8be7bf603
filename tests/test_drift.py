"""The upper bound must hold on another day, when the whole machine is a little slower or faster than the table says."""

from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
from scipy import stats

from hwnas.calibration import Calibration, Measurement, WholeNetwork
from hwnas.drift import PRIOR_SESSIONS, PRIOR_SHIFT, Check, drift_ratio, student_quantile
from hwnas.line import Line


def bounded(errors, *, noise=0.0, shifts=()):
    """A calibration whose line predicts 1 ms of each network; `noise` is how much slower the second timings are."""
    networks = tuple(
        WholeNetwork((i,), 1.0, 10**6, Measurement((1 + e,)), Measurement(((1 + e) * (1 + noise),)), True)
        for i, e in enumerate(errors)
    )
    checks = tuple(Check("2030-01-01T10:00:00+00:00", shift) for shift in shifts)
    return Calibration(Line(0.0, (1e6,), (1.0,), (0.0,)), 0.0, networks, checks).bounded()


@pytest.mark.parametrize("freedom", [PRIOR_SESSIONS, 5, 8, 30, 500])
def test_the_quantile_is_that_of_student(freedom):
    assert student_quantile(0.95, freedom) == pytest.approx(stats.t.ppf(0.95, freedom), rel=0.005)


def test_a_new_table_allows_for_the_usual_drift_and_checks_replace_the_prior_by_what_was_seen():
    fresh = drift_ratio([], 0.95)
    assert 0.015 < fresh < 0.025
    steady = list(accumulate([[0.0], *[[0.001]] * 30]))
    ratios = [drift_ratio(shifts, 0.95) for shifts in steady]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] < fresh / 2
    assert drift_ratio([0.03] * 30, 0.95) == pytest.approx(1.7 * 0.03, rel=0.1)
    assert drift_ratio([0.02], 0.95) == drift_ratio([-0.02], 0.95) > fresh


def test_the_two_timings_of_the_networks_are_sessions_too():
    errors = [0.01, -0.01] * 15
    assert bounded(errors, noise=0.04).drift_ratio > 1.3 * bounded(errors, noise=0.0).drift_ratio


@pytest.mark.parametrize("drift", [0.005, 0.01, 0.02])
def test_with_some_checks_the_bound_covers_networks_of_other_days_where_the_conformal_one_alone_does_not(drift):
    rng = np.random.default_rng(4)
    alone, joined = [], []
    for _ in range(300):
        calibration = bounded(rng.normal(0, 0.01, 30), shifts=rng.normal(0, drift, 6))
        day = (1 + rng.normal(0, 0.01, 200)) * (1 + rng.normal(0, drift)) - 1
        joined.append((day <= calibration.upper_ratio).mean())
        alone.append((day <= max(calibration.relative_errors)).mean())
    assert np.mean(joined) > (0.94 if drift <= PRIOR_SHIFT else 0.92)  # six checks do not outweigh the prior wholly
    if drift == 0.02:
        assert np.mean(alone) < 0.87


def test_a_check_tells_its_shift_as_the_median_over_all_its_networks():
    assert bounded([0.01, 0.02, 0.9]).shift == pytest.approx(0.02)
    assert replace(bounded([]), networks=()).shift == 0.0
