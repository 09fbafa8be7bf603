"""Where the units of a search space can stand: every distinct unit, enumerated without going through architectures."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from hwnas.network import Network, NetworkBuilder, Operator, Tensor
from hwnas.space import Architecture, SearchSpace, StageChoice
from hwnas.units import UnitChoice, head, shufflenet_v2_unit, stem


class Place(NamedTuple):
    """One unit of a space where it can stand.

    Attributes:
        stage: 2, 3, ... as in `lower`; 1 for the stem, and one more than the last stage for the head.
        channels_in, channels: of the whole unit; 3 and 0 for a stem and a head that have no choice of their own.
        stride: 2 for the first unit of a stage, 1 for the others.
        choice: `None` for the stem and the head.
    """

    stage: int
    channels_in: int
    channels: int
    stride: int
    choice: UnitChoice | None


def stem_place(space: SearchSpace) -> Place:
    return Place(1, 3, space.stem_channels, space.stem_stride, None)


def head_place(space: SearchSpace, channels_in: int) -> Place:
    return Place(len(space.stages) + 2, channels_in, space.head_channels, 1, None)


def places_of(space: SearchSpace) -> Iterator[Place]:
    """Every place of a space, each once: what a latency table must hold."""
    yield stem_place(space)
    inputs: tuple[int, ...] = (space.stem_channels,)
    for number, stage in enumerate(space.stages, 2):
        for width in stage.width:
            for channels_in in inputs:
                for choice in space.unit_choices(2):
                    yield Place(number, channels_in, width, 2, choice)
            if max(stage.depth) > 1:
                for choice in space.unit_choices(1):
                    yield Place(number, width, width, 1, choice)
        inputs = stage.width
    for width in inputs:
        yield head_place(space, width)


def places_of_architecture(space: SearchSpace, architecture: Architecture) -> Iterator[Place]:
    """The places of one architecture, in the order of its units in `lower`."""
    yield stem_place(space)
    channels = space.stem_channels
    for number, stage in enumerate(architecture.stages, 2):
        for index, choice in enumerate(stage.units):
            yield Place(number, channels, stage.width, 1 if index else 2, choice)
            channels = stage.width
    yield head_place(space, channels)


def extreme_architecture(space: SearchSpace, unit_ms: Mapping[Place, float], *, slowest: bool) -> Architecture:
    """The architecture whose units take the least time together, or the most: exactly, stage by stage.

    Args:
        space: the space.
        unit_ms: milliseconds of every place of the space, all above 0.
        slowest: the most time instead of the least.
    """
    sign = -1 if slowest else 1
    best: dict[int, tuple[float, tuple[StageChoice, ...]]] = {space.stem_channels: (0.0, ())}
    for number, stage in enumerate(space.stages, 2):
        depth = max(stage.depth) if slowest else min(stage.depth)
        ways: dict[int, list[tuple[float, tuple[StageChoice, ...]]]] = {width: [] for width in stage.width}
        for width in stage.width:
            later_ms, later = 0.0, ()
            if depth > 1:
                found = [(sign * unit_ms[Place(number, width, width, 1, c)], c) for c in space.unit_choices(1)]
                one_ms, choice = min(found, key=_first)
                later_ms, later = (depth - 1) * one_ms, (choice,) * (depth - 1)
            for channels_in, (before_ms, before) in best.items():
                found = [(sign * unit_ms[Place(number, channels_in, width, 2, c)], c) for c in space.unit_choices(2)]
                first_ms, choice = min(found, key=_first)
                ways[width].append((before_ms + first_ms + later_ms, (*before, StageChoice(width, (choice, *later)))))
        best = {width: min(found, key=_first) for width, found in ways.items()}
    _, stages = min(
        ((ms + sign * unit_ms[head_place(space, w)], stages) for w, (ms, stages) in best.items()), key=_first
    )
    return Architecture(space.name, stages)


def _first(pair: tuple[float, object]) -> float:
    return pair[0]


def network_at(space: SearchSpace, places: Iterable[Place], ends_with: Operator | None = None) -> Network:
    """A chain of units at the given places, which must fit each other; the first decides the input's shape.

    An operator can follow them, in a unit of its own.
    """
    places = list(places)
    first = places[0]
    b = NetworkBuilder(space.name, (first.channels_in, *[input_side(space, first)] * 2))
    x = b.input
    for index, place in enumerate(places):
        x = _add(b, x, space, place, index)
    if ends_with is not None:
        with b.unit("end"):
            (x,) = b.add_node(ends_with, x, name="end")
    return b.build(x)


def input_side(space: SearchSpace, place: Place) -> int:
    """Height and width, in pixels, of what the unit at a place takes in."""
    if place.stage == 1:
        return space.input_size
    stages_before = place.stage - 2 + (place.stride == 1 and place.choice is not None)
    return space.input_size // (space.stem_stride * (2 if space.max_pool else 1) * 2**stages_before)


def label(space: SearchSpace, place: Place) -> str:
    """What stands at a place, for people: `stage3 8x8 64->112 s2 1/2 k3 g1`; the resolution is the input's."""
    side = input_side(space, place)
    if place.choice is None:
        name = "stem" if place.stage == 1 else "head"
        return f"{name} {side}x{side} {place.channels_in}->{place.channels}"
    channels = f"{place.channels_in}->{place.channels}"
    return f"stage{place.stage} {side}x{side} {channels} s{place.stride} {place.choice.text}"


def _add(b: NetworkBuilder, x: Tensor, space: SearchSpace, place: Place, index: int) -> Tensor:
    if place.stage == 1:
        return stem(b, x, space.stem_channels, space.stem_stride, space.max_pool)
    if place.choice is None:
        return head(b, x, space.head_channels, space.classes)
    with b.unit(f"stage{place.stage}.{index}"):
        return shufflenet_v2_unit(b, x, place.channels, place.stride, place.choice)
