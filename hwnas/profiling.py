"""A search space and a device -> a latency table.

Some of the units are timed, each as the difference that it makes to its host (`chains.py`): the median time of the
chain with the unit, less that of the host, both from the same rounds. The entries of the others are composed of theirs
(`composition.py`). Every finished group goes into a journal beside the table; a killed run goes on from there.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hwnas.calibration import Measurement, calibrate, significant
from hwnas.cautions import Seen, cautions_of
from hwnas.chains import chain_of, copies_of, host_of, network_of
from hwnas.composition import is_timed, terms
from hwnas.devices import Device, Timing
from hwnas.errors import DeviceError, HwnasError
from hwnas.journal import ENTRIES, Journal, now
from hwnas.latency import (
    ComposedEntry,
    Entry,
    LatencyTable,
    composed_entry,
    matching_table,
    table_path,
)
from hwnas.memory_profiling import FITTED as MEMORY_FITTED
from hwnas.memory_profiling import HELD_OUT as MEMORY_HELD_OUT
from hwnas.memory_profiling import profile_memory
from hwnas.network import unit_key
from hwnas.places import Place, label, network_at, places_of
from hwnas.space import SearchSpace
from hwnas.whole_networks import FITTED, HELD_OUT, TIMINGS, ProgressCallback, Setup, calibration_networks

TIMING = Timing(sample_ms=1.5, least_runs=5)

GROUP_MODELS, GROUP_BYTES = 64, 96 << 20
"""A group is measured as a whole and lost as a whole by a kill; its models are all in memory at once."""

ATTEMPTS = 3
"""How often a unit is timed that seemed to cost nothing, or for which the machine was too disturbed."""

SLOW = 1.1
"""A group is timed again if the anchor took so much longer than in a later one."""

LEAST_COMPOSED = 0.5
"""A unit whose terms give less than this share of the least of them is timed itself."""


@dataclass(frozen=True, slots=True)
class Group:
    """Units that have one host, and the serialised models to time: the host first, if there is one."""

    host: tuple[Place, ...]
    units: tuple[tuple[str, Place], ...]
    models: tuple[bytes, ...]


def profile(
    space: SearchSpace,
    device: Device,
    *,
    threads: int = 1,
    batch: int = 1,
    precision: str = "fp32",
    folder: Path,
    on_progress: ProgressCallback = lambda done, total, what: None,
    seed: int = 0,
) -> LatencyTable:
    """Measures what the units of a space cost, calibrates on whole networks, and writes the table.

    An unfinished profile of the same conditions is continued. A table that lacks units of the space is completed; a
    complete one is measured anew. The table lies at `latency.table_path(folder, ...)`, and until it is finished its
    journal lies beside it.

    Args:
        space: what to cover.
        device: where.
        threads, batch, precision: how.
        folder: the folder of latency tables.
        on_progress: called after each unit and after each timing and memory of a whole network.
        seed: of weights, inputs, orders and the choice of whole networks.

    Raises:
        HwnasError: the device cannot do it, or the unfinished profile there was made under other conditions.
    """
    conditions = device.conditions(threads, batch, precision)
    path = table_path(folder, space.name, conditions)
    places = keys_of(space)
    journal = Journal(path.with_suffix(".journal"), space.name, conditions, ENTRIES)
    timed = [(key, place) for key, place in places.items() if place.choice is None or is_timed(space, place.choice)]
    old = matching_table(path, conditions)
    measured = _entries_to_complete(old, timed) | journal.items
    todo = [(key, place) for key, place in timed if key not in measured]
    total = len(timed) + TIMINGS * min(FITTED + HELD_OUT, space.size) + min(MEMORY_FITTED + MEMORY_HELD_OUT, space.size)
    done = len(timed) - len(todo)
    setup = Setup(space, device, threads, batch, precision, seed)

    def count(what: str) -> None:
        nonlocal done
        done += 1
        on_progress(done, total, what)

    for entry in _measured_units(setup, journal, todo):
        if entry.key not in measured:  # else it was timed again
            count(entry.unit)
        measured[entry.key] = entry
    entries = {**measured, **dict(_composed(space, places, measured))}
    unclear = [(key, place) for key, place in places.items() if key not in entries]
    for entry in _measured_units(setup, journal, unclear):
        entries[entry.key] = entry
    if missing := [label(space, place) for key, place in places.items() if key not in entries]:
        raise AssertionError(f"{len(missing)} units of {space.name} have no entry, such as {missing[0]}")

    unit_ms = {place: entries[key].latency_ms for key, place in places.items()}
    networks = calibration_networks(setup, unit_ms, lambda: count("whole networks"))
    calibration = calibrate(networks)
    memory = profile_memory(setup, [network.encoding for network in networks], lambda: count("memory"))
    cautions = cautions_of(Seen(conditions, device.groups, calibration))
    assert device.anchor_ms is not None
    guidelines = old.guidelines if old else ()
    table = LatencyTable(
        conditions,
        space.name,
        journal.started,
        now(),
        entries,
        calibration,
        device.anchor_ms,
        cautions,
        guidelines,
        memory,
        device.relations,
    )
    table.save(path)
    journal.remove()
    return table


def keys_of(space: SearchSpace) -> dict[str, Place]:
    """Every place of a space by the key of its unit."""
    return {unit_key(network_at(space, [place]).units[0]): place for place in places_of(space)}


def covers(table: LatencyTable, space: SearchSpace) -> bool:
    """Whether a table has an entry for every unit that a network of the space can have."""
    return table.entries.keys() >= keys_of(space).keys()


def _entries_to_complete(old: LatencyTable | None, timed: Sequence[tuple[str, Place]]) -> dict[str, Entry]:
    """What was measured for a table of the same conditions that does not cover the space."""
    if old is None or all(key in old.entries for key, _ in timed):
        return {}
    return {key: entry for key, entry in old.entries.items() if isinstance(entry, Entry)}


def _composed(
    space: SearchSpace, places: Mapping[str, Place], measured: Mapping[str, Entry]
) -> Iterator[tuple[str, ComposedEntry]]:
    """The entries of units that were not timed, but those whose terms leave too little to be believed."""
    keys = {place: key for key, place in places.items()}
    for key, place in places.items():
        if key in measured or place.choice is None:
            continue
        parts = [(keys[place._replace(choice=unit)], factor) for unit, factor in terms(space, place.choice).items()]
        entry = composed_entry(key, label(space, place), parts, measured)
        if entry.latency_ms > LEAST_COMPOSED * min(measured[part].latency_ms for part, _ in parts):
            yield key, entry


# ---- units -------------------------------------------------------------------------------------------------------


def _measured_units(setup: Setup, journal: Journal[Entry], units: Sequence[tuple[str, Place]]) -> Iterator[Entry]:
    """The entry of each unit, once it is in the journal.

    A unit that seems to cost nothing, or for which the machine was too disturbed, is timed again; so are those of a
    group whose machine, as later groups show, was slow all the time.
    """
    for attempt in range(1, ATTEMPTS + 1):
        unclear: list[tuple[str, Place]] = []
        anchors: list[tuple[float, Iterable[tuple[str, Place]]]] = []
        for group, results in _pipelined(setup, _groups(setup, units)):
            entries = {unit: entry_of(setup.space, group, index, results) for index, unit in enumerate(group.units)}
            paces = {unit: pace_of(group, index, results) for index, unit in enumerate(group.units)}
            clear = {
                unit: entry
                for unit, entry in entries.items()
                if entry.latency_ms > 0 and (paces[unit] == 1 or attempt == ATTEMPTS)
            }
            unclear += entries.keys() - clear.keys()
            anchors.append((setup.device.anchor_ms or 0.0, clear.keys()))
            journal.add(clear.values())
            yield from clear.values()
        if attempt < ATTEMPTS:
            usual_ms = min((anchor_ms for anchor_ms, _ in anchors), default=0.0)
            unclear += [unit for anchor_ms, timed in anchors if anchor_ms > SLOW * usual_ms for unit in timed]
        if not unclear:
            return
        units = unclear
    raise HwnasError(
        f"{len(units)} units took no measurable time in {ATTEMPTS} attempts, such as "
        f"{label(setup.space, units[0][1])}: the machine is too busy. "
        "Run the command again when it is quiet: what was finished is kept."
    )


def _pipelined(setup: Setup, groups: Iterable[Group]) -> Iterator[tuple[Group, dict[int, Measurement]]]:
    """Groups and their timings; the models of the next group are built while the device times those before it.

    If the device is lost, the groups come first that it has finished.
    """
    running: deque[tuple[Group, Iterator[tuple[int, Measurement]]]] = deque()
    finished: list[tuple[Group, dict[int, Measurement]]] = []

    def finish() -> None:
        group, results = running.popleft()
        finished.append((group, dict(results)))

    try:
        for group in groups:
            if len(running) == setup.device.at_once:
                finish()
            running.append((group, setup.device.measure(group.models, setup.timing(TIMING))))
            while finished:
                yield finished.pop()
        while running:
            finish()
            yield finished.pop()
    except DeviceError:
        while running:
            with suppress(DeviceError):
                finish()
        yield from finished
        raise


def _groups(setup: Setup, units: Sequence[tuple[str, Place]]) -> Iterator[Group]:
    space = setup.space
    by_host: dict[tuple[Place, ...], list[tuple[str, Place]]] = {}
    for key, place in units:
        by_host.setdefault(host_of(space, place), []).append((key, place))
    for host, members in by_host.items():
        host_models = (setup.model(network_of(space, host)),) if host else ()
        models: list[bytes] = []
        first = 0
        for index, (_, place) in enumerate(members, 1):
            models.append(setup.model(network_of(space, chain_of(space, place))))
            if len(models) == GROUP_MODELS or sum(map(len, models)) >= GROUP_BYTES or index == len(members):
                yield Group(host, tuple(members[first:index]), (*host_models, *models))
                models, first = [], index


def entry_of(space: SearchSpace, group: Group, index: int, results: Mapping[int, Measurement]) -> Entry:
    """The entry of a group's unit `index`, from the timings of the group's models."""
    key, place = group.units[index]
    host_ms = results[0].at_usual_pace().median_ms if group.host else 0.0
    with_unit = results[index + len(group.models) - len(group.units)].at_usual_pace()
    gains = tuple(significant((sample - host_ms) / copies_of(place)) for sample in with_unit.samples_ms)
    return Entry(key, label(space, place), Measurement(gains))


def pace_of(group: Group, index: int, results: Mapping[int, Measurement]) -> float:
    """The worse of the paces at which a group's unit `index` and its host were timed."""
    used = [results[index + len(group.models) - len(group.units)], *([results[0]] if group.host else [])]
    return max(measurement.pace for measurement in used)
