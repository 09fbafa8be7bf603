"""Reads search spaces from TOML. Each error names the file, the line, the rule and the value."""

import math
import re
import tomllib
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from hwnas.errors import HwnasError
from hwnas.network import nearest_multiple
from hwnas.space import CHOICES, SearchSpace, Stage

TOP_FIELDS = ("name", "input_size", "classes", "stem", "head", "unit", "stage")
STEM_FIELDS = ("channels", "stride", "max_pool")
STAGE_FIELDS = ("depth", "width")

T = TypeVar("T")


def shipped_folder(name: str) -> Path:
    """Where a folder that comes with hwnas lies: in the wheel, or at the top of a checkout."""
    packaged = Path(str(resources.files("hwnas"))) / name
    return packaged if packaged.is_dir() else packaged.parents[1] / name


def space_folder() -> Path:
    """Where the spaces that come with hwnas lie."""
    return shipped_folder("search_spaces")


def shipped_spaces() -> tuple[str, ...]:
    """The names of the spaces that come with hwnas."""
    return tuple(sorted(path.stem for path in space_folder().glob("*.toml")))


def load_space(name_or_path: str | Path) -> SearchSpace:
    """The space of that name that comes with hwnas, or the one in a TOML file.

    Raises:
        HwnasError: no such space or file, or a file that breaks a rule; the message names the line.
    """
    path = Path(name_or_path)
    if str(name_or_path) in shipped_spaces():
        path = space_folder() / f"{name_or_path}.toml"
    elif not path.is_file():
        raise HwnasError(
            f"There is no search space '{name_or_path}': it is neither a TOML file nor one of "
            f"{', '.join(shipped_spaces())}."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise HwnasError(f"{path}: a search space is UTF-8 text, and this file is not. Give a TOML file.") from None
    return parse_space(text, str(path))


def parse_space(text: str, source: str = "space.toml") -> SearchSpace:
    """A space from TOML text; `source` stands in the error messages."""
    return _Reader(text, source).read()


class _Reader:
    """One parse: the data, and the text in which lines are looked up for messages."""

    def __init__(self, text: str, source: str) -> None:
        self.text, self.source = text, source
        try:
            self.data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise HwnasError(f"{source}: not valid TOML: {error}.") from None

    def read(self) -> SearchSpace:
        self.check_fields(self.data, TOP_FIELDS, ())
        stem, head, unit = (self.table(name) for name in ("stem", "head", "unit"))
        self.check_fields(stem, STEM_FIELDS, ("stem",))
        self.check_fields(head, ("channels",), ("head",))
        self.check_fields(unit, CHOICES, ("unit",))
        stages = self.data["stage"]
        if not isinstance(stages, list) or not stages:
            self.fail(("stage",), "a space has at least one [[stage]]", stages)
        choices = {name: self.values(unit, ("unit", name), _UNIT_RULES[name]) for name in CHOICES}
        space = SearchSpace(
            name=self.value(self.data, ("name",), str, "a text", lambda v: v != ""),
            input_size=self.whole(self.data, ("input_size",)),
            classes=self.whole(self.data, ("classes",), 2),
            stem_channels=self.whole(stem, ("stem", "channels")),
            stem_stride=self.value(stem, ("stem", "stride"), int, "1 or 2", lambda v: v in (1, 2)),
            max_pool=self.value(stem, ("stem", "max_pool"), bool, "true or false", lambda _: True),
            head_channels=self.whole(head, ("head", "channels")),
            choices=choices,
            stages=tuple(self.stage(stage, index) for index, stage in enumerate(stages)),
        )
        self.check_divisibility(space)
        self.check_resolution(space)
        return space

    def stage(self, data: Any, index: int) -> Stage:
        place = ("stage", index)
        if not isinstance(data, dict):
            self.fail(place, "a stage is a table written under [[stage]]", data)
        self.check_fields(data, STAGE_FIELDS, place)
        rule = ("whole numbers of at least 1", lambda v: type(v) is int and v >= 1)
        depth, width = (self.values(data, (*place, name), rule) for name in STAGE_FIELDS)
        return Stage(depth, width)

    def check_divisibility(self, space: SearchSpace) -> None:
        """Every branch of every unit must be whole, and every grouped pointwise convolution must divide."""
        groups = ", ".join(map(str, space.choices["groups"]))
        every = math.lcm(*space.choices["groups"])
        if space.stem_channels % every:
            self.fail(
                ("stem", "channels"),
                f"the stem's channels must divide by every choice of groups ({groups}); the nearest width that works "
                f"is {nearest_multiple(space.stem_channels, every)}",
                space.stem_channels,
            )
        # c' and c - c' must both divide by every choice of groups, and the closing shuffle needs an even c
        ratios = space.choices["split_ratio"]
        step = math.lcm(2, *(ratio.denominator * count for ratio in ratios for count in space.choices["groups"]))
        for index, stage in enumerate(space.stages):
            for width in stage.width:
                if width % step:
                    self.fail(
                        ("stage", index, "width"),
                        f"a width must give whole branches that divide by every choice of groups: with the split "
                        f"ratios {', '.join(map(str, ratios))} and the groups {groups} it is a multiple of {step}; the "
                        f"nearest that works is {nearest_multiple(width, step)}",
                        width,
                    )

    def check_resolution(self, space: SearchSpace) -> None:
        """Every stage halves the feature map; there must be something left to halve."""
        step = space.stem_stride * (2 if space.max_pool else 1) * 2 ** len(space.stages)
        if space.input_size % step:
            self.fail(
                ("input_size",),
                f"stem and stages shrink the input {step} times, so its size must be a multiple of that; the nearest "
                f"that works is {nearest_multiple(space.input_size, step)}",
                space.input_size,
            )

    def table(self, name: str) -> dict[str, Any]:
        data = self.data[name]
        if not isinstance(data, dict):
            self.fail((name,), f"'{name}' is a table, written under [{name}]", data)
        return data

    def check_fields(self, data: dict[str, Any], fields: tuple[str, ...], place: tuple[str | int, ...]) -> None:
        for name in data:
            if name not in fields:
                self.fail((*place, name), f"the fields here are {', '.join(fields)}", name)
        for name in fields:
            if name not in data:
                self.fail(place, f"'{name}' is missing; the fields here are {', '.join(fields)}", None)

    def whole(self, data: dict[str, Any], place: tuple[str | int, ...], least: int = 1) -> int:
        return self.value(data, place, int, f"a whole number of at least {least}", lambda v: v >= least)

    def value(
        self, data: dict[str, Any], place: tuple[str | int, ...], kind: type[T], rule: str, holds: Callable[[T], bool]
    ) -> T:
        value = data[str(place[-1])]
        if type(value) is not kind or not holds(value):
            self.fail(place, f"{place[-1]} is {rule}", value)
        return value

    def values(
        self, data: dict[str, Any], place: tuple[str | int, ...], rule: tuple[str, Callable[[Any], bool]]
    ) -> tuple[Any, ...]:
        values = data[str(place[-1])]
        if not isinstance(values, list) or not values:
            self.fail(place, f"{place[-1]} is a list of choices in brackets with at least one value", values)
        text, holds = rule
        for value in values:
            if not holds(value):
                self.fail(place, f"the choices of {place[-1]} are {text}", value)
        if place[-1] == "split_ratio":
            values = [Fraction(value) for value in values]
        if len(set(values)) != len(values):
            self.fail(place, f"each choice of {place[-1]} stands once", [str(value) for value in values])
        return tuple(values)

    def fail(self, place: tuple[str | int, ...], rule: str, value: Any) -> NoReturn:
        line = find_line(self.text, place)
        where = f"{self.source}, line {line}" if line else self.source
        seen = "" if value is None else f" It is {value!r}."
        raise HwnasError(f"{where}: {rule}.{seen}")


def _is_ratio(value: Any) -> bool:
    try:
        return isinstance(value, str) and 0 < Fraction(value) < 1
    except (ValueError, ZeroDivisionError):
        return False


def _is_switch(value: Any) -> bool:
    return type(value) is bool


_UNIT_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "split_ratio": ('fractions between 0 and 1 in quotes, such as "1/2"', _is_ratio),
    "kernel": ("odd whole numbers from 3 to 7", lambda v: type(v) is int and v in (3, 5, 7)),
    "squeeze_excite": ("true and false", _is_switch),
    "residual": ("true and false", _is_switch),
    "groups": ("whole numbers of at least 1", lambda v: type(v) is int and v >= 1),
    "extra_depthwise": ("true and false", _is_switch),
}


def find_line(text: str, place: tuple[str | int, ...]) -> int | None:
    """The number, from 1, of the line of a TOML text that holds a place such as `("stage", 1, "width")`.

    tomllib keeps no positions, so the text is searched: a place is a table's header (the n-th for an array of tables),
    or a key below it. `None` for the whole file, and for what stands inside an inline table.
    """
    wanted = [part for part in place if isinstance(part, str)]
    occurrence = next((part for part in place if isinstance(part, int)), 0)
    table: list[str] = []
    seen: Counter[str] = Counter()
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r"\s*\[+\s*([\w.-]+)\s*\]+", line):
            found = table = match[1].split(".")
            seen[match[1]] += 1
        elif match := re.match(r"""\s*["']?([\w.-]+)["']?\s*=""", line):
            found = [*table, *match[1].split(".")]
        else:
            continue
        if found == wanted and (not table or seen[".".join(table)] == occurrence + 1):
            return number
    return None
