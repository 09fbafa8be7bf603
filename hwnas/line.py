"""The line that leads from the sum of a network's units to the time of the network.

An entry of a latency table is timed in a short chain, whose weights stay in the nearest cache; those of a whole network
come from further away, the further the more weights it has. So the factors of the line depend on the number of
parameters: they are given at a few knots, and between them they follow its logarithm. On a Zen 4 processor with 1 MiB
of level-2 cache a network of 1 MB takes 0.91 times the sum of its units, one of 30 MB takes 1.23 times as much.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

KNOTS = 4
FREE, HELD = 1e-3, 1.0
"""Pulls towards a slope of 1 and no cost of parameters, relative to the mean square of each column: next to none, and
one that leaves little but the sum. On a GPU, where no cache holds the weights, the sum alone predicts best, and free
factors learn what happened to the fitted networks; on a CPU they are needed."""
FOLDS, BENEFIT = 10, 0.5
"""The stronger pull is taken if its cross-validated error is above the other's by at most so many standard errors of
their difference (the rule of one standard error, Breiman et al. 1984, section 3.4.3, made narrower and paired)."""

LEAST_RESIDUAL = 0.003
"""Smaller residuals weigh no more than this one: they are noise."""


@dataclass(frozen=True, slots=True)
class Line:
    """`intercept + slope * sum of the units + cost of a parameter * parameters`, the last two by knots.

    Attributes:
        intercept_ms: in milliseconds.
        knots: numbers of parameters, rising.
        slopes: of the sum, at each knot.
        parameter_ns: nanoseconds that each parameter adds, at each knot.
    """

    intercept_ms: float
    knots: tuple[float, ...]
    slopes: tuple[float, ...]
    parameter_ns: tuple[float, ...]

    def latency_ms(self, sum_ms: Any, parameters: Any) -> Any:
        """Milliseconds of a network, or of as many as the two arrays tell of."""
        at, logs = np.log(parameters), np.log(self.knots)
        per_million_ms = np.interp(at, logs, self.parameter_ns)
        return self.intercept_ms + np.interp(at, logs, self.slopes) * sum_ms + per_million_ms * parameters / 1e6

    def scaled(self, factor: float) -> "Line":
        """The line of a device that is so many times slower."""
        return Line(
            self.intercept_ms * factor,
            self.knots,
            tuple(slope * factor for slope in self.slopes),
            tuple(cost * factor for cost in self.parameter_ns),
        )


def fit_line(sum_ms: Sequence[float], parameters: Sequence[int], measured_ms: Sequence[float]) -> Line:
    """The line of least absolute relative error, so that one disturbed timing does not move it.

    Args:
        sum_ms, parameters, measured_ms: of each network, `[N]`. The knots are spread evenly over the N parameters.
    """
    sums, counts, measured = (np.asarray(values, float) for values in (sum_ms, parameters, measured_ms))
    return fitted(sums, counts, measured, _pull(sums, counts, measured))


def _pull(sums: np.ndarray, counts: np.ndarray, measured: np.ndarray) -> float:
    """`FREE` or `HELD`, by cross-validation; each fold has networks of the whole range."""
    folds = min(FOLDS, len(sums) // 2)
    if folds < 2:
        return FREE
    fold_of = np.empty(len(sums), int)
    fold_of[np.argsort(sums)] = np.arange(len(sums)) % folds

    def errors(ridge: float) -> np.ndarray:
        found = np.empty(len(sums))
        for fold in range(folds):
            out = fold_of == fold
            line = fitted(sums[~out], counts[~out], measured[~out], ridge)
            found[out] = np.abs(measured[out] / line.latency_ms(sums[out], counts[out]) - 1)
        return found

    above = errors(HELD) - errors(FREE)
    return HELD if above.mean() <= BENEFIT * above.std() / np.sqrt(len(sums)) else FREE


def fitted(sums: np.ndarray, counts: np.ndarray, measured: np.ndarray, ridge: float) -> Line:
    """The line of arrays `[N]`, pulled by `ridge`."""
    knots = np.unique(np.quantile(counts, np.linspace(0, 1, KNOTS)))
    shares = np.array([np.interp(np.log(counts), np.log(knots), row) for row in np.eye(len(knots))]).T
    columns = np.column_stack([np.ones(len(sums)), shares * sums[:, None], shares * counts[:, None] / 1e6])
    prior = np.concatenate([[0.0], np.ones(len(knots)), np.zeros(len(knots))])
    factors = prior + least_absolute(columns / measured[:, None], 1 - columns @ prior / measured, ridge)
    slopes, costs = np.split(factors[1:], 2)
    return Line(float(factors[0]), *(tuple(map(float, values)) for values in (knots, slopes, costs)))


def least_absolute(columns: np.ndarray, values: np.ndarray, ridge: float) -> np.ndarray:
    """Factors of `columns` `[N, K]` with the least absolute residuals, and small: reweighted ridge regression.

    `ridge` is relative to the mean square of each column.
    """
    scale = np.sqrt(np.mean(columns**2, axis=0)) + 1e-12
    scaled, weights = columns / scale, np.ones(len(values))
    factors = np.zeros(columns.shape[1])
    for _ in range(30):
        weighted = scaled * weights[:, None]
        pull = ridge * weights.sum() * np.eye(len(factors))
        factors = np.linalg.solve(scaled.T @ weighted + pull, weighted.T @ values)
        residuals = np.abs(scaled @ factors - values)
        weights = 1 / np.maximum(residuals, LEAST_RESIDUAL)
    return factors / scale
