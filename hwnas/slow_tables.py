"""Tells, while a latency table is being measured, that it will take long, and what takes less."""

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from hwnas.conditions import Conditions, profile_command
from hwnas.errors import HwnasError
from hwnas.latency import LatencyTable, load_table
from hwnas.profiling import covers
from hwnas.space import SearchSpace
from hwnas.space_toml import shipped_folder
from hwnas.whole_networks import ProgressCallback

SLOW_S = 20 * 60.0
"""A table that takes longer is worth the note."""

WATCHED_S, WATCHED_ITEMS = 60.0, 10
"""How long a pace is watched before it is believed, and over how many items, at least."""


class Warned:
    """Progress that is handed on; a note, once, if at its pace the rest will take long.

    Args:
        on_progress: what it is handed on to.
        note: shows a text to the user.
        offer: what takes less, in a sentence; asked for only when it is needed.
        clock: seconds.
    """

    def __init__(
        self,
        on_progress: ProgressCallback,
        note: Callable[[str], None],
        offer: Callable[[], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._on_progress, self._note, self._offer, self._clock = on_progress, note, offer, clock
        self._first: tuple[float, int] | None = None
        self._told = False

    def __call__(self, done: int, total: int, what: str) -> None:
        self._on_progress(done, total, what)
        if self._first is None:  # what came before it was preparation, or another run's
            self._first = self._clock(), done
        seconds, items = self._clock() - self._first[0], done - self._first[1]
        if self._told or seconds < WATCHED_S or items < WATCHED_ITEMS:
            return
        left_s = seconds / items * (total - done)
        if left_s > SLOW_S:
            self._told = True
            self._note(f"At this pace the table takes {_duration(left_s)} more. {self._offer()}")


def warned(
    on_progress: ProgressCallback,
    note: Callable[[str], None],
    space: SearchSpace,
    conditions: Conditions,
    folder: Path,
) -> Warned:
    """Progress of `profiling.profile` that offers an estimated table where the measured one takes long.

    Args:
        on_progress: what it is handed on to.
        note: shows a text to the user.
        space: of the table.
        conditions: of the table.
        folder: of the user's latency tables, in which another device's is looked for.
    """

    def offer() -> str:
        known = known_table((folder, shipped_folder("latency_tables")), space, conditions)
        command = f"{profile_command(space.name, conditions)} --from {known or 'TABLE'}"
        whose = "another device's" if known else "another device's TABLE"
        return (
            f"One estimated from {whose} needs 30 measured networks only, and tells its error: stop this (what is "
            f"measured is kept) and give: {command}"
        )

    return Warned(on_progress, note, offer)


def known_table(folders: Iterable[Path], space: SearchSpace, conditions: Conditions) -> Path | None:
    """The measured table that suits best for an estimate: it covers the space, its settings are as like as may be."""
    found: list[tuple[int, Path]] = []
    for path in (path for folder in folders for path in sorted(folder.glob("*/*.json"))):
        with suppress(HwnasError):  # one that is broken is no candidate
            table = load_table(path)
            if _serves(table, space, conditions):
                settings = ((c.precision, c.batch, c.threads) for c in (table.conditions, conditions))
                found.append((sum(a != b for a, b in zip(*settings, strict=True)), path))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _serves(table: LatencyTable, space: SearchSpace, conditions: Conditions) -> bool:
    measured = table.conditions.origin == "measured"
    return measured and bool(table.conditions.differences(conditions)) and covers(table, space)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"
