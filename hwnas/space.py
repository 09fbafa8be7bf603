"""`SearchSpace` and `Architecture`: what may be chosen, one choice, and the `Network` that it stands for.

A space is a TOML file. An architecture is a frozen value; it is written as JSON for people and as a vector of small
integers (an index into each list of choices) for samplers and the supernet.
"""

import hashlib
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import cached_property
from itertools import product
from typing import Any

from hwnas.errors import HwnasError
from hwnas.network import Network, NetworkBuilder
from hwnas.units import UnitChoice, head, shufflenet_v2_unit, stem

CHOICES = tuple(field.name for field in fields(UnitChoice))
"""The choices of a unit, in the order of the integer encoding."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What a stage may be: how many units, and how many channels each of them puts out."""

    depth: tuple[int, ...]
    width: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StageChoice:
    """A chosen stage: its width, and one choice a unit; the first unit has stride 2."""

    width: int
    units: tuple[UnitChoice, ...]

    @property
    def depth(self) -> int:
        return len(self.units)


@dataclass(frozen=True, slots=True)
class Architecture:
    """One point of a space."""

    space: str
    stages: tuple[StageChoice, ...]

    def to_json(self) -> str:
        """The architecture for a person to read and for `SearchSpace.from_json` to read back."""
        stages = [
            {
                "width": stage.width,
                "units": [
                    {name: str(v) if isinstance(v := getattr(unit, name), Fraction) else v for name in CHOICES}
                    for unit in stage.units
                ],
            }
            for stage in self.stages
        ]
        return json.dumps({"space": self.space, "stages": stages}, indent=1)


@dataclass(frozen=True)
class SearchSpace:
    """Every architecture that may be found: a stem, stages of ShuffleNet V2 units, a 1x1 convolution, a classifier.

    Attributes:
        name: printed everywhere, and stored in each architecture.
        input_size: side of the square RGB input, in pixels.
        classes: outputs of the classifier.
        stem_channels, stem_stride, max_pool: the 3x3 convolution that comes first, and whether a 3x3 max pool of
            stride 2 follows it.
        head_channels: width of the last 1x1 convolution.
        choices: for each of `CHOICES`, the values that a unit may take.
        stages: the stages in order.
    """

    name: str
    input_size: int
    classes: int
    stem_channels: int
    stem_stride: int
    max_pool: bool
    head_channels: int
    choices: dict[str, tuple[Any, ...]]
    stages: tuple[Stage, ...]

    # ---- the integer encoding ------------------------------------------------------------------------------------

    @cached_property
    def radices(self) -> tuple[int, ...]:
        """How many values each place of the encoding has.

        For each stage: depth, width, then for each of its units (the deepest stage's count) the `CHOICES` in order.
        The residual choice of a stride-2 unit, which has no identity to add, has one value.
        """
        radices: list[int] = []
        for stage in self.stages:
            radices += [len(stage.depth), len(stage.width)]
            for index in range(max(stage.depth)):
                radices += [1 if name == "residual" and index == 0 else len(self.choices[name]) for name in CHOICES]
        return tuple(radices)

    @cached_property
    def places(self) -> tuple[str, ...]:
        """A name for each place of the encoding, such as `stage2.unit1.kernel`; stages count from 2, as the paper's."""
        names: list[str] = []
        for number, stage in enumerate(self.stages, 2):
            names += [f"stage{number}.depth", f"stage{number}.width"]
            names += [f"stage{number}.unit{i}.{name}" for i in range(1, max(stage.depth) + 1) for name in CHOICES]
        return tuple(names)

    def encode(self, architecture: Architecture) -> tuple[int, ...]:
        """The index of each choice, one integer for each of `places`; units beyond a stage's depth are all zero."""
        code: list[int] = []
        for stage, chosen in zip(self.stages, architecture.stages, strict=True):
            code += [stage.depth.index(chosen.depth), stage.width.index(chosen.width)]
            for index in range(max(stage.depth)):
                if index >= chosen.depth:
                    code += [0] * len(CHOICES)
                    continue
                unit = chosen.units[index]
                code += [
                    0 if name == "residual" and index == 0 else self.choices[name].index(getattr(unit, name))
                    for name in CHOICES
                ]
        return tuple(code)

    def decode(self, code: Sequence[int]) -> Architecture:
        """The architecture of an encoding. What stands at the places of units that are not there is ignored."""
        stages: list[StageChoice] = []
        position = 0
        for stage in self.stages:
            depth, width = stage.depth[code[position]], stage.width[code[position + 1]]
            position += 2
            units: list[UnitChoice] = []
            for index in range(depth):
                at = position + index * len(CHOICES)
                values = {name: self.choices[name][code[at + i]] for i, name in enumerate(CHOICES)}
                if index == 0:
                    values["residual"] = False
                units.append(UnitChoice(**values))
            position += max(stage.depth) * len(CHOICES)
            stages.append(StageChoice(width, tuple(units)))
        return Architecture(self.name, tuple(stages))

    def canonical(self, code: Sequence[int]) -> tuple[int, ...]:
        """The one encoding of the architecture that `code` stands for."""
        return self.encode(self.decode(code))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that the space is made of."""
        return hashlib.sha256(repr([getattr(self, field.name) for field in fields(self)]).encode()).hexdigest()

    # ---- what is in it -------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """The exact number of architectures."""
        first, later = (len(list(self.unit_choices(stride))) for stride in (2, 1))
        return math.prod(
            len(stage.width) * sum(first * later ** (depth - 1) for depth in stage.depth) for stage in self.stages
        )

    def unit_choices(self, stride: int) -> Iterator[UnitChoice]:
        """Every choice of a unit; a stride-2 unit has no residual."""
        lists: list[tuple[Any, ...]] = [
            (False,) if name == "residual" and stride == 2 else self.choices[name] for name in CHOICES
        ]
        for values in product(*lists):
            yield UnitChoice(**dict(zip(CHOICES, values, strict=True)))

    def sample(self, rng: random.Random) -> Architecture:
        """An architecture with every choice drawn uniformly and on its own (so every depth is as likely as another)."""
        return self.decode([rng.randrange(radix) for radix in self.radices])

    def uniform(self, choice: UnitChoice, *, depth: str = "largest", width: str = "largest") -> Architecture:
        """The architecture whose units all choose the same, at the `smallest` or `largest` depth and width."""
        pick = {"smallest": min, "largest": max}
        return Architecture(
            self.name,
            tuple(
                StageChoice(
                    pick[width](stage.width),
                    tuple(
                        replace(choice, residual=choice.residual and index > 0)
                        for index in range(pick[depth](stage.depth))
                    ),
                )
                for stage in self.stages
            ),
        )

    @property
    def smallest(self) -> Architecture:
        """Least depth, width, split ratio and kernel, most groups, nothing added: the fewest MACs."""
        least: dict[str, Any] = {name: values[0] for name, values in self.choices.items()}
        least |= {"split_ratio": min(self.choices["split_ratio"]), "kernel": min(self.choices["kernel"])}
        least |= {"groups": max(self.choices["groups"])}
        return self.uniform(UnitChoice(**least | self._plain), depth="smallest", width="smallest")

    @property
    def largest(self) -> Architecture:
        """Most depth, width, split ratio and kernel, one group, everything added: the most MACs."""
        most = {"split_ratio": max(self.choices["split_ratio"]), "kernel": max(self.choices["kernel"])}
        most |= {"groups": min(self.choices["groups"])}
        most |= {name: max(self.choices[name]) for name in self._plain}
        return self.uniform(UnitChoice(**most))

    @property
    def _plain(self) -> dict[str, Any]:
        return {name: min(self.choices[name]) for name in ("squeeze_excite", "residual", "extra_depthwise")}

    # ---- reading -------------------------------------------------------------------------------------------------

    def from_json(self, text: str) -> Architecture:
        """Reads what `Architecture.to_json` wrote; `HwnasError` if it is not an architecture of this space."""
        try:
            data = json.loads(text)
            architecture = Architecture(
                data["space"],
                tuple(
                    StageChoice(
                        stage["width"],
                        tuple(
                            UnitChoice(**unit | {"split_ratio": Fraction(unit["split_ratio"])})
                            for unit in stage["units"]
                        ),
                    )
                    for stage in data["stages"]
                ),
            )
        except (ValueError, KeyError, TypeError, ArithmeticError) as error:
            raise HwnasError(f"This is not an architecture: {error!r}. Give the architecture.json of a run.") from None
        if architecture.space != self.name:
            raise HwnasError(
                f"The architecture belongs to the space '{architecture.space}', not to '{self.name}'. "
                f"Add --space {architecture.space}."
            )
        self.check(architecture)
        return self.decode(self.encode(architecture))  # 3.0 and 1 stand for 3 and true

    def check(self, architecture: Architecture) -> None:
        """Raises `HwnasError` with the place and the choices there if the architecture is outside this space."""
        if len(architecture.stages) != len(self.stages):
            raise HwnasError(f"{self.name} has {len(self.stages)} stages; the architecture {len(architecture.stages)}.")
        for number, (stage, chosen) in enumerate(zip(self.stages, architecture.stages, strict=True), 2):
            found = [("depth", chosen.depth, stage.depth), ("width", chosen.width, stage.width)]
            for index, unit in enumerate(chosen.units, 1):
                allowed_here = self.choices | ({"residual": (False,)} if index == 1 else {})
                found += [(f"unit{index}.{name}", getattr(unit, name), allowed_here[name]) for name in CHOICES]
            for name, value, allowed in found:
                if value not in allowed:
                    raise HwnasError(
                        f"stage{number}.{name} is {value}; {self.name} allows {', '.join(map(str, allowed))}."
                    )


# ---- from an architecture to a network ---------------------------------------------------------------------------


def lower(space: SearchSpace, architecture: Architecture) -> Network:
    """The network of an architecture: unit `stem`, units `stage2.1`, `stage2.2`, ..., and unit `head`."""
    b = NetworkBuilder(space.name, (3, space.input_size, space.input_size))
    x = stem(b, b.input, space.stem_channels, space.stem_stride, space.max_pool)
    for number, stage in enumerate(architecture.stages, 2):
        for index, choice in enumerate(stage.units, 1):
            with b.unit(f"stage{number}.{index}"):
                x = shufflenet_v2_unit(b, x, stage.width, 2 if index == 1 else 1, choice)
    return b.build(head(b, x, space.head_channels, space.classes))
