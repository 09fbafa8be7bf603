"""The paper's four experiments: its networks, its numbers, and what a device's timings of the same networks say.

ShuffleNet V2 (arXiv 1807.11164), section 2 and tables 1 to 4. In each, networks of nearly equal MACs (within 6 %)
follow a guideline more or less; the first variant follows it best. The paper timed them on a GeForce GTX 1080 Ti
("GPU") and on one thread of a Snapdragon 810 ("ARM"), with other channels on the one than on the other; a device is
timed with either.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hwnas.calibration import Measurement
from hwnas.network import Network, NetworkBuilder, Tensor

Speeds = tuple[float, float, float]
"""At each of `MULTIPLIERS`."""

MULTIPLIERS = (1, 2, 4)
"""By which the channels of each network are multiplied: the three columns of each of the paper's tables."""

WIDTHS = ("arm", "gpu")
"""Whose channels a network has: the paper's two devices'."""

SIDE, BLOCKS = 56, 10
"""Height and width of all feature maps, and how many blocks each network stacks."""

HOLDS, TURNS = 1.1, 0.95
"""A guideline holds where breaking it makes networks at least 1.1 times slower, and turns round below 0.95 times."""


# ---- the networks --------------------------------------------------------------------------------------------------

G1_CHANNELS = {
    "arm": {"channels 1:1": (32, 32), "channels 1:2": (22, 44), "channels 1:6": (13, 78), "channels 1:12": (9, 108)},
    "gpu": {
        "channels 1:1": (128, 128),
        "channels 1:2": (90, 180),
        "channels 1:6": (52, 312),
        "channels 1:12": (36, 432),
    },
}
"""In and out of the first of a block's two 1x1 convolutions, of which the second leads back."""

G2_GROUPS = {"1 group": 1, "2 groups": 2, "4 groups": 4, "8 groups": 8}
G2_CHANNELS = {"arm": {1: 64, 2: 90, 4: 128, 8: 184}, "gpu": {1: 128, 2: 180, 4: 256, 8: 360}}
"""By groups. The paper prints 180 for 8 groups on ARM, which 8 does not divide; 184 is its author's correction."""

G3_FRAGMENTS = {
    "1 fragment": (1, "series"),
    "2 fragments in series": (2, "series"),
    "4 fragments in series": (4, "series"),
    "2 fragments in parallel": (2, "parallel"),
    "4 fragments in parallel": (4, "parallel"),
}
G3_CHANNELS = {"arm": 64, "gpu": 128}
"""Of a block of one fragment; of n fragments it has 1 / sqrt(n) of the channels, for equal MACs (appendix figure 1)."""

G4_ELEMENT_WISE = {
    "neither ReLU nor shortcut": (False, False),
    "ReLU": (True, False),
    "a shortcut": (False, True),
    "ReLU and a shortcut": (True, True),
}
G4_CHANNELS = 32
"""In and out of the bottleneck, whose middle has a quarter. Table 4 does not say so, but under any other reading its
numbers exceed what the two processors can do."""


def _stacked(channels: int, add_block: Callable[[NetworkBuilder, Tensor], Tensor]) -> Network:
    b = NetworkBuilder("experiment", (channels, SIDE, SIDE))
    x = b.input
    for number in range(1, BLOCKS + 1):
        with b.unit(f"block{number}"):
            x = add_block(b, x)
    return b.build(x)


def _unbalanced(variant: str, widths: str, multiplier: int) -> Network:
    narrow, wide = (multiplier * channels for channels in G1_CHANNELS[widths][variant])
    return _stacked(narrow, lambda b, x: b.conv(b.conv(x, wide, name="pw1"), narrow, name="pw2"))


def _grouped(variant: str, widths: str, multiplier: int) -> Network:
    groups = G2_GROUPS[variant]
    channels = multiplier * G2_CHANNELS[widths][groups]
    return _stacked(channels, lambda b, x: b.conv(x, channels, name="pw", groups=groups))


def _fragmented(variant: str, widths: str, multiplier: int) -> Network:
    count, layout = G3_FRAGMENTS[variant]
    channels = int(multiplier * G3_CHANNELS[widths] / math.sqrt(count))

    def add_block(b: NetworkBuilder, x: Tensor) -> Tensor:
        if layout == "parallel":
            return b.add(*(b.conv(x, channels, name=f"pw{i}") for i in range(1, count + 1)))
        for i in range(1, count + 1):
            x = b.conv(x, channels, name=f"pw{i}")
        return x

    return _stacked(channels, add_block)


def _element_wise(variant: str, widths: str, multiplier: int) -> Network:
    relu, shortcut = G4_ELEMENT_WISE[variant]
    channels = multiplier * G4_CHANNELS

    def add_block(b: NetworkBuilder, x: Tensor) -> Tensor:
        main = x
        for name, width, kernel in (("pw1", channels // 4, 1), ("conv", channels // 4, 3), ("pw2", channels, 1)):
            main = b.conv(main, width, name=name, kernel=kernel)
            if relu and name != "pw2":
                main = b.activation(main, "relu", name=f"{name}_relu")
        main = b.add(x, main) if shortcut else main
        return b.activation(main, "relu", name="relu") if relu else main

    return _stacked(channels, add_block)


# ---- the paper's numbers -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Experiment:
    """One of the paper's tables.

    Attributes:
        guideline: `G1` to `G4`; the number is the table's, too.
        title: what varies.
        network: called with a variant, one of `WIDTHS` and one of `MULTIPLIERS`.
        arm, gpu: the speeds that the paper reports of each variant, in images and in batches a second.
        extremes: the variants that a verdict speaks of.
    """

    guideline: str
    title: str
    network: Callable[[str, str, int], Network]
    arm: dict[str, Speeds]
    gpu: dict[str, Speeds]
    extremes: tuple[str, ...]

    @property
    def variants(self) -> tuple[str, ...]:
        """The one that follows the guideline first."""
        return tuple(self.arm)


EXPERIMENTS = {
    "G1": Experiment(
        "G1",
        "ratio of the channels of 1x1 convolutions",
        _unbalanced,
        arm={
            "channels 1:1": (76.2, 21.7, 5.3),
            "channels 1:2": (72.9, 20.5, 5.1),
            "channels 1:6": (69.1, 17.9, 4.6),
            "channels 1:12": (57.6, 15.1, 4.4),
        },
        gpu={
            "channels 1:1": (1480, 723, 232),
            "channels 1:2": (1296, 586, 206),
            "channels 1:6": (876, 489, 189),
            "channels 1:12": (748, 392, 163),
        },
        extremes=("channels 1:12",),
    ),
    "G2": Experiment(
        "G2",
        "groups of 1x1 convolutions",
        _grouped,
        arm={
            "1 group": (40.0, 10.2, 2.3),
            "2 groups": (35.0, 9.5, 2.2),
            "4 groups": (32.9, 8.7, 2.1),
            "8 groups": (27.8, 7.5, 1.8),
        },
        gpu={
            "1 group": (2451, 1289, 437),
            "2 groups": (1725, 873, 341),
            "4 groups": (1026, 644, 338),
            "8 groups": (634, 445, 230),
        },
        extremes=("8 groups",),
    ),
    "G3": Experiment(
        "G3",
        "fragments of a block",
        _fragmented,
        arm={
            "1 fragment": (40.2, 10.1, 2.3),
            "2 fragments in series": (38.6, 10.1, 2.2),
            "4 fragments in series": (38.4, 10.1, 2.3),
            "2 fragments in parallel": (33.4, 9.1, 2.2),
            "4 fragments in parallel": (35.0, 8.4, 2.1),
        },
        gpu={
            "1 fragment": (2446, 1274, 434),
            "2 fragments in series": (1790, 909, 336),
            "4 fragments in series": (752, 745, 349),
            "2 fragments in parallel": (1537, 803, 320),
            "4 fragments in parallel": (691, 572, 292),
        },
        extremes=("4 fragments in series", "4 fragments in parallel"),
    ),
    "G4": Experiment(
        "G4",
        "element-wise operators of a bottleneck",
        _element_wise,
        arm={
            "neither ReLU nor shortcut": (66.3, 20.2, 5.4),
            "ReLU": (61.9, 18.8, 5.2),
            "a shortcut": (57.3, 18.2, 5.1),
            "ReLU and a shortcut": (56.7, 16.9, 5.0),
        },
        gpu={
            "neither ReLU nor shortcut": (2842, 2376, 1782),
            "ReLU": (2647, 2256, 1735),
            "a shortcut": (2672, 2121, 1458),
            "ReLU and a shortcut": (2427, 2066, 1436),
        },
        extremes=("ReLU and a shortcut",),
    ),
}
"""By guideline."""


# ---- timings of a device -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """One network of one experiment: a variant, whose channels, and by what they are multiplied."""

    guideline: str
    variant: str
    widths: str
    multiplier: int

    @property
    def network(self) -> Network:
        return EXPERIMENTS[self.guideline].network(self.variant, self.widths, self.multiplier)


@dataclass(frozen=True, slots=True)
class GuidelineTiming:
    """What a network of an experiment took on a device."""

    case: Case
    measurement: Measurement


def cases(guideline: str, widths: str) -> tuple[Case, ...]:
    """Every network of an experiment: its variants at each multiplier."""
    return tuple(
        Case(guideline, variant, widths, multiplier)
        for variant in EXPERIMENTS[guideline].variants
        for multiplier in MULTIPLIERS
    )


def all_cases(widths: str) -> tuple[Case, ...]:
    """Every network of all four experiments."""
    return tuple(case for guideline in EXPERIMENTS for case in cases(guideline, widths))


def check_complete(timings: Sequence[GuidelineTiming]) -> None:
    """Raises `ValueError` if timings are neither none nor those of all four experiments, once each and in order."""
    if not timings:
        return
    widths = timings[0].case.widths
    if widths not in WIDTHS or tuple(timing.case for timing in timings) != all_cases(widths):
        raise ValueError("the guidelines' timings are not those of the four experiments")


@dataclass(frozen=True, slots=True)
class Slowdown:
    """How many times longer a variant takes than the first of its experiment, at each of `MULTIPLIERS`.

    Attributes:
        variant: which.
        here: on the device, of the medians.
        spread: of that, from the spreads of both, taken as independent.
        arm, gpu: as the paper reports.
    """

    variant: str
    here: Speeds
    spread: Speeds
    arm: Speeds
    gpu: Speeds

    @property
    def mean(self) -> float:
        """The geometric mean over the multipliers, on the device."""
        return statistics.geometric_mean(self.here)


def slowdowns(guideline: str, timings: Sequence[GuidelineTiming]) -> tuple[Slowdown, ...]:
    """One for each variant of an experiment, in the order of its variants, from a whole set of timings."""
    experiment = EXPERIMENTS[guideline]
    measured = {(t.case.variant, t.case.multiplier): t.measurement for t in timings if t.case.guideline == guideline}
    first = experiment.variants[0]

    def slowdown(variant: str) -> Slowdown:
        pairs = [(measured[variant, multiplier], measured[first, multiplier]) for multiplier in MULTIPLIERS]
        arm, gpu = (_reported(column, first, variant) for column in (experiment.arm, experiment.gpu))
        return Slowdown(variant, _three(map(_ratio, pairs)), _three(map(_ratio_spread, pairs)), arm, gpu)

    return tuple(map(slowdown, experiment.variants))


def _ratio(pair: tuple[Measurement, Measurement]) -> float:
    return pair[0].median_ms / pair[1].median_ms


def _ratio_spread(pair: tuple[Measurement, Measurement]) -> float:
    if pair[0] is pair[1]:
        return 0.0
    return _ratio(pair) * math.hypot(*(measurement.spread_ms / measurement.median_ms for measurement in pair))


def _reported(column: dict[str, Speeds], first: str, variant: str) -> Speeds:
    return _three(best / speed for best, speed in zip(column[first], column[variant], strict=True))


def _three(values: Iterable[float]) -> Speeds:
    one, two, four = values
    return one, two, four


def verdict(guideline: str, timings: Sequence[GuidelineTiming]) -> str:
    """A sentence such as `G2 holds here: 8 groups cost 1.9x (1.8x to 2.1x); the paper's ARM 1.4x, GPU 2.8x.`

    A factor is the geometric mean over the three widths; the range in brackets is that of the widths.
    """
    found = {slowdown.variant: slowdown for slowdown in slowdowns(guideline, timings)}
    extremes = [found[name] for name in EXPERIMENTS[guideline].extremes]
    clauses = [
        f"{s.variant} cost {s.mean:.2f}x ({min(s.here):.2f}x to {max(s.here):.2f}x); the paper's ARM "
        f"{statistics.geometric_mean(s.arm):.2f}x, GPU {statistics.geometric_mean(s.gpu):.2f}x"
        for s in extremes
    ]
    worst = max(s.mean for s in extremes)
    word = "holds" if worst >= HOLDS else "turns round" if worst < TURNS else "hardly matters"
    return f"{guideline} {word} here: {'; '.join(clauses)}."


def verdicts(timings: Sequence[GuidelineTiming]) -> list[str]:
    """A sentence for each guideline, from a whole set of timings."""
    return [verdict(guideline, timings) for guideline in EXPERIMENTS]
