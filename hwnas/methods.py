"""Ways to train a supernet, by name: which architectures each step trains, and on which images and targets.

What a step trains follows from the seed and the number of the step alone, so that a training that was killed goes on as
if nothing had been.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from hwnas.errors import HwnasError
from hwnas.space import CHOICES, SearchSpace

Draw = Callable[[Random], Sequence[int]]
"""Draws the canonical encoding of an architecture."""

PathSampler = Callable[[int], np.ndarray]
"""The encodings that a step trains, int32 `[P, places]`, by the number of the step."""


@dataclass(frozen=True, slots=True)
class Method:
    """A way to train a supernet.

    Attributes:
        name: what `--method` takes.
        source: where it was published.
        distils: whether all paths of a step see all of its images, and the first one's predictions are the targets of
            the others; else each path takes its own part of the batch with the labels of the data.
        paths: how many architectures a step trains by default, and at least.
        sampler: makes the path sampler from a space, a way to draw an architecture (`None` for `SearchSpace.sample`),
            a seed, and the paths of a step.
    """

    name: str
    source: str
    distils: bool
    paths: int
    sampler: Callable[[SearchSpace, Draw | None, int, int], PathSampler]


def method(name: str) -> Method:
    """The method of that name; `HwnasError` if there is none."""
    if name not in METHODS:
        raise HwnasError(f"The training method is one of {', '.join(METHODS)}. It is '{name}'.")
    return METHODS[name]


def without_choice(step: int) -> np.ndarray:
    """For a single network: one path without any choice."""
    return np.zeros((1, 0), np.int32)


def check_paths(how: Method, paths: int | None) -> int:
    """How many architectures a step trains; `HwnasError` if the method needs more than that."""
    if paths is not None and paths < how.paths:
        raise HwnasError(f"A step of {how.name} trains at least {how.paths} architectures. --paths is {paths}.")
    return paths or how.paths


# ---- the samplers ------------------------------------------------------------------------------------------------


def single_paths(space: SearchSpace, draw: Draw | None, seed: int, paths: int = 1) -> PathSampler:
    """Each path is drawn anew: uniform sampling, SPOS (arXiv 1904.00420, section 3.2), where a step trains one."""
    chosen = draw or (lambda rng: space.encode(space.sample(rng)))

    def drawn(step: int) -> np.ndarray:
        rng = Random(f"{seed}/{step}")
        return np.array([chosen(rng) for _ in range(paths)], np.int32)

    return drawn


def fair_paths(space: SearchSpace, draw: Draw | None, seed: int, paths: int = 1) -> PathSampler:
    """Single paths that take every value of every choice equally often in each cycle of `cycle_length` paths.

    Strict fairness, FairNAS (arXiv 1907.01845, section 3.3), adapted: there each step sums the gradients of as many
    paths as a choice has values. Here choices have different numbers of values and some units are not always there, so
    that a cycle is as long as it must be for all of them, and spans steps. A value of a unit's choice is taken equally
    often among the paths that have the unit.

    Raises:
        HwnasError: a way to draw is given. Which values a budget allows depends on the others, so that none can be had
            equally often.
    """
    if draw is not None:
        raise HwnasError(
            "Fair sampling takes every value equally often, which a way to draw architectures does not allow. Train "
            "with single-path."
        )
    length = cycle_length(space)

    def drawn(step: int) -> np.ndarray:
        places = range(step * paths, (step + 1) * paths)
        cycles = {n: fair_cycle(space, length, Random(f"{seed}/{n}")) for n in {place // length for place in places}}
        return np.stack([cycles[place // length][place % length] for place in places])

    return drawn


def sandwich_paths(space: SearchSpace, draw: Draw | None, seed: int, paths: int = 4) -> PathSampler:
    """Each step trains the largest architecture, two or more drawn ones, and the smallest; the largest teaches them.

    Sources: the sandwich rule and in-place distillation, universally slimmable networks (arXiv 1903.05134, sections 3.2
    and 3.3), as BigNAS trains its supernet (arXiv 2003.11142, section 3.1).
    """
    largest, smallest = space.encode(space.largest), space.encode(space.smallest)
    chosen = draw or (lambda rng: space.encode(space.sample(rng)))

    def drawn(step: int) -> np.ndarray:
        rng = Random(f"{seed}/{step}")
        return np.array([largest, *(chosen(rng) for _ in range(paths - 2)), smallest], np.int32)

    return drawn


METHODS = {
    found.name: found
    for found in (
        Method("single-path", "SPOS, arXiv 1904.00420, section 3.2", False, 1, single_paths),
        Method("fair", "FairNAS, arXiv 1907.01845, section 3.3", False, 1, fair_paths),
        Method("sandwich", "BigNAS, arXiv 2003.11142, section 3.1", True, 4, sandwich_paths),
    )
}


# ---- strict fairness ---------------------------------------------------------------------------------------------


def cycle_length(space: SearchSpace) -> int:
    """So many paths that every value of every choice can be taken equally often in them.

    A unit is in as many of them as there are depths that reach it; that many must divide by the values of its choices.
    """
    widths = [len(stage.width) for stage in space.stages]
    values = math.lcm(*(len(space.choices[name]) for name in CHOICES))
    return math.lcm(*widths, *(len(stage.depth) * values for stage in space.stages))


def fair_cycle(space: SearchSpace, length: int, rng: Random) -> np.ndarray:
    """`length` canonical encodings, int32 `[length, places]`, in which every value stands equally often."""
    codes = np.zeros((length, len(space.radices)), np.int32)

    def deal(rows: Sequence[int], place: int, radix: int) -> None:
        values = [index for index in range(radix) for _ in range(len(rows) // radix)]
        codes[rows, place] = rng.sample(values, len(rows))

    everywhere, start = range(length), 0
    for stage in space.stages:
        deal(everywhere, start, len(stage.depth))
        deal(everywhere, start + 1, len(stage.width))
        start += 2
        for unit in range(1, max(stage.depth) + 1):
            depths = codes[:, start - 2 - (unit - 1) * len(CHOICES)]
            rows = [row for row in everywhere if stage.depth[depths[row]] >= unit]
            for place in range(start, start + len(CHOICES)):
                deal(rows, place, space.radices[place])
            start += len(CHOICES)
    return codes
