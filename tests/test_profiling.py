"""Profiles of a made-up space, one of them killed on the way.

The measuring process runs every model for real; its clock is scripted (`steady.py`): a busy machine fails nothing.
"""

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import steady

from hwnas import profiling
from hwnas.chains import chain_of, copies_of, host_of, network_of
from hwnas.composition import is_timed
from hwnas.devices import Device
from hwnas.errors import HwnasError
from hwnas.experiments import EXPERIMENTS, GuidelineTiming, cases
from hwnas.journal import ENTRIES, Journal
from hwnas.latency import ComposedEntry, Entry, Measurement, load_table, parse_entry
from hwnas.lines import Line
from hwnas.memory_profiling import FITTED as MEMORY_FITTED
from hwnas.memory_profiling import HELD_OUT as MEMORY_HELD_OUT
from hwnas.model_size import model_bytes
from hwnas.network import unit_key
from hwnas.places import network_at, places_of, places_of_architecture
from hwnas.profiling import Group, entry_of, pace_of, profile
from hwnas.space import lower
from hwnas.space_toml import load_space, parse_space
from hwnas.whole_networks import FITTED, HELD_OUT, TIMINGS, candidates, check_table, spread

SPACE = """
name = "made-up"
input_size = 16
classes = 4
stem = { channels = 16, stride = 1, max_pool = false }
head = { channels = 32 }
[unit]
split_ratio = ["1/2"]
kernel = [3, 5]
squeeze_excite = [false]
residual = [false, true]
groups = [1]
extra_depthwise = [false]
[[stage]]
depth = [1, 2]
width = [32]
[[stage]]
depth = [1, 4]
width = [64, 128]
"""

KILLED = """
import sys
from pathlib import Path
import steady
from hwnas.devices import Device
from hwnas.lines import Line
from hwnas.profiling import profile
from hwnas.space_toml import parse_space

def told(done, total, what):
    print("other" if what in ("whole networks", "memory") else done, flush=True)

with Device("cpu", Line("cpu", steady.command_of("cpu"))) as cpu:
    profile(parse_space(Path(sys.argv[1]).read_text()), cpu, folder=Path(sys.argv[2]), on_progress=told)
"""


@pytest.fixture(scope="module")
def space():
    return parse_space(SPACE)


@pytest.fixture(scope="module")
def cpu():
    with Device("cpu", Line("cpu", steady.command_of("cpu"))) as opened:
        yield opened


@pytest.fixture(scope="module")
def finished(space, cpu, tmp_path_factory):
    """A whole profile: the table, its folder, and the calls of the progress callback."""
    folder = tmp_path_factory.mktemp("tables")
    calls = []
    table = profile(space, cpu, folder=folder, on_progress=lambda *call: calls.append(call))
    return table, folder, calls


def test_a_profile_covers_the_space_and_writes_its_table(space, finished):
    table, folder, calls = finished
    keys = {unit_key(network_at(space, [place]).units[0]) for place in places_of(space)}
    assert set(table.entries) == keys
    assert all(entry.latency_ms > 0 for entry in table.entries.values())
    assert [path.name for path in (folder / "cpu").iterdir()] == ["made-up-fp32-t1-b1.json"]
    assert load_table(folder / "cpu" / "made-up-fp32-t1-b1.json") == table
    timed = {key for key, entry in table.entries.items() if isinstance(entry, Entry)}
    places = {unit_key(network_at(space, [place]).units[0]): place for place in places_of(space)}
    assert timed == {key for key, place in places.items() if place.choice is None or is_timed(space, place.choice)}
    assert len(timed) < len(keys)
    total = len(timed) + TIMINGS * (FITTED + HELD_OUT) + MEMORY_FITTED + MEMORY_HELD_OUT
    assert [done for done, _, _ in calls] == list(range(1, len(calls) + 1))
    assert len(timed) < len(calls) <= total
    assert {total for _, total, _ in calls} == {total}
    assert calls[0][2] == "stem 16x16 3->16"
    assert table.anchor_ms > 0


def test_a_profile_measures_and_predicts_the_memory_of_some_whole_networks(space, finished):
    table = finished[0]
    memory = table.memory
    assert memory is not None
    assert len(memory.networks) == MEMORY_FITTED + MEMORY_HELD_OUT
    assert len(memory.relative_errors) == MEMORY_HELD_OUT
    assert {n.encoding for n in memory.networks} <= {n.encoding for n in table.calibration.networks}
    assert memory.mean_absolute_error < 0.1
    for architecture in (space.smallest, space.largest):
        network = lower(space, architecture)
        assert model_bytes(network) < memory.upper_bytes(network, 1, "fp32") < 1e9


def test_a_composed_entry_is_made_of_the_timed_ones_of_its_place(space, finished):
    table = finished[0]
    composed = [entry for entry in table.entries.values() if isinstance(entry, ComposedEntry)]
    assert composed
    for entry in composed:
        assert all(isinstance(table.entries[key], Entry) for key, _ in entry.terms)
        parts = [factor * table.entries[key].latency_ms for key, factor in entry.terms]
        assert entry.latency_ms == pytest.approx(sum(parts))
        where = entry.unit.split(" 1/2 ")[0]
        assert {table.entries[key].unit.split(" 1/2 ")[0] for key, _ in entry.terms} == {where}


def test_half_of_the_whole_networks_are_held_out_and_the_ends_of_the_range_are_not(space, finished):
    calibration = finished[0].calibration
    networks = calibration.networks
    assert 30 < len(networks) <= FITTED + HELD_OUT
    assert sum(network.held_out for network in networks) == len(networks) // 2
    sums = [network.sum_ms for network in networks]
    extremes = [finished[0].raw_sum_ms(lower(space, a)) for a in (space.smallest, space.largest)]
    assert sums[0] <= min(extremes) * 1.000001
    assert sums[-1] >= max(extremes) * 0.999999
    assert sums == sorted(sums)
    assert not networks[0].held_out
    assert not networks[-1].held_out
    assert calibration.kendall_tau > 0.9
    assert calibration.failure is None
    assert all(n.measured.samples_ms and n.repeated.samples_ms for n in networks)
    slow, fast = (finished[0].predict(lower(space, a)).latency_ms for a in (space.largest, space.smallest))
    assert slow > 1.5 * fast


def test_a_table_is_checked_on_networks_that_it_has_not_seen(space, cpu, finished):
    table = finished[0]
    found = check_table(table, space, cpu, networks=12)
    drawn = [space.decode(network.encoding) for network in found.networks]
    assert 6 <= len(drawn) <= 12
    assert [n.sum_ms for n in found.networks] == [table.raw_sum_ms(lower(space, a)) for a in drawn]
    assert found.line == table.calibration.line
    assert not {n.encoding for n in found.networks} & {n.encoding for n in table.calibration.networks}
    assert 0 < found.mean_absolute_error <= found.rms_error < 1
    assert abs(found.bias) <= found.rms_error
    assert found.kendall_tau > 0.9
    assert found.failure is None
    other = replace(table, conditions=replace(table.conditions, chip="another"))
    with pytest.raises(HwnasError, match="another"):
        check_table(other, space, cpu, networks=1)


def test_units_are_timed_in_8_bits_where_that_is_asked_for(space, cpu, tmp_path):
    tiny = parse_space(SPACE.replace("[3, 5]", "[3]").replace("[false, true]", "[false]").replace("[64, 128]", "[64]"))
    table = profile(tiny, cpu, folder=tmp_path, precision="int8")
    assert table.conditions.precision == "int8"
    assert [path.name for path in (tmp_path / "cpu").iterdir()] == ["made-up-int8-t1-b1.json"]
    assert table.predict(lower(tiny, tiny.largest)).latency_ms > 0


def test_a_profile_killed_at_20_random_moments_loses_and_tears_no_finished_entry(space, cpu, tmp_path):
    (tmp_path / "space.toml").write_text(SPACE)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "space.toml"), str(tmp_path)]
    path = tmp_path / "cpu" / "made-up-fp32-t1-b1.journal"
    rng, kept, started = random.Random(0), {}, set()
    for number in range(20):
        process = subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        first = process.stdout.readline() if number % 2 else ""  # every other time not before something is finished
        time.sleep(rng.uniform(0.0, 1.5))
        process.send_signal(signal.SIGKILL)
        printed = first + process.communicate()[0]
        if not path.exists():
            continue
        head, *lines = path.read_bytes().splitlines(keepends=True)
        entries = [parse_entry(json.loads(line)) for line in lines if line.endswith(b"\n")]
        found = {entry.key: entry for entry in entries}
        assert kept.items() <= found.items()
        told = [int(line) for line in printed.splitlines() if line.isdigit()]
        assert len(found) >= max(told, default=0)
        kept = found
        started.add(json.loads(head)["started"])
        with path.open("a") as file:
            file.write('{"key": "torn off in the mid')
    assert len(kept) >= 6
    assert len(started) == 1

    calls = []
    table = profile(space, cpu, folder=tmp_path, on_progress=lambda *call: calls.append(call))
    assert calls[0][0] == len(kept) + 1
    assert [table.entries[key] for key in kept] == list(kept.values())
    assert {table.started} == started
    assert not path.exists()


def test_a_torn_line_does_not_take_the_entry_written_after_it(finished, tmp_path):
    table, path = finished[0], tmp_path / "a.journal"
    first, second = list(table.entries.values())[:2]
    Journal(path, table.space, table.conditions, ENTRIES).add([first])
    with path.open("a") as file:
        file.write('{"key": "torn off in the mid')
    Journal(path, table.space, table.conditions, ENTRIES).add([second])
    assert list(Journal(path, table.space, table.conditions, ENTRIES).items.values()) == [first, second]


def test_an_unfinished_profile_of_other_conditions_is_not_continued(space, cpu, finished, tmp_path):
    path = tmp_path / "cpu" / "made-up-fp32-t1-b1.journal"
    path.parent.mkdir()
    conditions = {"chip": "another chip"}
    table = json.loads((finished[1] / "cpu" / "made-up-fp32-t1-b1.json").read_text())
    header = {"space": "made-up", "started": table["started"], "conditions": table["conditions"] | conditions}
    path.write_text(json.dumps(header) + "\n")
    with pytest.raises(
        HwnasError, match=r"made-up-fp32-t1-b1\.journal was begun under .*another chip.*Delete the file"
    ):
        profile(space, cpu, folder=tmp_path)
    path.write_text('{"whatever": 1}\n')
    with pytest.raises(HwnasError, match="not the journal"):
        profile(space, cpu, folder=tmp_path)


def test_a_table_that_lacks_units_of_the_space_is_completed(cpu, finished):
    table, folder, _ = finished
    wider = parse_space(SPACE.replace("classes = 4", "classes = 7"))
    calls = []
    completed = profile(wider, cpu, folder=folder, on_progress=lambda *call: calls.append(call))
    heads = [what for _, _, what in calls if what.startswith("head")]
    assert 2 + 60 < len(calls) <= 2 + TIMINGS * (FITTED + HELD_OUT) + MEMORY_FITTED + MEMORY_HELD_OUT
    assert len(heads) == 2
    timed = {key: entry for key, entry in table.entries.items() if isinstance(entry, Entry)}
    assert timed.items() <= completed.entries.items()


def test_a_table_measured_anew_keeps_its_timings_of_the_guidelines(space, cpu, finished, tmp_path):
    made_up = Measurement((1.0, 1.1))
    timings = tuple(GuidelineTiming(case, made_up) for guideline in EXPERIMENTS for case in cases(guideline, "arm"))
    path = tmp_path / "cpu" / "made-up-fp32-t1-b1.json"
    replace(finished[0], guidelines=timings).save(path)
    assert profile(space, cpu, folder=tmp_path).guidelines == timings


def test_a_unit_that_takes_no_measurable_time_stops_the_profile_after_a_few_attempts(space, cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(profiling, "significant", lambda value: 0.0)
    with pytest.raises(HwnasError, match=r"no measurable time in 3 attempts, such as stem.*too busy.*finished is kept"):
        profile(space, cpu, folder=tmp_path)


def test_an_entry_is_the_gain_of_the_medians_shared_by_the_copies(space):
    place = next(place for place in places_of(space) if place.choice is not None and place.stride == 1)
    group = Group(host_of(space, place), (("key", place),), (b"host", b"chain"))
    results = {0: Measurement((1.0, 0.2, 1.4)), 1: Measurement((2.0, 2.4, 5.0))}
    entry = entry_of(space, group, 0, results)
    assert entry.measurement.samples_ms == pytest.approx((0.5, 0.7, 2.0))
    assert entry.latency_ms == pytest.approx((2.4 - 1.0) / 2)


def test_the_pace_of_an_entry_is_the_worse_of_its_two_timings(space):
    place = next(place for place in places_of(space) if place.choice is not None and place.stride == 1)
    group = Group(host_of(space, place), (("key", place),), (b"host", b"chain"))
    slow, steady = Measurement((2.0,), 1.5), Measurement((4.0,))
    assert pace_of(group, 0, {0: slow, 1: steady}) == pace_of(group, 0, {0: steady, 1: slow}) == 1.5
    assert pace_of(group, 0, {0: steady, 1: steady}) == 1.0
    assert entry_of(space, group, 0, {0: Measurement((2.0,), 2.0), 1: steady}).latency_ms == pytest.approx(1.5)


def test_every_chain_is_its_host_and_the_unit():
    space = load_space("shufflenet-tiny")
    for place in list(places_of(space))[::50]:
        units = [unit_key(unit) for unit in network_at(space, chain_of(space, place)).units]
        alone = unit_key(network_at(space, [place]).units[0])
        host = [unit_key(unit) for unit in network_at(space, host_of(space, place)).units] if place.stage > 1 else []
        copies = copies_of(place)
        assert sorted(units) == sorted([*host, *[alone] * copies])


def test_no_chain_with_the_stem_ends_with_a_large_map_that_the_runtime_would_lay_out_for_the_user():
    space = load_space("shufflenet-tiny")
    with_stem = 0
    for place in list(places_of(space))[::20]:
        for chain in filter(None, (chain_of(space, place), host_of(space, place))):
            network, plain = network_of(space, chain), network_at(space, chain)
            if chain[0].stage == 1:
                with_stem += 1
                assert network.outputs[0].shape == (plain.outputs[0].shape[0], 1, 1)
            else:
                assert network == plain
    assert with_stem > 10


def test_stage_and_shapes_of_a_chain_are_those_of_the_network():
    space = load_space("shufflenet-224")
    network = lower(space, space.largest)
    for unit, place in zip(network.units, places_of_architecture(space, space.largest), strict=True):
        chain = network_at(space, chain_of(space, place))
        assert unit_key(unit) in {unit_key(other) for other in chain.units}


def test_networks_are_spread_over_the_range_of_sums():
    sums = {(index,): float(index * index) for index in range(1, 101)}
    chosen = list(spread(sums, 10).values())
    assert chosen[0] == 1
    assert chosen[-1] == 10_000
    assert chosen == sorted(chosen)
    assert all(1.2 < after / before < 6 for before, after in pairwise(chosen))
    assert len(spread(sums, 1000)) == 100


def test_candidates_hold_the_extremes_of_the_space_and_their_sums():
    space, rng = load_space("shufflenet-tiny"), random.Random(2)
    unit_ms = {place: rng.uniform(0.1, 1) for place in places_of(space)}
    found = candidates(space, unit_ms, random.Random(0))
    drawn = [space.encode(space.sample(rng)) for _ in range(500)]
    sums = [sum(unit_ms[p] for p in places_of_architecture(space, space.decode(code))) for code in drawn]
    assert min(found.values()) < min(sums)
    assert max(found.values()) > max(sums)
    assert len(found) > 500
    code = next(iter(found))
    assert found[code] == pytest.approx(sum(unit_ms[p] for p in places_of_architecture(space, space.decode(code))))
