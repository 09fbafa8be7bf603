"""The journal of an unfinished profile: JSON lines, written through to the disk after each group.

The first line holds the conditions; every other line is an entry. A line torn by a kill is cut off when the journal is
opened again.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from hwnas.errors import HwnasError
from hwnas.latency import Conditions, Entry, entry_json, parse_conditions, parse_entry, profile_command


class Journal:
    """Entries that are finished, in memory and on disk.

    Attributes:
        path: the file.
        started: when the profile began, in ISO 8601.
        entries: by key.
    """

    def __init__(self, path: Path, space: str, conditions: Conditions) -> None:
        """Continues the journal at `path`, or begins one there; `HwnasError` if it is of other conditions."""
        self.path = path
        self.entries: dict[str, Entry] = {}
        header, entries, whole_bytes = _read(path)
        if header is not None:
            _check(path, header, space, conditions)
            self.started = str(header["started"])
            self.entries = {entry.key: entry for entry in entries}
            os.truncate(path, whole_bytes)
        else:
            self.started = now()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            self._write([{"space": space, "started": self.started, "conditions": asdict(conditions)}])

    def add(self, entries: Iterable[Entry]) -> None:
        """Keeps entries; when this returns they are on the disk."""
        new = {entry.key: entry for entry in entries}
        self._write([entry_json(entry) for entry in new.values()])
        self.entries |= new

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


def _read(path: Path) -> tuple[dict[str, Any] | None, list[Entry], int]:
    """The first line, the entries after it, and how many bytes of the file are whole lines of those."""
    header: dict[str, Any] | None = None
    entries: list[Entry] = []
    whole_bytes = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            if not line.endswith(b"\n"):
                break
            data = json.loads(line)
            if header is None:
                header = data
            else:
                entries.append(parse_entry(data))
        except (ValueError, KeyError, TypeError):
            break
        whole_bytes += len(line)
    return header, entries, whole_bytes


def _check(path: Path, header: dict[str, Any], space: str, conditions: Conditions) -> None:
    try:
        found = parse_conditions(header["conditions"])
        differences = list(found.differences(conditions))
        if header["space"] != space:
            differences.append(("space", header["space"], space))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise HwnasError(f"{path} is not the journal of a latency table. Delete it and profile anew.") from None
    if differences:
        text = "; ".join(f"{name}: there {theirs!r}, now {ours!r}" for name, theirs, ours in differences)
        raise HwnasError(
            f"The unfinished latency table {path} was begun under other conditions ({text}). Delete the file and run: "
            f"{profile_command(space, conditions)}"
        )
