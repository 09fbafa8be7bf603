"""Latency tables: arithmetic, prediction, files, and what is refused."""

import json
import math
import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from hwnas.calibration import Calibration, Measurement, WholeNetwork, calibrate, upper_ratio_of
from hwnas.conditions import Conditions
from hwnas.errors import HwnasError
from hwnas.experiments import GuidelineTiming, all_cases
from hwnas.latency import ComposedEntry, Entry, LatencyTable, composed_entry, load_table, table_path
from hwnas.line import Line
from hwnas.memory import Memory, MemoryNetwork
from hwnas.network import macs, parameters, unit_key
from hwnas.places import extreme_architecture, label, network_at, places_of, places_of_architecture
from hwnas.space import lower
from hwnas.space_toml import load_space, parse_space

CONDITIONS = Conditions("cpu", "Chip 1", 2, "ONNX Runtime CPU", "1.30", 1, 1, "fp32", "performance", "Linux 6 x86_64")

SMALL_SPACE = """
name = "small"
input_size = 16
classes = 4
stem = { channels = 8, stride = 1, max_pool = false }
head = { channels = 16 }
[unit]
split_ratio = ["1/2"]
kernel = [3]
squeeze_excite = [false, true]
residual = [false, true]
groups = [1]
extra_depthwise = [false]
[[stage]]
depth = [1, 2]
width = [16]
[[stage]]
depth = [1, 3]
width = [16, 24]
"""


def every_architecture(space):
    """The canonical encodings of a whole space, without `places_of`."""
    return {space.canonical(code) for code in product(*(range(radix) for radix in space.radices))}


def small_table(space, **changes):
    """A made-up table that covers a space: milliseconds as the MACs of each unit."""
    entries = {}
    for place in places_of(space):
        network = network_at(space, [place])
        cost = macs(network) / 1e6 + 0.001
        key = unit_key(network.units[0])
        entries[key] = Entry(key, label(space, place), Measurement((cost * 1.5, cost)))
    networks = (
        WholeNetwork((0, 1), 1.0, 5, Measurement((1.1, 1.2)), Measurement((1.2,)), held_out=False),
        WholeNetwork((1, 1), 2.0, 9, Measurement((2.1,)), Measurement(()), held_out=True),
    )
    table = LatencyTable(
        CONDITIONS, space.name, "2030-01-01T10:00:00+00:00", "2030-01-01T10:01:00+00:00", entries,
        Calibration(Line(0.05, (1e3, 1e6), (1.1, 1.1), (30.0, 30.0)), 0.2, networks), 0.44, ("busy",),
    )  # fmt: skip
    return replace(table, **changes)


@pytest.fixture
def space():
    return parse_space(SMALL_SPACE)


def test_every_unit_of_every_network_of_a_small_space_is_enumerated_and_no_other(space):
    codes = every_architecture(space)
    assert len(codes) == space.size
    covered = [unit_key(network_at(space, [place]).units[0]) for place in places_of(space)]
    needed = {unit_key(unit) for code in codes for unit in lower(space, space.decode(code)).units}
    assert len(set(covered)) == len(covered)
    assert set(covered) == needed


@pytest.mark.parametrize("name", ["shufflenet-tiny", "shufflenet-224"])
def test_thousands_of_random_architectures_hold_only_enumerated_places(name):
    space = load_space(name)
    places = set(places_of(space))
    rng = random.Random(0)
    for _ in range(2000):
        assert places.issuperset(places_of_architecture(space, space.sample(rng)))


@pytest.mark.parametrize("name", ["shufflenet-tiny", "shufflenet-224"])
def test_the_units_of_a_lowered_network_are_those_of_its_places(name):
    space = load_space(name)
    rng = random.Random(0)
    for architecture in [space.smallest, space.largest, *(space.sample(rng) for _ in range(20))]:
        expected = [unit_key(network_at(space, [p]).units[0]) for p in places_of_architecture(space, architecture)]
        assert [unit_key(unit) for unit in lower(space, architecture).units] == expected


def test_a_measurement_is_summarised_by_median_minimum_and_half_the_quartile_range():
    measurement = Measurement((1.0, 5.0, 2.0, 3.0, 4.0))
    assert (measurement.median_ms, measurement.minimum_ms, measurement.spread_ms) == (3.0, 1.0, 1.0)
    assert Measurement((2.0,)).spread_ms == 0


def whole(sum_ms, count, measured_ms, held_out=False):
    return WholeNetwork((), sum_ms, count, Measurement((measured_ms,)), Measurement(()), held_out)


def test_of_two_timings_of_a_whole_network_the_lesser_counts():
    timings = [Measurement((2.0, 9.0, 2.2)), Measurement((2.1, 1.9))]
    for first, second in (timings, timings[::-1]):
        assert WholeNetwork((), 1.0, 5, first, second, held_out=True).latency_ms == 2.0
    assert WholeNetwork((), 1.0, 5, timings[0], Measurement(()), held_out=True).latency_ms == 2.2
    fitted = [WholeNetwork((), s, 10**6, Measurement((3.0 * s,)), Measurement((2.0 * s,)), False) for s in (1, 2, 3)]
    assert calibrate(fitted).line.latency_ms(2.5, 10**6) == pytest.approx(
        5.0, rel=0.01
    )  # the fit pulls a little towards 1


def test_the_bound_is_that_of_the_held_out_networks():
    rng = np.random.default_rng(0)
    sums, counts = np.linspace(0.1, 2, 40), rng.integers(10**5, 10**6, 40)
    line = 0.03 + 1.2 * sums
    fitted = [whole(s, int(c), m) for s, c, m in zip(sums, counts, line, strict=True)]
    errors = np.linspace(-0.1, 0.09, 40)
    held_out = [whole(s, int(c), m, True) for s, c, m in zip(sums, counts, line * (1 + errors), strict=True)]
    calibration = calibrate([*fitted, *held_out])
    rank_39 = errors[38]  # ceil(41 * 0.95) of 40
    assert calibration.upper_ratio == pytest.approx(math.hypot(rank_39, calibration.drift_ratio), abs=0.003)
    assert calibration.bias == pytest.approx(errors.mean(), abs=0.003)
    assert calibration.mean_absolute_error == pytest.approx(np.abs(errors).mean(), abs=0.003)
    assert calibration.coverage == pytest.approx(39 / 40)
    assert calibration.cross_coverage == pytest.approx(38 / 40)
    assert calibration.share_within(0.05) == pytest.approx((np.abs(errors) <= 0.05).mean(), abs=0.03)
    assert replace(calibration, upper_ratio=0.0).coverage == pytest.approx((errors <= 0).mean(), abs=0.06)


def test_the_bound_covers_95_percent_of_new_networks_whatever_the_errors_look_like():
    rng = np.random.default_rng(3)
    covered = []
    for _ in range(200):
        errors = rng.exponential(0.05, 80) - 0.02
        networks = [whole(1.0, 10**6, 1 + e, held_out=True) for e in errors[:40]]
        line = Calibration(Line(0.0, (1e6,), (1.0,), (0.0,)), 0.0, tuple(networks))
        bound = upper_ratio_of(line.relative_errors)
        covered.append((errors[40:] <= bound).mean())
    assert 0.94 < np.mean(covered) < 0.97


def test_a_table_fails_its_check_for_noise_for_errors_and_for_slow_networks_and_says_which(space):
    def checked(errors, noise):
        pairs = [(1.0 + 0.01 * i) * (1 + e) for i, e in enumerate(errors)]
        networks = tuple(
            WholeNetwork((i,), 1.0 + 0.01 * i, 10**6, Measurement((ms,)), Measurement((ms * (1 + noise),)), True)
            for i, ms in enumerate(pairs)
        )
        return Calibration(Line(0.0, (1e6,), (1.0,), (0.0,)), 0.03, networks)

    assert checked([0.02, -0.02] * 15, 0.01).failure is None
    assert "err by 6.0%" in str(checked([0.06, -0.06] * 15, 0.01).failure)
    assert checked([0.025, -0.1] * 15, 0.05).failure is None  # an error of 6 % beside a noise of 5 %
    assert "too noisy" in str(checked([0.0] * 30, 0.1).failure)
    assert "only 50% of the networks" in str(checked([0.035, -0.035] * 15, 0.01).failure)
    table = small_table(space)
    failing = replace(table, calibration=checked([0.06, -0.06] * 15, 0.01))
    with pytest.raises(HwnasError, match=r"failed its own check: .*6\.0%.*hwnas profile --device cpu.*--force"):
        failing.check_error()


def test_spearman_and_the_noise_floor_of_networks_are_told():
    pairs = [(1.0, 1.1), (2.0, 2.1), (3.0, 2.9), (4.0, 2.8)]
    networks = tuple(WholeNetwork((), s, 10**6, Measurement((m,)), Measurement((m * 1.02,)), True) for s, m in pairs)
    calibration = Calibration(Line(0.0, (1e6,), (1.0,), (0.0,)), 0.0, networks)
    assert calibration.spearman == pytest.approx(0.8)  # ranks 1 2 3 4 against 1 2 4 3
    assert calibration.noise_floor == pytest.approx(0.02)


def test_samples_of_a_slow_machine_are_led_back_to_its_usual_pace():
    assert Measurement((1.5, 3.0), pace=1.5).at_usual_pace() == Measurement((1.0, 2.0))
    assert Measurement((1.5,)).at_usual_pace() == Measurement((1.5,))


def test_a_prediction_is_the_line_through_the_sum_and_its_bound(space):
    table = small_table(space)
    network = lower(space, space.largest)
    total = sum(table.entries[unit_key(unit)].latency_ms for unit in network.units)
    prediction = table.predict(network)
    assert prediction.latency_ms == pytest.approx(0.05 + 1.1 * total + 30e-6 * parameters(network))
    assert prediction.upper_ms == pytest.approx(1.2 * prediction.latency_ms)


def test_the_extreme_architectures_are_those_that_trying_all_finds(space):
    rng = random.Random(3)
    for _ in range(5):
        unit_ms = {place: rng.random() for place in places_of(space)}
        sums = {
            code: sum(unit_ms[place] for place in places_of_architecture(space, space.decode(code)))
            for code in every_architecture(space)
        }
        for pick, slowest in ((min, False), (max, True)):
            assert space.encode(extreme_architecture(space, unit_ms, slowest=slowest)) == pick(
                sums, key=lambda code: sums[code]
            )


def test_the_fast_predictor_agrees_with_predict(space):
    table, rng = small_table(space), random.Random(1)
    fast = table.predictor(space)
    for _ in range(50):
        architecture = space.sample(rng)
        slow = table.predict(lower(space, architecture))
        assert fast(architecture).latency_ms == pytest.approx(slow.latency_ms, rel=1e-12)
        assert fast(architecture).upper_ms == pytest.approx(slow.upper_ms, rel=1e-12)


def test_a_missing_unit_is_named_with_the_command_that_measures_it(space):
    table = small_table(space)
    network = lower(space, space.largest)
    gone = {unit_key(network.units[0]), unit_key(network.units[1])}
    poorer = replace(table, entries={key: entry for key, entry in table.entries.items() if key not in gone})
    with pytest.raises(HwnasError, match=r"no entry for stem, stage2\.1 .*hwnas profile --device cpu --space small"):
        poorer.predict(network)


def test_measured_finalists_scale_the_estimate_and_keep_the_bound_above_them(space):
    table = small_table(space)
    networks = [lower(space, architecture) for architecture in (space.smallest, space.largest)]
    pairs = [(network, Measurement((table.predict(network).latency_ms * 1.5,))) for network in networks]
    corrected = table.corrected(pairs)
    for network, measured in pairs:
        assert corrected.predict(network).latency_ms == pytest.approx(measured.median_ms)
        assert corrected.predict(network).upper_ms >= measured.median_ms
    assert table.corrected([]) == table


def test_a_table_comes_back_from_its_file_unchanged_and_one_entry_a_line(space, tmp_path):
    table = small_table(space)
    path = table_path(tmp_path, space.name, CONDITIONS)
    table.save(path)
    assert path == tmp_path / "cpu" / "small-fp32-t1-b1.json"
    assert load_table(path) == table
    assert load_table(path).digest == table.digest
    assert list(path.parent.iterdir()) == [path]
    lines = [line for line in path.read_text().splitlines() if '"key"' in line]
    assert len(lines) == len(table.entries)


def test_a_composed_entry_is_the_sum_of_its_terms_and_comes_back_from_the_file(space, tmp_path):
    table, path = small_table(space), tmp_path / "table.json"
    first, second = list(table.entries.values())[:2]
    composed = composed_entry("made up", "a unit", [(first.key, 2), (second.key, 1)], table.entries)
    assert composed.latency_ms == pytest.approx(2 * first.latency_ms + second.latency_ms)
    longer = replace(table, entries=table.entries | {"made up": composed})
    longer.save(path)
    assert load_table(path) == longer
    assert isinstance(load_table(path).entries["made up"], ComposedEntry)


def with_guidelines(table):
    timings = [
        GuidelineTiming(case, Measurement((1.0 + index, 1.5 + index))) for index, case in enumerate(all_cases("arm"))
    ]
    return replace(table, guidelines=tuple(timings))


def test_timings_of_the_guidelines_come_back_from_the_file_one_a_line_and_survive_a_correction(space, tmp_path):
    table, path = with_guidelines(small_table(space)), tmp_path / "table.json"
    table.save(path)
    assert load_table(path) == table
    assert len([line for line in path.read_text().splitlines() if '"multiplier"' in line]) == len(all_cases("arm"))
    network = lower(space, space.smallest)
    assert table.corrected([(network, Measurement((9.0,)))]).guidelines == table.guidelines
    assert "guidelines" not in json.loads(small_table(space).to_json())


@pytest.mark.parametrize(
    "change",
    [
        lambda timings: timings.pop(),
        lambda timings: timings.append(timings[0]),
        lambda timings: timings.reverse(),
        lambda timings: timings[0].pop("variant"),
        lambda timings: timings[0].update(variant="9 groups"),
        lambda timings: timings[0].update(guideline=1),
        lambda timings: timings[0].update(multiplier="1"),
        lambda timings: timings[0].update(multiplier=3),
        lambda timings: [timing.update(widths="cpu") for timing in timings],
        lambda timings: timings[0].update(samples_ms=[]),
        lambda timings: timings[0].update(samples_ms=[0.1, -0.1]),
        lambda timings: timings[0].update(samples_ms="fast"),
        lambda timings: timings.insert(0, None),
    ],
)
def test_a_table_with_broken_timings_of_the_guidelines_is_refused_with_its_name(space, tmp_path, change):
    path = tmp_path / "table.json"
    with_guidelines(small_table(space)).save(path)
    path.write_text(broken(path, lambda data: change(data["guidelines"])))
    with pytest.raises(HwnasError, match=r"table\.json is not a whole latency table.*Delete"):
        load_table(path)


def broken(path, change):
    data = json.loads(path.read_text())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(format="something else"),
        lambda data: data.pop("space"),
        lambda data: data.update(started="yesterday"),
        lambda data: data["conditions"].pop("chip"),
        lambda data: data["conditions"].update(colour="red"),
        lambda data: data["conditions"].update(threads="1"),
        lambda data: data["calibration"]["line"].update(slopes=[float("nan"), 1.0]),
        lambda data: data["calibration"]["line"].update(knots=[1e6, 1e3]),
        lambda data: data["calibration"]["line"].update(slopes=[1.0]),
        lambda data: data["calibration"].update(line=None),
        lambda data: data.pop("anchor_ms"),
        lambda data: data.update(anchor_ms=0),
        lambda data: data.update(cautions=[1]),
        lambda data: data["entries"].append({"key": "a", "unit": "b", "terms": {"not there": 1}}),
        lambda data: data["entries"].append({"key": "a", "unit": "b", "terms": {data["entries"][0]["key"]: -1}}),
        lambda data: data["entries"].append({"key": "a", "unit": "b", "terms": {data["entries"][0]["key"]: 0.5}}),
        lambda data: data["calibration"].update(networks=3),
        lambda data: data["calibration"]["networks"][0].update(measured_ms=[]),
        lambda data: data["entries"][0].update(samples_ms=[]),
        lambda data: data["entries"][0].update(samples_ms=[0.1, -0.2, -0.1]),
        lambda data: data["calibration"]["networks"][0].update(parameters=1.5),
        lambda data: data["calibration"]["line"].pop("parameter_ns"),
        lambda data: data["entries"][0].update(samples_ms=["0.1"]),
        lambda data: data["entries"][0].update(key=5),
        lambda data: data.update(entries=None),
    ],
)
def test_a_table_with_a_wrong_field_is_refused_with_its_name(space, tmp_path, change):
    path = tmp_path / "table.json"
    small_table(space).save(path)
    path.write_text(broken(path, change))
    with pytest.raises(HwnasError, match=r"table\.json is not a whole latency table.*Delete"):
        load_table(path)


def test_a_truncated_table_is_refused_with_its_name_wherever_it_ends(space, tmp_path):
    path = tmp_path / "table.json"
    small_table(space).save(path)
    text = path.read_text().rstrip()
    for length in range(0, len(text), 97):
        path.write_text(text[:length])
        with pytest.raises(HwnasError, match=r"table\.json is not a whole latency table"):
            load_table(path)


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path):
    with pytest.raises(HwnasError, match=r"none\.json cannot be read"):
        load_table(tmp_path / "none.json")
    (tmp_path / "image.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(HwnasError, match=r"image\.json cannot be read"):
        load_table(tmp_path / "image.json")


@pytest.mark.parametrize(
    ("field", "value"), [("chip", "Chip 2"), ("runtime_version", "1.31"), ("threads", 4), ("device", "board")]
)
def test_the_table_of_another_device_is_refused_naming_the_field_and_both_values(space, field, value):
    table = small_table(space)
    with pytest.raises(HwnasError, match="hwnas profile --device") as caught:
        table.check_device(replace(CONDITIONS, **{field: value}))
    assert f"{field}: the table has {getattr(CONDITIONS, field)!r}, here it is {value!r}" in str(caught.value)


def test_a_newer_kernel_or_another_load_is_the_same_device(space):
    small_table(space).check_device(replace(CONDITIONS, system="Linux 7", load_average=3.0, governor="powersave"))


MEMORY = Memory(
    1.8e7,
    2.9,
    1.5,
    0.07,
    (
        MemoryNetwork((0, 1), 900_000, 40_000, (21_000_000,), False),
        MemoryNetwork((1, 1), 1_900_000, 50_000, (24_000_000, 24_100_000), True),
    ),
)


def test_memory_comes_back_from_the_file_and_a_table_without_it_has_none(space, tmp_path):
    table = small_table(space, memory=MEMORY)
    table.save(tmp_path / "table.json")
    assert load_table(tmp_path / "table.json") == table
    small_table(space).save(tmp_path / "without.json")
    assert load_table(tmp_path / "without.json").memory is None


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (("21000000", "-21000000"), "a sample is -21000000 bytes"),
        (("[21000000]", "[]"), "no samples of memory"),
        (('"model_bytes": 900000', '"model_bytes": 0'), "model_bytes is 0 bytes"),
        (('"per_model_byte": 2.9', '"per_model_byte": "2.9"'), "per_model_byte is '2.9'"),
        (('"per_working_byte": 1.5, ', ""), "'per_working_byte' is missing"),
    ],
)
def test_memory_that_no_measurement_gives_is_refused(space, tmp_path, broken, message):
    text = small_table(space, memory=MEMORY).to_json()
    assert broken[0] in text
    (tmp_path / "table.json").write_text(text.replace(*broken, 1))
    with pytest.raises(HwnasError, match=message):
        load_table(tmp_path / "table.json")
