"""Drawing architectures uniformly from those within a latency budget, exactly.

Within a budget may lie one architecture in millions, so that drawing from the whole space and throwing away would never
end. Here the architectures are counted instead, unit by unit, by dynamic programming over what a prediction adds up:
the milliseconds of the units and their parameters, rounded down to whole bins. A state is a stage, a unit and a width;
it holds how many beginnings of a network end in each cell of that plane.

Rounding down moves an architecture by less than one bin for each of its parts. A cell counts if *some* costs that may
have been rounded to it keep the budget, so that the counted cells hold every feasible architecture, and a few others. A
draw picks a cell by its count, walks back to the stem by the counts of the beginnings, and then asks the predictor for
the true latency: what breaks the budget is thrown away and drawn again. What is left is uniform over the feasible
architectures, whatever the width of the bins, which only decides how many draws are thrown away.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from hwnas.errors import HwnasError
from hwnas.line import Line
from hwnas.lookup import ArrayPredictor, StageCosts
from hwnas.space import CHOICES, SearchSpace

BINS = (600, 120)
"""Of the milliseconds, up to the most that keeps the budget, and of the parameters, up to those of the largest."""
MOST_THROWN_AWAY = 10_000
"""After so many draws in a row that break the budget, nothing is within it."""
RANDOM_BITS = 160
"""Of a uniform number; with 53, one architecture of 1e23 could not be drawn."""

Counts = NDArray[np.float64]
"""Of beginnings of networks, by cell, `[milliseconds, parameters]`: exact up to 2^53, then to 1e-13 of each."""


@dataclass(frozen=True, slots=True, eq=False)
class Feasible:
    """The architectures of a space within a budget; `feasible` makes it.

    Attributes:
        space, predictor, budget_ms: what is drawn from.
        steps: of each stage, the cells by which its units move: `[widths before, widths, flat choices, 2]` for the
            first and `[widths, flat choices, 2]` for the later ones.
        units: of each stage, the counts after its first, second, ... unit, by width.
        ends: the counts after each stage, by width; the one before the first stage comes first.
        chances: for each width of the last stage, the counts of the cells that may be feasible.
    """

    space: SearchSpace
    predictor: ArrayPredictor
    budget_ms: float
    steps: tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...]
    units: tuple[tuple[tuple[Counts, ...], ...], ...]
    ends: tuple[tuple[Counts, ...], ...]
    chances: "_Chances"

    def draw(self, rng: Random) -> tuple[int, ...]:
        """The canonical encoding of a feasible architecture, each as likely as another.

        Raises:
            HwnasError: nothing is within the budget.
        """
        for _ in range(MOST_THROWN_AWAY):
            code = self.propose(rng)
            if self.keeps(code):
                return code
        raise _nothing(self.space, self.budget_ms)

    def keeps(self, code: Sequence[int]) -> bool:
        """Whether the upper estimate of an encoding is within the budget."""
        return bool(self.predictor(np.array([code]))[1][0] <= self.budget_ms)

    def propose(self, rng: Random) -> tuple[int, ...]:
        """A canonical encoding drawn uniformly from the counted cells, feasible or nearly."""
        shape = self.ends[0][0].shape
        width, *cell = np.unravel_index(self.chances.draw(rng), (len(self.ends[-1]), *shape))
        at, parts = np.array(cell), []
        for number in reversed(range(len(self.space.stages))):
            stage, (first, later) = self.predictor.stages[number], self.steps[number]
            counts = [self.units[number][depth - 1][width] for depth in self.space.stages[number].depth]
            depth_index = _chosen(np.array([count[tuple(at)] for count in counts]), rng)
            flat: list[int] = []
            for unit in range(int(stage.depths[depth_index]) - 1, 0, -1):
                flat.insert(0, _chosen(_before(self.units[number][unit - 1][width], at, later[width]), rng))
                at = at - later[width][flat[0]]
            ways = [_before(end, at, steps) for end, steps in zip(self.ends[number], first[:, width], strict=True)]
            before, choice = divmod(_chosen(np.concatenate(ways), rng), first.shape[2])
            at = at - first[before, width, choice]
            parts.insert(0, self._stage_code(number, depth_index, int(width), [choice, *flat]))
            width = before
        return tuple(index for part in parts for index in part)

    def _stage_code(self, number: int, depth_index: int, width_index: int, flat: Sequence[int]) -> list[int]:
        """A stage's part of the encoding, from the flat index of each unit's choices."""
        stage = self.predictor.stages[number]
        code = [depth_index, width_index]
        for unit, index in enumerate(flat):
            for step in stage.later_steps if unit else stage.first_steps:
                digit, index = divmod(index, int(step))
                code.append(digit)
        return code + [0] * ((max(self.space.stages[number].depth) - len(flat)) * len(CHOICES))


@dataclass(frozen=True, slots=True, eq=False)
class _Chances:
    """Draws a place by its weight, time and again: places of weight above 0, the lightest first, and running sums."""

    places: NDArray[np.int64]
    sums: NDArray[np.float64]

    @staticmethod
    def of(weights: NDArray[np.float64]) -> "_Chances":
        places = np.argsort(weights, kind="stable")
        places = places[np.searchsorted(weights[places], 0, side="right") :]
        return _Chances(places, np.cumsum(weights[places]))

    def draw(self, rng: Random) -> int:
        uniform = (rng.getrandbits(RANDOM_BITS) + 0.5) / 2**RANDOM_BITS
        found = int(np.searchsorted(self.sums, uniform * self.sums[-1], side="right"))
        return int(self.places[min(found, len(self.places) - 1)])


def _chosen(weights: NDArray[np.float64], rng: Random) -> int:
    return _Chances.of(weights).draw(rng)


def _before(counts: Counts, at: NDArray[np.int64], steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """The counts in the cells from which each of the steps `[N, 2]` leads to the cell `at`."""
    cells = at - steps
    rows, columns = np.maximum(cells, 0).T
    return np.where(np.all(cells >= 0, axis=1), counts[rows, columns], 0)


def feasible(space: SearchSpace, predictor: ArrayPredictor, budget_ms: float) -> Feasible:
    """Counts the architectures whose upper estimate is within a budget, ready to be drawn; takes seconds.

    Args:
        space: what to draw from.
        predictor: of the space, by `lookup.array_predictor`.
        budget_ms: of the upper estimate, in milliseconds.

    Raises:
        HwnasError: nothing is within the budget.
    """
    bin_ms, bin_parameters = widths = _bin_widths(predictor, budget_ms)
    steps = tuple((_cells(stage.first, widths), _cells(stage.later, widths)) for stage in predictor.stages)
    start = np.zeros(BINS)
    start[0, 0] = 1
    ends: list[tuple[Counts, ...]] = [(start,)]
    units: list[tuple[tuple[Counts, ...], ...]] = []
    for (first, later), stage in zip(steps, predictor.stages, strict=True):
        depth = int(stage.depths.max())
        counts = [tuple(_moved(ends[-1], list(first[:, width])) for width in range(first.shape[1]))]
        for _ in range(1, depth):
            counts.append(tuple(_moved([before], [later[width]]) for width, before in enumerate(counts[-1])))
        units.append(tuple(counts))
        ends.append(tuple(sum((counts[d - 1][w] for d in stage.depths), np.zeros(BINS)) for w in range(first.shape[1])))
    parts = sum(int(stage.depths.max()) for stage in predictor.stages)
    low_ms, low_parameters = np.arange(BINS[0]) * bin_ms, np.arange(BINS[1]) * bin_parameters
    weights = []
    for count, head in zip(ends[-1], predictor.head, strict=True):
        fixed_ms, fixed_parameters = predictor.stem + head
        ms = low_ms + fixed_ms, low_ms + fixed_ms + parts * bin_ms
        numbers = low_parameters + fixed_parameters, low_parameters + fixed_parameters + parts * bin_parameters
        least_ms = _least_latency_ms(predictor.calibration.line, ms, numbers) * (1 + predictor.calibration.upper_ratio)
        weights.append(np.where(least_ms <= budget_ms * (1 + 1e-9), count, 0))
    flat = np.stack(weights).ravel()
    if not flat.any():
        raise _nothing(space, budget_ms)
    return Feasible(space, predictor, budget_ms, steps, tuple(units), tuple(ends), _Chances.of(flat))


def _nothing(space: SearchSpace, budget_ms: float) -> HwnasError:
    return HwnasError(
        f"No architecture of {space.name} is within {budget_ms:g} ms (upper estimate). Raise the budget, or take a "
        "smaller space."
    )


def _bin_widths(predictor: ArrayPredictor, budget_ms: float) -> NDArray[np.float64]:
    """The milliseconds and the parameters of a bin, so that all that can keep the budget lies within `BINS`."""
    most = _most(predictor.stages) + predictor.head.max(0)
    line, ratio = predictor.calibration.line, predictor.calibration.upper_ratio
    numbers = np.linspace(0, most[1], BINS[1] + 1) + predictor.stem[1]
    sums = np.linspace(0, most[0], 20 * BINS[0] + 1) + predictor.stem[0]
    edges = numbers[:-1], numbers[1:]
    kept = _least_latency_ms(line, (sums[:-1], sums[1:]), edges) * (1 + ratio) <= budget_ms
    last = np.flatnonzero(kept.any(1))
    most_ms = sums[last[-1] + 1] - predictor.stem[0] if len(last) else most[0]
    return np.array([most_ms, most[1]]) / (np.array(BINS) - 1)


def _most(stages: Sequence[StageCosts]) -> NDArray[np.float64]:
    """At least the milliseconds and the parameters of the stages of any architecture, each on its own, `[2]`."""
    most = np.zeros(2)
    for stage in stages:
        most = most + stage.first.max((0, 1, 2))
        if (later := int(stage.depths.max()) - 1) > 0:
            most = most + later * stage.later.max((0, 1))
    return most


def _cells(costs: NDArray[np.float64], widths: NDArray[np.float64]) -> NDArray[np.int64]:
    """Costs `[..., 2]`, all above 0, in whole bins, rounded down."""
    return np.floor(costs / widths).astype(np.int64)


def _moved(befores: Sequence[Counts], steps: Sequence[NDArray[np.int64]]) -> Counts:
    """The counts after one more unit: of each `before`, moved by each of its steps `[N, 2]`."""
    after = np.zeros(BINS)
    for before, moves in zip(befores, steps, strict=True):
        found, times = np.unique(moves, axis=0, return_counts=True)
        for (ms, parameters), ways in zip(found, times, strict=True):
            if ms < BINS[0] and parameters < BINS[1]:
                after[ms:, parameters:] += ways * before[: BINS[0] - ms, : BINS[1] - parameters]
    return after


def _least_latency_ms(
    line: Line, ms: tuple[NDArray[np.float64], NDArray[np.float64]], parameters: tuple[NDArray, NDArray]
) -> NDArray[np.float64]:
    """A lower bound of `Line.latency_ms` over each cell, `[ms cells, parameter cells]`, from the cells' edges.

    Between two knots the factors of the line are monotone, so that over a cell each is least at an edge or at a knot.
    """
    (low_ms, high_ms), (low, high) = (tuple(edge[:, None] for edge in ms), tuple(edge[None, :] for edge in parameters))

    def least(factors: Sequence[float]) -> NDArray[np.float64]:
        logs = np.log(line.knots)
        found = np.minimum(np.interp(np.log(low), logs, factors), np.interp(np.log(high), logs, factors))
        for knot, factor in zip(line.knots, factors, strict=True):
            found = np.where((low < knot) & (knot < high), np.minimum(found, factor), found)
        return found

    slope, cost = least(line.slopes), least(line.parameter_ns) / 1e6
    return line.intercept_ms + np.minimum(slope * low_ms, slope * high_ms) + np.minimum(cost * low, cost * high)
