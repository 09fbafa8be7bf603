"""How well one score ranks what another one judges: Kendall's tau with its interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
LEAST_COUNT = 5
"""Fewer pairs of scores say nothing of an interval."""


@dataclass(frozen=True, slots=True)
class RankCorrelation:
    """Kendall's tau of two scores of the same things, with its 95 % confidence interval.

    Attributes:
        tau: concordant less discordant pairs over all pairs, -1 to 1.
        low, high: ends of the interval.
        count: things that were scored.
    """

    tau: float
    low: float
    high: float
    count: int

    @property
    def text(self) -> str:
        return f"{self.tau:.2f} (95 % interval {self.low:.2f} to {self.high:.2f}, n = {self.count})"


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Concordant less discordant pairs over all pairs (Kendall 1938, tau-a); 0 for fewer than two values."""
    x, y = np.asarray(first), np.asarray(second)
    signs = np.sign(x[:, None] - x) * np.sign(y[:, None] - y)
    pairs = len(x) * (len(x) - 1)
    return float(signs.sum() / pairs) if pairs else 0.0


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> RankCorrelation:
    """Tau of two scores `[N]`, and the interval by Fisher's z.

    The variance of z is 0.437 / (N - 4) (Fieller, Hartley and Pearson 1957). A tau of 1 or -1 counts for the interval
    as if one pair were the other way; of fewer than five things nothing is known.
    """
    count, tau = len(first), kendall_tau(first, second)
    if count < LEAST_COUNT:
        return RankCorrelation(tau, -1.0, 1.0, count)
    most = 1 - 4 / (count * (count - 1))
    z = math.atanh(max(-most, min(most, tau)))
    reach = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * math.sqrt(0.437 / (count - 4))
    low, high = math.tanh(z - reach), math.tanh(z + reach)
    return RankCorrelation(tau, min(low, tau), max(high, tau), count)


def best_third(values: Sequence[float]) -> list[int]:
    """The places of the largest third of the values, rounded up, in their order."""
    order = sorted(range(len(values)), key=lambda index: -values[index])
    return sorted(order[: math.ceil(len(values) / 3)])
