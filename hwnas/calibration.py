"""Timings of whole networks, and the line that leads from the sums of a latency table to them.

The upper ratio is a split conformal bound (Lei et al. 2018, section 2.2): the line is fitted on one half of the
networks, and its relative errors on the other half say how far above it a new network of the space may come.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

CONFIDENCE = 0.95
"""The share of unseen networks of a space that are at most as slow as their upper estimate."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """All samples of one timing, in milliseconds a run; they are summarised only when asked."""

    samples_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)

    @property
    def minimum_ms(self) -> float:
        return min(self.samples_ms)

    @property
    def spread_ms(self) -> float:
        """Half the distance between the quartiles."""
        if len(self.samples_ms) < 2:
            return 0.0
        lower, _, upper = statistics.quantiles(self.samples_ms, n=4, method="inclusive")
        return (upper - lower) / 2


@dataclass(frozen=True, slots=True)
class WholeNetwork:
    """A whole network of the space, as predicted and as measured.

    Attributes:
        encoding: the architecture, as `SearchSpace.encode` gives it; empty for a network that has none.
        sum_ms: the sum of its units' entries.
        measured: the first timing.
        repeated: a second timing of the same model some time later, or no samples.
        held_out: whether the line was fitted without it.
    """

    encoding: tuple[int, ...]
    sum_ms: float
    measured: Measurement
    repeated: Measurement
    held_out: bool


@dataclass(frozen=True, slots=True)
class Calibration:
    """The line `intercept_ms + slope * sum_ms` from unit sums to networks, and how well it holds.

    Attributes:
        intercept_ms, slope: the line.
        upper_ratio: by how much a network may be slower than the line, relative to it, with 95 % confidence.
        networks: the whole networks behind the line (`held_out` false) and behind the ratio (`held_out` true).
    """

    intercept_ms: float
    slope: float
    upper_ratio: float
    networks: tuple[WholeNetwork, ...]

    def line_ms(self, sum_ms: float) -> float:
        return self.intercept_ms + self.slope * sum_ms

    @property
    def relative_errors(self) -> tuple[float, ...]:
        """Measured over predicted, less one, of each network that the line has not seen."""
        return relative_errors(self, [network for network in self.networks if network.held_out])

    @property
    def rms_error(self) -> float:
        """Root-mean-square relative error on the held-out networks."""
        return root_mean_square(self.relative_errors)

    @property
    def bias(self) -> float:
        """Mean relative error on the held-out networks: above 0 where they are slower than predicted."""
        return statistics.fmean(self.relative_errors or (0.0,))

    @property
    def coverage(self) -> float:
        """The share of the held-out networks that are at most as slow as their upper estimate; 1 of none."""
        return statistics.fmean([error <= self.upper_ratio for error in self.relative_errors] or [True])

    @property
    def noise_floor(self) -> float:
        """Root-mean-square relative difference between the two timings of the same networks."""
        return root_mean_square(
            [n.repeated.median_ms / n.measured.median_ms - 1 for n in self.networks if n.repeated.samples_ms]
        )

    @property
    def kendall_tau(self) -> float:
        """Rank correlation of predicted and measured latency on the held-out networks (Kendall 1938, tau-a)."""
        held_out = [n for n in self.networks if n.held_out]
        return kendall_tau([n.sum_ms for n in held_out], [n.measured.median_ms for n in held_out])


def relative_errors(calibration: Calibration, networks: Sequence[WholeNetwork]) -> tuple[float, ...]:
    """Measured over predicted, less one, of each network."""
    return tuple(n.measured.median_ms / calibration.line_ms(n.sum_ms) - 1 for n in networks)


def root_mean_square(values: Sequence[float]) -> float:
    """Zero for no values."""
    return math.sqrt(sum(value * value for value in values) / len(values)) if values else 0.0


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Concordant less discordant pairs over all pairs; 0 for fewer than two values."""
    x, y = np.asarray(first), np.asarray(second)
    signs = np.sign(x[:, None] - x) * np.sign(y[:, None] - y)
    pairs = len(x) * (len(x) - 1)
    return float(signs.sum() / pairs) if pairs else 0.0


def calibrate(networks: Sequence[WholeNetwork]) -> Calibration:
    """Fits the line on the networks that are not held out, and the upper ratio on those that are.

    Of a space so small that none can be held out, the fitted networks themselves give the ratio.

    The line is the one of least absolute relative error, found by reweighted least squares, so that one disturbed
    timing does not move it.
    """
    fitted = [network for network in networks if not network.held_out]
    sums = np.array([network.sum_ms for network in fitted])
    measured = np.array([network.measured.median_ms for network in fitted])
    weights = 1 / measured
    intercept, slope = 0.0, 1.0
    for _ in range(30):
        design = np.stack([np.ones_like(sums), sums], axis=1) * weights[:, None]
        (intercept, slope), *_ = np.linalg.lstsq(design, measured * weights, rcond=None)
        residuals = np.abs(intercept + slope * sums - measured) / measured
        weights = 1 / measured / np.sqrt(np.maximum(residuals, 0.003))
    line = Calibration(float(intercept), float(slope), 0.0, tuple(networks))
    return replace(line, upper_ratio=upper_ratio_of(line.relative_errors or relative_errors(line, networks)))


def upper_ratio_of(errors: Sequence[float]) -> float:
    """The conformal quantile: of n errors the one of rank ceil((n + 1) * 0.95), or the largest where n is too few."""
    rank = min(len(errors), math.ceil((len(errors) + 1) * CONFIDENCE))
    return max(0.0, sorted(errors)[rank - 1]) if errors else 0.0
