"""How far a machine drifts between two days, and what that adds to the upper bound of a latency table.

All networks that are measured within a few minutes share what the machine is like just then: its clock, its neighbours,
its temperature. Split conformal prediction does not see that, since its networks come from the same minutes as the
line. So each later session tells by how much it was slower than the table on the whole (the median of measured over
predicted, less one), and the next session is predicted from those: normal around the table, with a variance of which
`PRIOR_SESSIONS` sessions of `PRIOR_SHIFT` were seen before the first (Gelman et al., Bayesian Data Analysis, section
2.6). A table that was only just made carries the prior; every check replaces some of it by what it saw.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

PRIOR_SHIFT, PRIOR_SESSIONS = 0.01, 4
"""Chosen, not fitted: of the order of the one drift that was seen, 1.6 % over 36 minutes on a shared AMD EPYC."""


@dataclass(frozen=True, slots=True)
class Check:
    """A later session in which the table was checked.

    Attributes:
        finished: when, in ISO 8601.
        shift: the median of measured over predicted, less one, over all its networks.
    """

    finished: str
    shift: float


def drift_ratio(shifts: Sequence[float], confidence: float) -> float:
    """By how much a new session is slower than the table at most, relative to it, with the given confidence.

    The predictive distribution is Student's t with `PRIOR_SESSIONS + len(shifts)` degrees of freedom.
    """
    freedom = PRIOR_SESSIONS + len(shifts)
    square = PRIOR_SESSIONS * PRIOR_SHIFT**2 + sum(shift**2 for shift in shifts)
    return student_quantile(confidence, freedom) * math.sqrt(square / freedom)


def student_quantile(confidence: float, freedom: int) -> float:
    """A quantile of Student's t, within 0.5 % from 4 degrees of freedom on (Abramowitz and Stegun 1964, 26.7.5)."""
    z = NormalDist().inv_cdf(confidence)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
