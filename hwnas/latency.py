"""`LatencyTable`: what each unit of a space costs on one device, and what a whole network will cost there.

A table describes itself: the device and how it was timed, every sample, and the whole networks on which the prediction
was calibrated and checked. A prediction is the sum of the units' milliseconds, led to whole networks by a line
(`line.py`); its upper bound is that times one plus a ratio that 95 % of unseen networks of the space stay under
(`calibration.py`).
"""

import hashlib
import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from hwnas.calibration import NOISE_LIMIT, Calibration, Measurement, WholeNetwork, significant
from hwnas.conditions import Conditions, checked, parse_conditions, profile_command
from hwnas.drift import Check
from hwnas.errors import HwnasError
from hwnas.experiments import Case, GuidelineTiming, check_complete
from hwnas.line import Line
from hwnas.memory import Memory, MemoryNetwork
from hwnas.network import Network, parameters, unit_key
from hwnas.places import Place, network_at, places_of, places_of_architecture
from hwnas.relation import Relation
from hwnas.space import Architecture, SearchSpace


@dataclass(frozen=True, slots=True)
class Prediction:
    """The expected milliseconds of a network, and what it stays under with 95 % confidence."""

    latency_ms: float
    upper_ms: float


@dataclass(frozen=True, slots=True)
class Entry:
    """The cost of one unit: what a network gains in milliseconds when the unit is added.

    Attributes:
        key: `network.unit_key` of the unit.
        unit: what it is and where it stands, for people.
        measurement: the gain in each round, `steadied`, over the median time of the network without the unit.
    """

    key: str
    unit: str
    measurement: Measurement

    @property
    def latency_ms(self) -> float:
        """The median gain, as whole networks are judged by their medians too."""
        return self.measurement.median_ms


@dataclass(frozen=True, slots=True)
class ComposedEntry:
    """The cost of a unit that was not timed itself: a sum of entries of others; see `composition.terms`.

    Attributes:
        key, unit: as those of an `Entry`.
        terms: the keys of measured entries, with how often each counts.
        latency_ms: their sum.
    """

    key: str
    unit: str
    terms: tuple[tuple[str, int], ...]
    latency_ms: float


FORMAT = "hwnas latency table 3"
WHAT = "milliseconds (ms) a run; an entry is what a network gains when the unit is added: the median of its samples"


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """The units of a space timed on one device.

    Attributes:
        conditions: where and how it was measured.
        space: the name of the space.
        started, finished: when, in ISO 8601.
        entries: by key.
        calibration: from sums to whole networks.
        anchor_ms: what the anchor took while the table was measured; see `devices.Device`.
        cautions: names of what made it less sure; see `cautions.CAUTIONS`.
        guidelines: timings of the paper's four experiments, all of them, or none where they were not measured.
        memory: the peak memory of whole networks; `None` where it was not measured.
        boards: of a farm, those that measured it, or were left out, in the last session.
    """

    conditions: Conditions
    space: str
    started: str
    finished: str
    entries: dict[str, Entry | ComposedEntry]
    calibration: Calibration
    anchor_ms: float
    cautions: tuple[str, ...] = ()
    guidelines: tuple[GuidelineTiming, ...] = ()
    memory: Memory | None = None
    boards: tuple[Relation, ...] = ()

    @property
    def profile_command(self) -> str:
        """The command that measures this table anew."""
        return profile_command(self.space, self.conditions)

    def raw_sum_ms(self, network: Network) -> float:
        """The sum of the entries of a network's units, in milliseconds, before calibration.

        Raises:
            HwnasError: an entry is missing; the message names the units and the command that measures them.
        """
        return sum(entry.latency_ms for entry in self._entries_of(network))

    def unit_ms(self, space: SearchSpace) -> dict[Place, float]:
        """The milliseconds of every place of a space; `HwnasError` if one has no entry."""
        return {place: self.raw_sum_ms(network_at(space, [place])) for place in places_of(space)}

    def predict(self, network: Network) -> Prediction:
        """What a network will take; `HwnasError` if the table lacks one of its units."""
        return self._prediction(self.raw_sum_ms(network), parameters(network))

    def predictor(self, space: SearchSpace) -> Callable[[Architecture], Prediction]:
        """`predict` for architectures of a space, remembering each unit it has seen: tens of microseconds a call."""
        known: dict[Place, tuple[float, int]] = {}

        def predict(architecture: Architecture) -> Prediction:
            sum_ms, count = 0.0, 0
            for place in places_of_architecture(space, architecture):
                if (unit := known.get(place)) is None:
                    network = network_at(space, [place])
                    unit = known[place] = self.raw_sum_ms(network), parameters(network)
                sum_ms += unit[0]
                count += unit[1]
            return self._prediction(sum_ms, count)

        return predict

    def corrected(self, pairs: Iterable[tuple[Network, Measurement]]) -> "LatencyTable":
        """The table with what newly measured whole networks taught.

        The line is scaled by the median of measured over predicted, and the new networks join the held-out ones behind
        the upper ratio. No pairs leave the table as it is.
        """
        new = [WholeNetwork((), self.raw_sum_ms(n), parameters(n), m, Measurement(()), held_out=True) for n, m in pairs]
        if not new:
            return self
        old = self.calibration
        factor = statistics.median(n.latency_ms / old.line.latency_ms(n.sum_ms, n.parameters) for n in new)
        moved = replace(old, line=old.line.scaled(float(factor)), networks=(*old.networks, *new))
        return replace(self, calibration=moved.bounded())

    def checked(self, found: Calibration, finished: str) -> "LatencyTable":
        """The table with what a check of it (`whole_networks.check_table`) tells of the machine's drift.

        A check that was itself too noisy tells nothing.
        """
        if found.noise_floor > NOISE_LIMIT:
            return self
        checks = (*self.calibration.checks, Check(finished, significant(found.shift)))
        return replace(self, calibration=replace(self.calibration, checks=checks).bounded())

    def check_error(self) -> None:
        """Raises `HwnasError` if the networks that the line has not seen say that the table is not to be relied on."""
        if failure := self.calibration.failure:
            raise HwnasError(
                f"The latency table of '{self.space}' on {self.conditions.device} failed its own check: {failure}. "
                f"Measure it anew when the machine is quiet: {self.profile_command}. Or take it as it is: --force."
            )

    def check_origin(self) -> None:
        """Raises `HwnasError` if the table was not measured on a real device."""
        origin, calibration = self.conditions.origin, self.calibration
        if origin == "measured":
            return
        if origin == "emulated":
            what = "its milliseconds say nothing of a real device"
        else:
            count = len(calibration.relative_errors)
            what = f"on {count} networks that were measured there it errs by {calibration.mean_absolute_error:.1%}"
        raise HwnasError(
            f"The latency table of '{self.space}' on {self.conditions.device} is {origin}, not measured: {what}. "
            f"Measure it: {self.profile_command}. Or take it as it is: --force."
        )

    def check_device(self, conditions: Conditions, space: str | None = None) -> None:
        """Raises `HwnasError` naming each field in which the table was measured under other conditions.

        Args:
            conditions: those of now.
            space: what `--space` takes for the table's space, where that is a file and not a name.
        """
        differences = self.conditions.differences(conditions)
        if differences:
            text = "; ".join(
                f"{name}: the table has {mine!r}, here it is {other!r}" for name, mine, other in differences
            )
            raise HwnasError(
                f"This latency table of '{self.space}' was measured under other conditions ({text}), so its "
                f"milliseconds do not hold here. Measure: {profile_command(space or self.space, conditions)}"
            )

    def to_json(self) -> str:
        """The table as JSON with one entry a line, so that two tables can be compared line by line."""
        head = {
            "format": FORMAT,
            "what": WHAT,
            "space": self.space,
            "started": self.started,
            "finished": self.finished,
            "conditions": asdict(self.conditions),
            "anchor_ms": self.anchor_ms,
            "cautions": self.cautions,
        }
        checks = [asdict(check) for check in self.calibration.checks]
        line = {
            "upper_ratio": self.calibration.upper_ratio,
            "checks": checks,
            "line": asdict(self.calibration.line),
        }
        guidelines = [
            ' "guidelines": [',
            ",\n".join("  " + json.dumps(guideline_json(timing)) for timing in self.guidelines),
            " ],",
        ]
        return "\n".join(
            [
                json.dumps(head, indent=1)[:-2] + ",",
                *(guidelines if self.guidelines else []),
                *(_memory_lines(self.memory) if self.memory else []),
                *(_board_lines(self.boards) if self.boards else []),
                f' "calibration": {json.dumps(line)[:-1]}, "networks": [',
                ",\n".join("  " + json.dumps(_network_json(network)) for network in self.calibration.networks),
                ' ]},\n "entries": [',
                ",\n".join("  " + json.dumps(entry_json(entry)) for entry in self.entries.values()),
                " ]\n}\n",
            ]
        )

    @property
    def digest(self) -> str:
        """SHA-256 of the table's file."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Writes the file all at once or not at all; makes its folder if need be."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".part")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(self.to_json())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def _entries_of(self, network: Network) -> list[Entry | ComposedEntry]:
        keys = [unit_key(unit) for unit in network.units]
        missing = [unit.name for unit, key in zip(network.units, keys, strict=True) if key not in self.entries]
        if missing:
            shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise HwnasError(
                f"The latency table of '{self.space}' on {self.conditions.device} has no entry for {shown} of "
                f"{network.name}. Measure: {self.profile_command}"
            )
        return [self.entries[key] for key in keys]

    def _prediction(self, sum_ms: float, count: int) -> Prediction:
        latency_ms = float(self.calibration.line.latency_ms(sum_ms, count))
        return Prediction(latency_ms, latency_ms * (1 + self.calibration.upper_ratio))


def table_path(folder: Path, space: str, conditions: Conditions) -> Path:
    """Where the table of a space under these conditions lies in a folder of latency tables."""
    settings = f"{conditions.precision}-t{conditions.threads}-b{conditions.batch}"
    return folder / conditions.device / f"{space}-{settings}.json"


# ---- reading -----------------------------------------------------------------------------------------------------


def matching_table(path: Path, conditions: Conditions) -> LatencyTable | None:
    """The latency table of a file if there is one and it was measured under these conditions."""
    table = load_table(path) if path.exists() else None
    return table if table and not table.conditions.differences(conditions) else None


def load_table(path: Path) -> LatencyTable:
    """Reads what `LatencyTable.save` wrote.

    Raises:
        HwnasError: no such file, or it is truncated, of another format, or holds what no measurement gives.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HwnasError(f"The latency table {path} cannot be read ({error}). Measure one: hwnas profile.") from None
    try:
        return _parse_table(json.loads(text, parse_constant=_refuse_constant))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"'{error.args[0]}' is missing" if isinstance(error, KeyError) else str(error)
        raise HwnasError(
            f"{path} is not a whole latency table: {what}. Delete the file and measure it anew with hwnas profile."
        ) from None


def _parse_table(data: Any) -> LatencyTable:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f'it does not begin with "format": "{FORMAT}"')
    calibration = data["calibration"]
    line = _parse_line(calibration["line"])
    upper_ratio = _number(calibration["upper_ratio"], "upper_ratio")
    networks = tuple(_parse_network(network) for network in calibration["networks"])
    entries = _parse_entries(data["entries"])
    guidelines = tuple(parse_guideline(timing) for timing in data.get("guidelines", []))
    check_complete(guidelines)
    for name in ("started", "finished"):
        datetime.fromisoformat(data[name])
    return LatencyTable(
        parse_conditions(data["conditions"]),
        checked(data["space"], "space", str),
        data["started"],
        data["finished"],
        entries,
        Calibration(line, upper_ratio, networks, tuple(map(_parse_check, calibration["checks"]))),
        _time_ms(data["anchor_ms"], "anchor_ms"),
        tuple(checked(name, "a caution", str) for name in data["cautions"]),
        guidelines,
        _parse_memory(data["memory"]) if "memory" in data else None,
        tuple(map(_parse_board, data.get("boards", []))),
    )


def composed_entry(key: str, unit: str, terms: Iterable[tuple[str, int]], measured: Mapping[str, Any]) -> ComposedEntry:
    """The entry that measured entries, by key, give together; `KeyError` if one of them is not there."""
    terms = tuple(terms)
    return ComposedEntry(key, unit, terms, sum(factor * measured[term].latency_ms for term, factor in terms))


def entry_json(entry: Entry | ComposedEntry) -> dict[str, Any]:
    """An entry as the table's file and the profiler's journal have it."""
    if isinstance(entry, ComposedEntry):
        return {"key": entry.key, "unit": entry.unit, "terms": dict(entry.terms)}
    return {
        "key": entry.key,
        "unit": entry.unit,
        "samples_ms": entry.measurement.samples_ms,
    }


def parse_entry(data: dict[str, Any]) -> Entry:
    """An entry from JSON; `ValueError`, `KeyError` or `TypeError` if it is not one."""
    key, unit = (checked(data[name], name, str) for name in ("key", "unit"))
    gains = tuple(_number(value, "a sample") for value in data["samples_ms"])
    entry = Entry(key, unit, Measurement(gains))
    _time_ms(entry.latency_ms, "the median of the samples")
    return entry


def _parse_line(data: dict[str, Any]) -> Line:
    knots, slopes, parameter_ns = (
        tuple(_number(value, name) for value in data[name]) for name in ("knots", "slopes", "parameter_ns")
    )
    if not len(knots) == len(slopes) == len(parameter_ns) > 0:
        raise ValueError("the line has not as many slopes and costs of a parameter as knots")
    if any(after <= before for before, after in pairwise((0.0, *knots))):
        raise ValueError(f"the knots of the line do not rise from 0: {knots}")
    return Line(_number(data["intercept_ms"], "intercept_ms"), knots, slopes, parameter_ns)


def _parse_entries(rows: Any) -> dict[str, Entry | ComposedEntry]:
    measured = {entry.key: entry for entry in (parse_entry(row) for row in rows if "terms" not in row)}
    entries: dict[str, Entry | ComposedEntry] = dict(measured)
    for row in rows:
        if "terms" not in row:
            continue
        key, unit = (checked(row[name], name, str) for name in ("key", "unit"))
        terms = [(term, checked(factor, "a factor", int)) for term, factor in row["terms"].items()]
        if missing := [term for term, _ in terms if term not in measured]:
            raise ValueError(f"the entry of {unit} is composed of {missing[0]}, which is not there")
        entries[key] = composed_entry(key, unit, terms, measured)
        _time_ms(entries[key].latency_ms, f"the sum of the terms of {unit}")
    return entries


def _network_json(network: WholeNetwork) -> dict[str, Any]:
    return {
        "encoding": network.encoding,
        "sum_ms": network.sum_ms,
        "parameters": network.parameters,
        "measured_ms": network.measured.samples_ms,
        "repeated_ms": network.repeated.samples_ms,
        "held_out": network.held_out,
    }


def _parse_network(data: dict[str, Any]) -> WholeNetwork:
    return WholeNetwork(
        tuple(checked(index, "an index", int) for index in data["encoding"]),
        _time_ms(data["sum_ms"], "sum_ms"),
        checked(data["parameters"], "parameters", int),
        Measurement(_samples(data["measured_ms"], least=1)),
        Measurement(_samples(data["repeated_ms"], least=0)),
        checked(data["held_out"], "held_out", bool),
    )


def _parse_check(data: dict[str, Any]) -> Check:
    datetime.fromisoformat(data["finished"])
    return Check(data["finished"], _number(data["shift"], "shift"))


def guideline_json(timing: GuidelineTiming) -> dict[str, Any]:
    return asdict(timing.case) | {"samples_ms": timing.measurement.samples_ms}


def parse_guideline(data: dict[str, Any]) -> GuidelineTiming:
    case = Case(**{f.name: checked(data[f.name], f.name, f.type) for f in fields(Case)})
    return GuidelineTiming(case, Measurement(_samples(data["samples_ms"], least=1)))


def _memory_lines(memory: Memory) -> list[str]:
    head = {name: getattr(memory, name) for name in _MEMORY_FACTORS}
    rows = ",\n".join("  " + json.dumps(asdict(network)) for network in memory.networks)
    return [f' "memory": {json.dumps(head)[:-1]}, "networks": [', rows, " ]},"]


_MEMORY_FACTORS = ("intercept_bytes", "per_model_byte", "per_working_byte", "upper_ratio")


def _parse_memory(data: dict[str, Any]) -> Memory:
    factors = [_number(data[name], name) for name in _MEMORY_FACTORS]
    return Memory(*factors, networks=tuple(_parse_memory_network(row) for row in data["networks"]))


def _parse_memory_network(data: dict[str, Any]) -> MemoryNetwork:
    def positive(value: Any, name: str) -> int:
        if checked(value, name, int) <= 0:
            raise ValueError(f"{name} is {value!r} bytes, which no measurement gives")
        return value

    samples = tuple(positive(value, "a sample") for value in data["samples_bytes"])
    if not samples:
        raise ValueError("there are no samples of memory")
    return MemoryNetwork(
        tuple(checked(index, "an index", int) for index in data["encoding"]),
        positive(data["model_bytes"], "model_bytes"),
        positive(data["working_bytes"], "working_bytes"),
        samples,
        checked(data["held_out"], "held_out", bool),
    )


def _board_lines(boards: Sequence[Relation]) -> list[str]:
    return [' "boards": [', ",\n".join("  " + json.dumps(asdict(board)) for board in boards), " ],"]


def _parse_board(data: dict[str, Any]) -> Relation:
    return Relation(
        checked(data["board"], "board", str),
        _time_ms(data["factor"], "factor"),
        _number(data["scatter"], "scatter"),
        _samples(data["networks_ms"], least=0),
        checked(data["timed"], "timed", int),
        checked(data["left_out"], "left_out", str),
    )


def _samples(values: Any, least: int) -> tuple[float, ...]:
    if len(values) < least:
        raise ValueError("there are no samples")
    return tuple(_time_ms(value, "a sample") for value in values)


def _time_ms(value: Any, name: str) -> float:
    if _number(value, name) <= 0:
        raise ValueError(f"{name} is {value!r} ms, which no measurement gives")
    return float(value)


def _number(value: Any, name: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, which is no number")
    return float(value)


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"it holds {text}, which no measurement gives")
