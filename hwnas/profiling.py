"""A search space and a device -> a latency table.

An entry is a difference: the median time of a network with the unit, less that of the same network without it (its
host), both from the same rounds. Medians and not minima: while something else runs on the other half of a core, the
least sample of one model falls into a free moment and that of the next does not. The host gives the unit the neighbours
that it has in the space, so that what the runtime does at its borders (changes of layout, fusions) is paid as in a
whole network:

| unit                        | host                                   | with the unit                          |
|-----------------------------|----------------------------------------|----------------------------------------|
| stem                        | nothing                                | the stem                               |
| stride 2, first stage       | the stem, whose layout it takes over   | the stem, then the unit                |
| stride 2, later stages      | a plain stride-1 unit of its width     | the unit, then the plain one           |
| stride 1                    | a plain stride-1 unit of its width     | the unit `COPIES` times, the plain one |
| head                        | a plain stride-1 unit of its width     | the plain one, then the head           |

Every finished group goes into a journal beside the table; a killed run goes on from there.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hwnas.calibration import Calibration, Measurement, WholeNetwork, calibrate, steadied
from hwnas.devices import Device, Timing
from hwnas.errors import HwnasError
from hwnas.journal import Journal, now
from hwnas.latency import Conditions, Entry, LatencyTable, load_table, table_path
from hwnas.network import Network, parameters, unit_key
from hwnas.onnx_model import random_weights, to_onnx
from hwnas.places import (
    Place,
    extreme_architecture,
    label,
    network_at,
    places_of,
    places_of_architecture,
    stem_place,
)
from hwnas.space import SearchSpace, lower
from hwnas.units import UnitChoice

COPIES = 2
"""How often a stride-1 unit stands in its chain: more copies, less noise, more time."""

UNIT_ROUNDS, UNIT_SAMPLE_MS = 15, 0.3
NETWORK_ROUNDS = 25
"""Rounds count for more than long samples do: what disturbs one round is gone in another."""

GROUP_MODELS, GROUP_BYTES = 64, 96 << 20
"""A group is measured as a whole and lost as a whole by a kill; its models are all in memory at once."""

ATTEMPTS = 3
"""How often a unit is timed that seemed to cost nothing, as the cheapest can in a disturbed minute."""

CALIBRATION_NETWORKS, CALIBRATION_CANDIDATES = 40, 800

Code = tuple[int, ...]
"""The integer encoding of an architecture."""

ProgressCallback = Callable[[int, int, str], None]
"""Called with the number done, the number there are, and what was done: the label of a unit, or a network."""


@dataclass(frozen=True, slots=True)
class Group:
    """Units that have one host, and the serialised models to time: the host first, if there is one."""

    host: tuple[Place, ...]
    units: tuple[tuple[str, Place], ...]
    models: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class _Job:
    """What every step of a profile needs."""

    space: SearchSpace
    device: Device
    timing: Timing
    batch: int
    precision: str

    def model(self, network: Network) -> bytes:
        weights = random_weights(network, self.timing.seed)
        return to_onnx(network, weights, batch=self.batch, precision=self.precision).SerializeToString()


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
    """Measures every unit that a network of the space can have, calibrates on whole networks, and writes the table.

    An unfinished profile of the same conditions is continued. A table that lacks units of the space is completed; a
    complete one is measured anew. The table lies at `latency.table_path(folder, ...)`, and until it is finished its
    journal lies beside it.

    Args:
        space: what to cover.
        device: where.
        threads, batch, precision: how.
        folder: the folder of latency tables.
        on_progress: called after each unit and each whole network.
        seed: of weights, inputs, orders and the choice of whole networks.

    Raises:
        HwnasError: the device cannot do it, or the unfinished profile there was made under other conditions.
    """
    conditions = device.conditions(threads, batch, precision)
    path = table_path(folder, space.name, conditions)
    places = {unit_key(network_at(space, [place]).units[0]): place for place in places_of(space)}
    journal = Journal(path.with_suffix(".journal"), space.name, conditions)
    entries = _entries_to_complete(path, conditions, places) | journal.entries
    todo = [(key, place) for key, place in places.items() if key not in entries]
    total = len(places) + min(CALIBRATION_NETWORKS, space.size)
    done = len(places) - len(todo)
    timing = Timing(threads=threads, rounds=UNIT_ROUNDS, sample_ms=UNIT_SAMPLE_MS, seed=seed)
    job = _Job(space, device, timing, batch, precision)
    for entry in _measured_units(job, journal, todo):
        entries[entry.key] = entry
        done += 1
        on_progress(done, total, entry.unit)
    if missing := [label(space, place) for key, place in places.items() if key not in entries]:
        raise AssertionError(f"{len(missing)} units of {space.name} have no entry, such as {missing[0]}")

    networks = []
    for network in _calibration_networks(job, {place: entries[key].latency_ms for key, place in places.items()}):
        networks.append(network)
        on_progress(done + len(networks), total, f"whole network {len(networks)}")
    table = LatencyTable(conditions, space.name, journal.started, now(), entries, calibrate(networks))
    table.save(path)
    journal.remove()
    return table


def covers(table: LatencyTable, space: SearchSpace) -> bool:
    """Whether a table has an entry for every unit that a network of the space can have."""
    return all(unit_key(network_at(space, [place]).units[0]) in table.entries for place in places_of(space))


def check_table(
    table: LatencyTable, space: SearchSpace, device: Device, *, networks: int = 40, seed: int = 1
) -> Calibration:
    """Measures random networks of the space that the table has not seen, twice, under the table's conditions.

    Args:
        table: covers the space.
        space: where the networks are drawn from, by `SearchSpace.sample`.
        device: where the table was measured.
        networks: how many to draw; one that is drawn twice counts once.
        seed: of the draw, the weights and the inputs.

    Returns:
        The table's own line and ratio with the new networks, all held out: see `Calibration.rms_error`, `noise_floor`,
        `kendall_tau`, `bias` and `coverage`.

    Raises:
        HwnasError: the table lacks units of the networks, or the device's conditions are others than the table's.
    """
    here = table.conditions
    table.check_device(device.conditions(here.threads, here.batch, here.precision))
    job = _Job(space, device, Timing(threads=here.threads, seed=seed), here.batch, here.precision)
    rng = random.Random(seed)
    codes = [space.encode(space.sample(rng)) for _ in range(networks)]
    sum_ms = {code: table.raw_sum_ms(lower(space, space.decode(code))) for code in codes}
    return replace(table.calibration, networks=tuple(_whole_networks(job, sum_ms, held_out=codes)))


def _entries_to_complete(path: Path, conditions: Conditions, places: dict[str, Place]) -> dict[str, Entry]:
    """What stands already in a table of the same conditions that does not cover the space."""
    if not path.exists():
        return {}
    table = load_table(path)
    complete = all(key in table.entries for key in places)
    return {} if complete or table.conditions.differences(conditions) else dict(table.entries)


# ---- units -------------------------------------------------------------------------------------------------------


def _measured_units(job: _Job, journal: Journal, units: Sequence[tuple[str, Place]]) -> Iterator[Entry]:
    """The entry of each unit, once it is in the journal. A unit that seems to cost nothing is timed again."""
    for _ in range(ATTEMPTS):
        unclear: list[tuple[str, Place]] = []
        for group, results in _pipelined(job, _groups(job, units)):
            entries = {unit: entry_of(job.space, group, index, results) for index, unit in enumerate(group.units)}
            clear = {unit: entry for unit, entry in entries.items() if entry.latency_ms > 0}
            unclear += entries.keys() - clear.keys()
            journal.add(clear.values())
            yield from clear.values()
        if not unclear:
            return
        units = unclear
    raise HwnasError(
        f"{len(units)} units took no measurable time in {ATTEMPTS} attempts, such as "
        f"{label(job.space, units[0][1])}: the machine is too busy. Run the command again when it is quiet."
    )


def _pipelined(job: _Job, groups: Iterable[Group]) -> Iterator[tuple[Group, dict[int, Measurement]]]:
    """Groups and their timings; the models of the next group are built while the device times this one."""
    running: tuple[Group, Iterator[tuple[int, Measurement]]] | None = None
    for group in groups:
        finished = running and (running[0], steadied(dict(running[1])))
        running = group, job.device.measure(group.models, job.timing)
        if finished:
            yield finished
    if running:
        yield running[0], steadied(dict(running[1]))


def _groups(job: _Job, units: Sequence[tuple[str, Place]]) -> Iterator[Group]:
    space = job.space
    by_host: dict[tuple[Place, ...], list[tuple[str, Place]]] = {}
    for key, place in units:
        by_host.setdefault(host_of(space, place), []).append((key, place))
    for host, members in by_host.items():
        host_models = (job.model(network_at(space, host)),) if host else ()
        models: list[bytes] = []
        first = 0
        for index, (_, place) in enumerate(members, 1):
            models.append(job.model(network_at(space, chain_of(space, place))))
            if len(models) == GROUP_MODELS or sum(map(len, models)) >= GROUP_BYTES or index == len(members):
                yield Group(host, tuple(members[first:index]), (*host_models, *models))
                models, first = [], index


def host_of(space: SearchSpace, place: Place) -> tuple[Place, ...]:
    """The chain in whose company the unit at a place is timed; see the table at the top of this module."""
    if place.stage == 1:
        return ()
    if place.stage == 2 and place.stride == 2:
        return (stem_place(space),)
    stage, channels = (place.stage - 1, place.channels_in) if place.choice is None else (place.stage, place.channels)
    return (Place(stage, channels, channels, 1, UnitChoice()),)


def chain_of(space: SearchSpace, place: Place) -> tuple[Place, ...]:
    """The host of a place with the unit added to it."""
    host = host_of(space, place)
    if place.choice is None or (place.stage == 2 and place.stride == 2):
        return (*host, place)
    return (*[place] * copies_of(place), *host)


def copies_of(place: Place) -> int:
    """How often the unit at a place stands in its chain."""
    return COPIES if place.stride == 1 and place.choice is not None else 1


def entry_of(space: SearchSpace, group: Group, index: int, results: Mapping[int, Measurement]) -> Entry:
    """The entry of a group's unit `index`, from the timings of the group's models."""
    key, place = group.units[index]
    host_ms = results[0].median_ms if group.host else 0.0
    with_unit = results[index + len(group.models) - len(group.units)]
    gains = tuple(significant((sample - host_ms) / copies_of(place)) for sample in with_unit.samples_ms)
    return Entry(key, label(space, place), Measurement(gains))


def significant(value: float) -> float:
    """Four significant digits: more than any timing holds, and short in a file."""
    return float(f"{value:.4g}")


# ---- whole networks ----------------------------------------------------------------------------------------------


def _calibration_networks(job: _Job, unit_ms: Mapping[Place, float]) -> list[WholeNetwork]:
    """Networks of the whole range of latencies, measured. Half of them are held out, drawn at random."""
    space, rng = job.space, random.Random(job.timing.seed)
    sum_ms = {
        code: sum(unit_ms[place] for place in places_of_architecture(space, space.decode(code)))
        for code in _candidates(space, unit_ms, rng)
    }
    chosen = spread(sum_ms, CALIBRATION_NETWORKS)
    held_out = rng.sample(chosen[1:-1], min(len(chosen) // 2, len(chosen[1:-1])))
    return _whole_networks(job, {code: sum_ms[code] for code in chosen}, held_out)


def _whole_networks(job: _Job, sum_ms: Mapping[Code, float], held_out: Sequence[Code]) -> list[WholeNetwork]:
    """The networks that `sum_ms` holds, each timed twice."""
    networks = [lower(job.space, job.space.decode(code)) for code in sum_ms]
    models = [job.model(network) for network in networks]
    timing = replace(job.timing, rounds=NETWORK_ROUNDS)
    first, second = (steadied(dict(job.device.measure(models, timing))) for _ in range(2))
    return [
        WholeNetwork(
            code, sum_ms[code], parameters(network), _short(first[i]), _short(second[i]), held_out=code in held_out
        )
        for i, (code, network) in enumerate(zip(sum_ms, networks, strict=True))
    ]


def _short(measurement: Measurement) -> Measurement:
    return Measurement(tuple(map(significant, measurement.samples_ms)))


def _candidates(space: SearchSpace, unit_ms: Mapping[Place, float], rng: random.Random) -> Iterator[Code]:
    """The fastest and the slowest architecture, and random ones drawn more or less towards one of the two."""
    extremes = [space.encode(extreme_architecture(space, unit_ms, slowest=slowest)) for slowest in (False, True)]
    yield from extremes
    for _ in range(CALIBRATION_CANDIDATES):
        extreme, share = rng.choice(extremes), rng.random()
        code = (e if rng.random() < share else rng.randrange(r) for e, r in zip(extreme, space.radices, strict=True))
        yield space.canonical(tuple(code))


def spread(sum_ms: dict[Code, float], count: int) -> list[Code]:
    """Up to `count` codes whose sums lie as evenly as may be, in ratio, from the least to the greatest, in order."""
    remaining = sorted(sum_ms, key=lambda code: sum_ms[code])
    if len(remaining) <= count:
        return remaining
    targets = np.geomspace(sum_ms[remaining[0]], sum_ms[remaining[-1]], count)
    chosen = {remaining.pop(0), remaining.pop()}
    for target in targets[1:-1]:
        nearest = min(remaining, key=lambda code: abs(sum_ms[code] - target))
        remaining.remove(nearest)
        chosen.add(nearest)
    return sorted(chosen, key=lambda code: sum_ms[code])
