"""What a device's timings of the guidelines' experiments say about the choices of a search space.

Each guideline gets an exponent k: of the line `log slowdown = k log m` through the experiment's first variant, fitted
by least squares over its variants and widths, where m says how far a network departs from the guideline:

| guideline | m                                                                      |
|-----------|------------------------------------------------------------------------|
| G1        | memory access of the 1x1 convolutions over its bound                   |
| G2        | groups, weighted by MACs                                               |
| G3        | fragments                                                              |
| G4        | 1 + memory access of element-wise operators over that of convolutions  |

A guideline that turns round on the device has k = 0. The penalty of a value at a place of the encoding is the product
of `m ** k` over the guidelines, for the unit there with this value and plain others, over the least of the place; its
weight is `penalty ** -STRENGTH`. Depth and width weigh alike, as the experiments compare networks of equal MACs.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hwnas.conditions import profile_command
from hwnas.errors import HwnasError
from hwnas.experiments import EXPERIMENTS, HOLDS, MULTIPLIERS, Case, GuidelineTiming, slowdowns
from hwnas.guidelines import GUIDELINES, Sheet, unit_sheet
from hwnas.latency import LatencyTable
from hwnas.places import Place, network_at
from hwnas.space import CHOICES, SearchSpace
from hwnas.units import UnitChoice

SETTINGS = ("off", "prior", "strict")
"""Whether the sampler draws all values alike, the punished ones less often, or the most punished ones never."""

STRENGTH = 4
"""A value with a penalty of 1.1 is drawn 0.68 times as often as an unpunished one, and with one of 2, 0.06 times."""

DROPPED = HOLDS
"""`strict` never draws a value whose penalty is above this; the least punished one of each place has 1 and stays."""

Weights = tuple[tuple[float, ...], ...]
"""For each place of the encoding, the probability of each of its values."""


def sampler_weights(space: SearchSpace, source: str, table: LatencyTable, setting: str) -> Weights | None:
    """The weights that a search under a setting gives its sampler; `None` where all values are alike.

    Args:
        space: what is searched.
        source: what `--space` takes for it.
        table: whose timings of the guidelines count.
        setting: one of `SETTINGS`.

    Raises:
        HwnasError: the table holds no such timings; the message has the command that measures them.
    """
    if setting == "off":
        return None
    if not table.guidelines:
        arguments = profile_command(source, table.conditions).removeprefix("hwnas profile ")
        raise HwnasError(
            f"--guidelines {setting} needs to know what the guidelines' experiments cost on {table.conditions.device}, "
            f"and its latency table of '{table.space}' does not hold them. Measure: hwnas guidelines {arguments}"
        )
    return choice_weights(space, exponents(table.guidelines), drop=setting == "strict")


def check_setting(setting: str, sampler: str) -> None:
    """Raises `HwnasError` for a setting that is none, or that the sampler cannot follow."""
    if setting not in SETTINGS:
        raise HwnasError(f"--guidelines is one of {', '.join(SETTINGS)}. It is '{setting}'.")
    if setting != "off" and sampler != "evolution":
        raise HwnasError(
            f"Only the sampler 'evolution' follows the guidelines, and not '{sampler}'. Leave out --guidelines or "
            f"--sampler."
        )


def exponents(timings: Sequence[GuidelineTiming]) -> dict[str, float]:
    """The exponent of each guideline on the device where a whole set of timings was taken."""
    return {guideline: _exponent(guideline, timings) for guideline in EXPERIMENTS}


def _exponent(guideline: str, timings: Sequence[GuidelineTiming]) -> float:
    widths = timings[0].case.widths
    first = EXPERIMENTS[guideline].variants[0]
    products = squares = 0.0
    for slowdown in slowdowns(guideline, timings):
        for multiplier, factor in zip(MULTIPLIERS, slowdown.here, strict=True):
            own, best = (
                departure(guideline, unit_sheet(Case(guideline, variant, widths, multiplier).network.units[0]))
                for variant in (slowdown.variant, first)
            )
            products += math.log(own / best) * math.log(factor)
            squares += math.log(own / best) ** 2
    return max(0.0, products / squares)


def departure(guideline: str, sheet: Sheet) -> float:
    """How far a unit departs from a guideline: 1 where it does not, more where it does."""
    if guideline == "G4":
        return 1 + sheet.element_wise_access / sheet.convolution_access
    return max(1.0, sheet.value(guideline))


def choice_weights(space: SearchSpace, k: Mapping[str, float], *, drop: bool) -> Weights:
    """The weights of all values at all places of a space.

    Args:
        space: the space.
        k: the exponent of each guideline.
        drop: gives the values with penalties above `DROPPED` the weight 0.
    """
    weights: list[tuple[float, ...]] = []
    channels_in = space.stem_channels
    for number, stage in enumerate(space.stages, 2):
        width = max(stage.width)
        weights += [_normalised([1.0] * len(stage.depth)), _normalised([1.0] * len(stage.width))]
        first = _unit_weights(space, Place(number, channels_in, width, 2, plain_choice(space)), k, drop)
        later = _unit_weights(space, Place(number, width, width, 1, plain_choice(space)), k, drop)
        weights += [*first, *later * (max(stage.depth) - 1)]
        channels_in = width
    return tuple(weights)


def _unit_weights(space: SearchSpace, place: Place, k: Mapping[str, float], drop: bool) -> Weights:
    """The weights at the places of one unit, in the order of `CHOICES`."""
    return tuple(_value_weights(space, place, name, k, drop) for name in CHOICES)


def _value_weights(
    space: SearchSpace, place: Place, name: str, k: Mapping[str, float], drop: bool
) -> tuple[float, ...]:
    values = (False,) if name == "residual" and place.stride == 2 else space.choices[name]
    costs = [penalty(space, place, {name: value}, k) for value in values]
    relative = [cost / min(costs) for cost in costs]
    return _normalised([0.0 if drop and cost > DROPPED else cost**-STRENGTH for cost in relative])


def plain_choice(space: SearchSpace) -> UnitChoice:
    """The paper's unit, as far as the space has it."""
    plain = UnitChoice()
    defaults = {name: getattr(plain, name) for name in CHOICES}
    return UnitChoice(**{n: d if d in space.choices[n] else space.choices[n][0] for n, d in defaults.items()})


def penalty(space: SearchSpace, place: Place, chosen: Mapping[str, Any], k: Mapping[str, float]) -> float:
    """The product of `m ** k` over the guidelines, for the unit at a place that makes some other choices."""
    assert place.choice is not None
    changed = {name: getattr(place.choice, name) for name in CHOICES} | dict(chosen)
    sheet = unit_sheet(network_at(space, [place._replace(choice=UnitChoice(**changed))]).units[0])
    return math.prod(departure(guideline, sheet) ** k[guideline] for guideline in GUIDELINES)


def _normalised(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(value / sum(values) for value in values)
