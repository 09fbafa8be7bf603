"""Timings of whole networks: what the line of a latency table is fitted on, and what tells how well it holds.

The upper ratio joins two independent causes. How far above the line a new network of the space may come is a split
conformal bound (Lei et al. 2018, section 2.2): the line is fitted on one half of the networks, and its relative errors
on the other half tell. How far the machine may have drifted when it is asked again is told by `drift.py`. As
independent causes they add up in quadrature.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hwnas.drift import Check, drift_ratio
from hwnas.line import Line, fit_line
from hwnas.ranking import kendall_tau

ERROR_LIMIT, NOISE_FACTOR, NOISE_LIMIT, COVERAGE_LIMIT = 0.04, 1.5, 0.08, 0.85
"""What a table must keep to be relied on: a mean absolute error of so much or of so many times the noise floor, and
a share of networks under the 95 % bound that twenty or more of them rarely fall below by chance."""

CONFIDENCE = 0.95
"""The share of unseen networks of a space that are at most as slow as their upper estimate."""


def significant(value: float) -> float:
    """Four significant digits: more than any timing holds, and short in a file."""
    return float(f"{value:.4g}")


@dataclass(frozen=True, slots=True)
class Measurement:
    """All samples of one timing, in milliseconds a run; they are summarised only when asked.

    Attributes:
        samples_ms: in the order in which they were taken.
        pace: how much slower than usual the machine was all the time; 1 for samples of an undisturbed machine.
    """

    samples_ms: tuple[float, ...]
    pace: float = 1.0

    def at_usual_pace(self) -> "Measurement":
        """What the samples would have been on the undisturbed machine, as far as the pace tells."""
        return Measurement(tuple(sample / self.pace for sample in self.samples_ms))

    def shortened(self) -> "Measurement":
        """The samples with `significant` digits only, and without the pace."""
        return Measurement(tuple(map(significant, self.samples_ms)))

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
        parameters: how many it has.
        measured: the first timing.
        repeated: a second timing of the same model some time later, or no samples.
        held_out: whether the line was fitted without it.
    """

    encoding: tuple[int, ...]
    sum_ms: float
    parameters: int
    measured: Measurement
    repeated: Measurement
    held_out: bool

    @property
    def latency_ms(self) -> float:
        """The lesser of the two timings: what disturbs a whole minute only ever lengthens it."""
        return min(timing.median_ms for timing in (self.measured, self.repeated) if timing.samples_ms)


@dataclass(frozen=True, slots=True)
class Calibration:
    """The line from sums of units to networks, and how well it holds.

    Attributes:
        line: fitted on the networks that are not held out.
        upper_ratio: by how much a network may be slower than the line, relative to it, with 95 % confidence, whenever
            it is measured.
        networks: the whole networks behind the line (`held_out` false) and behind the ratio (`held_out` true).
        checks: later sessions in which it was checked.
    """

    line: Line
    upper_ratio: float
    networks: tuple[WholeNetwork, ...]
    checks: tuple[Check, ...] = ()

    @property
    def relative_errors(self) -> tuple[float, ...]:
        """Measured over predicted, less one, of each network that the line has not seen."""
        return relative_errors(self, [network for network in self.networks if network.held_out])

    @property
    def rms_error(self) -> float:
        """Root-mean-square relative error on the held-out networks."""
        return root_mean_square(self.relative_errors)

    @property
    def mean_absolute_error(self) -> float:
        """Mean absolute relative error on the held-out networks."""
        return statistics.fmean(map(abs, self.relative_errors or (0.0,)))

    @property
    def bias(self) -> float:
        """Mean relative error on the held-out networks: above 0 where they are slower than predicted."""
        return statistics.fmean(self.relative_errors or (0.0,))

    @property
    def coverage(self) -> float:
        """The share of the held-out networks that are at most as slow as their upper estimate; 1 of none."""
        return statistics.fmean([error <= self.upper_ratio for error in self.relative_errors] or [True])

    @property
    def cross_coverage(self) -> float:
        """The share of the held-out networks that stay under the bound which the others give; 1 of fewer than two."""
        errors = self.relative_errors
        others = [errors[:i] + errors[i + 1 :] for i in range(len(errors))] if len(errors) > 1 else []
        return statistics.fmean([e <= self._bound(o) for e, o in zip(errors, others, strict=False)] or [True])

    @property
    def shift(self) -> float:
        """By how much the networks as a whole were slower than predicted, relative to it: the median."""
        return statistics.median(self.relative_errors or (0.0,))

    @property
    def drift_ratio(self) -> float:
        """By how much the machine as a whole may be slower in a later session, with 95 % confidence.

        The two timings of the networks, minutes apart, are the first two sessions.
        """
        pairs = [n.repeated.median_ms / n.measured.median_ms for n in self.networks if n.repeated.samples_ms]
        first = [statistics.median(pairs) - 1] if pairs else []
        return drift_ratio([*first, *(check.shift for check in self.checks)], CONFIDENCE)

    def bounded(self) -> "Calibration":
        """With the upper ratio that the networks and the checks give.

        Of a space so small that none can be held out, the fitted networks themselves give it.
        """
        return replace(self, upper_ratio=self._bound(self.relative_errors or relative_errors(self, self.networks)))

    def _bound(self, errors: Sequence[float]) -> float:
        return math.hypot(upper_ratio_of(errors), self.drift_ratio)

    def share_within(self, error: float) -> float:
        """The share of the held-out networks whose relative error is at most so large."""
        return statistics.fmean([abs(found) <= error for found in self.relative_errors] or [True])

    @property
    def noise_floor(self) -> float:
        """Mean absolute relative difference between two timings of the same networks."""
        pairs = [(n.measured.median_ms, n.repeated.median_ms) for n in self.networks if n.repeated.samples_ms]
        return statistics.fmean([abs(again / first - 1) for first, again in pairs] or [0.0])

    @property
    def kendall_tau(self) -> float:
        """Rank correlation of predicted and measured latency on the held-out networks (`kendall_tau`)."""
        return kendall_tau(*self._held_out_ms)

    @property
    def spearman(self) -> float:
        """The other rank correlation of the two (Spearman 1904)."""
        predicted, measured = (np.argsort(np.argsort(values)) for values in self._held_out_ms)
        return float(np.corrcoef(predicted, measured)[0, 1]) if len(predicted) > 1 else 0.0

    @property
    def _held_out_ms(self) -> tuple[list[float], list[float]]:
        """Predicted and measured milliseconds of the held-out networks."""
        held_out = [n for n in self.networks if n.held_out]
        predicted_ms = [float(self.line.latency_ms(n.sum_ms, n.parameters)) for n in held_out]
        return predicted_ms, [n.latency_ms for n in held_out]

    @property
    def failure(self) -> str | None:
        """Why predictions that err so on networks which the line has not seen are not to be relied on, if so."""
        limit = max(ERROR_LIMIT, NOISE_FACTOR * self.noise_floor)
        if self.noise_floor > NOISE_LIMIT:
            return (
                f"the same networks measured twice differ by {self.noise_floor:.1%} on average (at most "
                f"{NOISE_LIMIT:.0%}): the machine is too noisy"
            )
        if self.mean_absolute_error > limit:
            return f"its predictions err by {self.mean_absolute_error:.1%} on average (at most {limit:.1%})"
        if len(self.relative_errors) >= 20 and self.coverage < COVERAGE_LIMIT:
            return (
                f"only {self.coverage:.0%} of the networks stay under their upper bound (at least {COVERAGE_LIMIT:.0%})"
            )
        return None


def relative_errors(calibration: Calibration, networks: Sequence[WholeNetwork]) -> tuple[float, ...]:
    """Measured over predicted, less one, of each network."""
    line = calibration.line
    return tuple(float(n.latency_ms / line.latency_ms(n.sum_ms, n.parameters) - 1) for n in networks)


def root_mean_square(values: Sequence[float]) -> float:
    """Zero for no values."""
    return math.sqrt(sum(value * value for value in values) / len(values)) if values else 0.0


def calibrate(networks: Sequence[WholeNetwork]) -> Calibration:
    """Fits the line on the networks that are not held out, and the upper ratio on those that are."""
    fitted = [network for network in networks if not network.held_out]
    line = fit_line(
        [network.sum_ms for network in fitted],
        [network.parameters for network in fitted],
        [network.latency_ms for network in fitted],
    )
    return Calibration(line, 0.0, tuple(networks)).bounded()


def upper_ratio_of(errors: Sequence[float]) -> float:
    """The conformal quantile: of n errors the one of rank ceil((n + 1) * 0.95), or the largest where n is too few."""
    rank = min(len(errors), math.ceil((len(errors) + 1) * CONFIDENCE))
    return max(0.0, sorted(errors)[rank - 1]) if errors else 0.0
