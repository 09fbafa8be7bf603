"""The journal of an unfinished measurement: JSON lines, written through to the disk after each group.

The first line holds the conditions; every other line is an item, such as an entry of a latency table. A line torn by a
kill is cut off when the journal is opened again.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

from hwnas.conditions import Conditions, parse_conditions
from hwnas.errors import HwnasError
from hwnas.experiments import GuidelineTiming
from hwnas.latency import Entry, entry_json, guideline_json, parse_entry, parse_guideline

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Kind(Generic[Item]):
    """What a journal holds: what tells two items apart, and how one becomes JSON and comes back from it."""

    key: Callable[[Item], Any]
    to_json: Callable[[Item], dict[str, Any]]
    parse: Callable[[dict[str, Any]], Item]


ENTRIES: Kind[Entry] = Kind(lambda entry: entry.key, entry_json, parse_entry)
GUIDELINES: Kind[GuidelineTiming] = Kind(lambda timing: timing.case, guideline_json, parse_guideline)


class Journal(Generic[Item]):
    """Items that are finished, in memory and on disk.

    Attributes:
        path: the file.
        started: when the measurement began, in ISO 8601.
        items: by what tells them apart.
    """

    def __init__(self, path: Path, space: str, conditions: Conditions, kind: Kind[Item]) -> None:
        """Continues the journal at `path`, or begins one there; `HwnasError` if it is of other conditions."""
        self.path, self._kind = path, kind
        self.items: dict[Any, Item] = {}
        header, items, whole_bytes = _read(path, kind)
        if header is not None:
            _check(path, header, space, conditions)
            self.started = str(header["started"])
            self.items = {kind.key(item): item for item in items}
            os.truncate(path, whole_bytes)
        else:
            self.started = now()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            self._write([{"space": space, "started": self.started, "conditions": asdict(conditions)}])

    def add(self, items: Iterable[Item]) -> None:
        """Keeps items; when this returns they are on the disk."""
        new = {self._kind.key(item): item for item in items}
        self._write([self._kind.to_json(item) for item in new.values()])
        self.items |= new

    def remove(self) -> None:
        self.path.unlink()

    def _write(self, lines: list[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())


def now() -> str:
    """The time in ISO 8601, to the second, with its zone."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _read(path: Path, kind: Kind[Item]) -> tuple[dict[str, Any] | None, list[Item], int]:
    """The first line, the items after it, and how many bytes of the file are whole lines of those."""
    header: dict[str, Any] | None = None
    items: list[Item] = []
    whole_bytes = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            if not line.endswith(b"\n"):
                break
            data = json.loads(line)
            if header is None:
                header = data
            else:
                items.append(kind.parse(data))
        except (ValueError, KeyError, TypeError):
            break
        whole_bytes += len(line)
    return header, items, whole_bytes


def _check(path: Path, header: dict[str, Any], space: str, conditions: Conditions) -> None:
    try:
        found = parse_conditions(header["conditions"])
        differences = list(found.differences(conditions))
        if header["space"] != space:
            differences.append(("space", header["space"], space))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise HwnasError(f"{path} is not the journal of a measurement. Delete it and run the command again.") from None
    if differences:
        text = "; ".join(f"{name}: there {theirs!r}, now {ours!r}" for name, theirs, ours in differences)
        raise HwnasError(
            f"The unfinished measurement {path} was begun under other conditions ({text}). Delete the file and run the "
            "command again."
        )
