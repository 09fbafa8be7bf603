"""Accuracy from an architecture's encoding: a Bayesian linear model of the scored ones; evolution picks children by it.

It needs no training beyond one singular value decomposition, and tells how sure it is of each.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hwnas.space import SearchSpace

NOISE_RATIOS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Variance of the noise over that of a choice's effect: the linear model takes the likeliest of these."""

Floats = NDArray[np.float64]


def one_hot(space: SearchSpace, codes: np.ndarray, counts: np.ndarray | float = 1.0) -> Floats:
    """`[N, sum of the radices]`: for each place of encodings `[N, places]` what it `counts` at its value, else zero."""
    starts = np.concatenate([[0], np.cumsum(space.radices)])
    found = np.zeros((len(codes), starts[-1]))
    found[np.arange(len(codes))[:, None], starts[:-1] + codes] = counts
    return found


def features(space: SearchSpace, codes: Sequence[Sequence[int]], upper_ms: Sequence[float]) -> Floats:
    """`[N, F]`: each place one-hot, and the logarithm of the upper estimate, which stands for capacity."""
    return np.column_stack([one_hot(space, np.array(codes)), [2 * math.log(max(ms, 1e-9)) for ms in upper_ms]])


def predicted(known: Floats, values: Sequence[float], asked: Floats) -> tuple[Floats, Floats]:
    """Mean and standard deviation of a Bayesian linear model, in the unit of the values, each `[M]`.

    The ratio of the noise to the effects is the one of `NOISE_RATIOS` under which the values are likeliest (type-II
    maximum likelihood, MacKay 1992).

    Args:
        known: features of what is scored, `[N, F]`.
        values: the scores, `[N]`.
        asked: features of the candidates, `[M, F]`.
    """
    y = np.asarray(values, dtype=float)
    middle, unit = y.mean(), y.std() or 1.0
    y = (y - middle) / unit
    centre = known.mean(axis=0)
    asked = asked - centre
    u, s, vt = np.linalg.svd(known - centre, full_matrices=False)
    power, z = s**2, u.T @ y
    unexplained = max(float(y @ y - z @ z), 0.0)

    def fit(ratio: float) -> tuple[float, float]:
        spread = power / ratio + 1
        variance = (float(np.sum(z**2 / spread)) + unexplained) / len(y) + 1e-12
        return -0.5 * (len(y) * math.log(variance) + float(np.sum(np.log(spread)))), variance

    ratio = max(NOISE_RATIOS, key=lambda r: fit(r)[0])
    turned = asked @ vt.T
    mean = turned @ (s * z / (power + ratio))
    rest = np.sum(asked**2, axis=1) - np.sum(turned**2 * (power / (power + ratio)), axis=1)
    return middle + unit * mean, unit * np.sqrt(np.maximum(rest, 0.0) * fit(ratio)[1] / ratio)


def upper_confidence(known: Floats, values: Sequence[float], asked: Floats) -> Floats:
    """Mean plus one standard deviation of `predicted`, `[M]`."""
    mean, deviation = predicted(known, values, asked)
    return mean + deviation
