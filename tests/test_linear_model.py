"""Contract: the linear model learns effects that add up."""

import numpy as np

from hwnas.linear_model import predicted


def made_up(count: int, places: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 3, (count, places))
    return np.eye(3)[codes].reshape(count, -1), rng.normal(size=(places * 3)), rng


def test_effects_that_add_up_are_learnt_and_the_best_is_found():
    known, effects, _ = made_up(120, 8)
    asked, _, _ = made_up(5000, 8, seed=1)
    mean, _ = predicted(known, (known @ effects).tolist(), asked)
    assert np.argmax(mean) == np.argmax(asked @ effects)
