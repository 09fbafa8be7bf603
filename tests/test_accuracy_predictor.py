"""Contract: the accuracy predictor's error is that on architectures it has not seen."""

import numpy as np
import pytest

from hwnas.accuracy_predictor import LEAST_SCORED, held_out_error, predicted


def made_up(count: int, places: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 3, (count, places))
    return np.eye(3)[codes].reshape(count, -1), rng.normal(size=(places * 3)), rng


def test_effects_that_add_up_are_learnt_and_the_best_is_found():
    known, effects, _ = made_up(120, 8)
    asked, _, _ = made_up(5000, 8, seed=1)
    mean, _ = predicted(known, (known @ effects).tolist(), asked)
    assert np.argmax(mean) == np.argmax(asked @ effects)


def test_the_held_out_error_is_small_where_effects_add_up():
    known, effects, _ = made_up(120, 8)
    error = held_out_error(known, (known @ effects).tolist())
    assert error is not None
    assert error.mean_absolute < 0.1 * error.guess
    assert error.ranks.tau > 0.9


def test_noise_that_could_be_learnt_by_heart_is_not_predicted_for_held_out_ones():
    known, _, rng = made_up(40, 60)
    own = np.hstack([known, 10 * np.eye(40)])  # whoever sees an architecture knows its score
    noise = rng.normal(size=40)
    seen, _ = predicted(own, noise.tolist(), own)
    error = held_out_error(own, noise.tolist())
    assert error is not None
    assert np.abs(seen - noise).mean() < 0.3 * error.guess < 0.7 * error.mean_absolute


def test_too_few_scores_say_nothing_and_constant_scores_no_ranks():
    known, _, _ = made_up(LEAST_SCORED, 8)
    assert held_out_error(known[1:], [0.5] * (LEAST_SCORED - 1)) is None
    error = held_out_error(known, [0.5] * LEAST_SCORED)
    assert error is not None
    assert error.mean_absolute == pytest.approx(0)
    assert error.ranks.tau == 0
