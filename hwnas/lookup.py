"""The latency table as arrays: what hundreds of thousands of architectures will take, in one call.

The milliseconds and the parameters of every place of a space stand in arrays, by width and by the flat index of the
unit's choices; a prediction gathers from them and adds up. The result is that of `LatencyTable.predict`.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hwnas.calibration import Calibration
from hwnas.latency import LatencyTable
from hwnas.network import parameters
from hwnas.places import Place, head_place, network_at, stem_place
from hwnas.space import CHOICES, SearchSpace

BLOCK = 2048
"""Architectures that are looked up at a time, so that all arrays in between stay in the caches."""

Floats = NDArray[np.float64]
Costs = NDArray[np.float64]
"""Milliseconds and parameters, on a last axis of 2."""
Codes = NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class StageCosts:
    """The units that can stand in one stage.

    Attributes:
        depths: the depth behind each index, `[depths]`.
        first_steps, later_steps: what one step of each choice adds to the flat index, for the unit of stride 2 and for
            those of stride 1, `[choices]`.
        first: of the unit of stride 2, `[widths before, widths, flat choices, 2]`.
        later: of a unit of stride 1, `[widths, flat choices, 2]`.
    """

    depths: NDArray[np.int64]
    first_steps: NDArray[np.int64]
    later_steps: NDArray[np.int64]
    first: Costs
    later: Costs


@dataclass(frozen=True, slots=True)
class ArrayPredictor:
    """Predicts architectures of one space by their encodings; `array_predictor` makes it.

    Attributes:
        radices: how many values each place of the encoding has.
        stem: its costs, `[2]`.
        stages: the stages in order.
        head: by the index of the last stage's width, `[widths, 2]`.
        calibration: the table's, which leads from sums to networks.
    """

    radices: NDArray[np.int64]
    stem: Costs
    stages: tuple[StageCosts, ...]
    head: Costs
    calibration: Calibration

    def __call__(self, codes: Codes) -> tuple[Floats, Floats]:
        """The expected and the upper milliseconds, each `[N]`.

        Args:
            codes: encodings, `[N, len(space.radices)]`, canonical or not: what stands at the places of units that are
                not there counts nothing.

        Raises:
            ValueError: another shape, or a value that its place does not have.
        """
        if codes.ndim != 2 or codes.shape[1] != len(self.radices):
            raise ValueError(f"encodings of this space are [N, {len(self.radices)}], and not {list(codes.shape)}")
        if ((codes < 0) | (codes >= self.radices)).any():
            raise ValueError("an encoding holds a value that its place does not have")
        costs = np.empty((len(codes), 2))
        for start in range(0, len(codes), BLOCK):
            costs[start : start + BLOCK] = self._costs(codes[start : start + BLOCK])
        latency_ms = self.calibration.line.latency_ms(costs[:, 0], costs[:, 1])
        return latency_ms, latency_ms * (1 + self.calibration.upper_ratio)

    def _costs(self, codes: Codes) -> Costs:
        """The sums over the units of each architecture, `[N, 2]`."""
        costs = np.tile(self.stem, (len(codes), 1))
        width_before = np.zeros(len(codes), np.int64)
        start = 0
        for stage in self.stages:
            depth, width = stage.depths[codes[:, start]], codes[:, start + 1]
            most = int(stage.depths.max())
            units = codes[:, start + 2 :][:, : most * len(CHOICES)].reshape(len(codes), most, len(CHOICES))
            costs += stage.first[width_before, width, units[:, 0] @ stage.first_steps]
            for index in range(1, most):
                there = (depth > index)[:, None]
                costs += np.where(there, stage.later[width, units[:, index] @ stage.later_steps], 0)
            width_before = width
            start += 2 + most * len(CHOICES)
        return costs + self.head[width_before]


def array_predictor(table: LatencyTable, space: SearchSpace) -> ArrayPredictor:
    """Looks every place of a space up once, which takes seconds for a large space.

    Raises:
        HwnasError: the table lacks units of the space.
    """

    def costs(place: Place) -> tuple[float, int]:
        network = network_at(space, [place])
        return table.raw_sum_ms(network), parameters(network)

    stages: list[StageCosts] = []
    inputs: tuple[int, ...] = (space.stem_channels,)
    first, later = (tuple(space.unit_choices(stride)) for stride in (2, 1))
    for number, stage in enumerate(space.stages, 2):
        first_costs = [
            [[costs(Place(number, before, width, 2, choice)) for choice in first] for width in stage.width]
            for before in inputs
        ]
        later_costs = [
            [costs(Place(number, width, width, 1, choice)) for choice in later] if max(stage.depth) > 1 else []
            for width in stage.width
        ]
        steps = _steps(space, 2), _steps(space, 1)
        later_array = np.array(later_costs, np.float64).reshape(len(stage.width), -1, 2)  # also if there are none
        stages.append(StageCosts(np.array(stage.depth), *steps, np.array(first_costs), later_array))
        inputs = stage.width
    return ArrayPredictor(
        np.array(space.radices),
        np.array(costs(stem_place(space))),
        tuple(stages),
        np.array([costs(head_place(space, width)) for width in inputs]),
        table.calibration,
    )


def _steps(space: SearchSpace, stride: int) -> NDArray[np.int64]:
    """What one step of each choice adds to a unit's position in `space.unit_choices(stride)`, `[choices]`."""
    counts = [1 if name == "residual" and stride == 2 else len(space.choices[name]) for name in CHOICES]
    return np.array([math.prod(counts[index + 1 :]) for index in range(len(counts))])
