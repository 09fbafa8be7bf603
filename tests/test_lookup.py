"""The vectorised predictor: the same as predicting each architecture's network, for every encoding."""

import random
from dataclasses import replace

import numpy as np
import pytest

from hwnas.calibration import Calibration, Measurement
from hwnas.conditions import Conditions
from hwnas.errors import HwnasError
from hwnas.latency import Entry, LatencyTable
from hwnas.line import Line
from hwnas.lookup import BLOCK, array_predictor
from hwnas.network import unit_key
from hwnas.places import label, network_at, places_of
from hwnas.space import SearchSpace, lower
from hwnas.space_toml import load_space, parse_space

CONDITIONS = Conditions("cpu", "Chip 1", 2, "ONNX Runtime CPU", "1.30", 1, 1, "fp32", "performance", "Linux 6 x86_64")

CALIBRATION = Calibration(Line(0.05, (2e4, 3e5, 4e6), (0.9, 1.1, 1.3), (10.0, 30.0, 20.0)), 0.2, ())

SMALL = parse_space("""
name = "small"
input_size = 16
classes = 4
stem = { channels = 8, stride = 1, max_pool = false }
head = { channels = 16 }
[unit]
split_ratio = ["1/2", "1/4"]
kernel = [3]
squeeze_excite = [false]
residual = [false, true]
groups = [1]
extra_depthwise = [false]
[[stage]]
depth = [1]
width = [16]
[[stage]]
depth = [3, 1]
width = [24, 16]
""")


def random_table(space: SearchSpace) -> LatencyTable:
    """A table in which the cost of every unit is drawn on its own, so that no two units can stand for each other."""
    rng = random.Random(5)
    entries = {}
    for place in places_of(space):
        key = unit_key(network_at(space, [place]).units[0])
        entries[key] = Entry(key, label(space, place), Measurement((rng.uniform(0.01, 1),)))
    time = "2030-01-01T10:00:00+00:00"
    return LatencyTable(CONDITIONS, space.name, time, time, entries, CALIBRATION, 0.4)


def random_codes(space: SearchSpace, count: int) -> np.ndarray:
    """Any encodings `[count, places]`, most of them not canonical."""
    return np.random.default_rng(7).integers(0, space.radices, (count, len(space.radices)))


@pytest.mark.parametrize("name", ["shufflenet-tiny", "shufflenet-32", "shufflenet-224"])
def test_thousands_of_architectures_are_predicted_as_one_by_one(name: str):
    space = load_space(name)
    table, codes = random_table(space), random_codes(space, BLOCK + 500)
    one = table.predictor(space)
    expected = [one(space.decode(code)) for code in codes.tolist()]
    latency_ms, upper_ms = array_predictor(table, space)(codes)
    assert np.abs(latency_ms - [prediction.latency_ms for prediction in expected]).max() < 1e-9
    assert np.abs(upper_ms - [prediction.upper_ms for prediction in expected]).max() < 1e-9
    assert np.std(latency_ms) > 0.1


def test_every_encoding_of_a_small_space_is_predicted_as_its_lowered_network():
    table = random_table(SMALL)
    codes = np.stack(np.meshgrid(*(np.arange(radix) for radix in SMALL.radices), indexing="ij"), -1)
    codes = codes.reshape(-1, len(SMALL.radices))
    latency_ms, _ = array_predictor(table, SMALL)(codes)
    for code, found in zip(codes.tolist(), latency_ms, strict=True):
        assert found == pytest.approx(table.predict(lower(SMALL, SMALL.decode(code))).latency_ms, abs=1e-9)


def test_units_that_are_not_there_count_nothing():
    space = load_space("shufflenet-tiny")
    codes = random_codes(space, 1000)
    canonical = np.array([space.canonical(code) for code in codes.tolist()])
    assert (codes != canonical).any(axis=1).mean() > 0.5
    predict = array_predictor(random_table(space), space)
    assert predict(codes)[0] == pytest.approx(predict(canonical)[0], abs=1e-12)


def test_encodings_of_any_integer_type_and_none_at_all_are_taken():
    predict = array_predictor(random_table(SMALL), SMALL)
    codes = random_codes(SMALL, 10)
    assert (predict(codes.astype(np.uint8))[0] == predict(codes)[0]).all()
    assert [len(values) for values in predict(codes[:0])] == [0, 0]


def test_what_is_no_encoding_is_refused():
    predict = array_predictor(random_table(SMALL), SMALL)
    codes = random_codes(SMALL, 3)
    with pytest.raises(ValueError, match=rf"\[N, {len(SMALL.radices)}\], and not \[{len(SMALL.radices)}\]"):
        predict(codes[0])
    for value in (-1, 2):
        wrong = codes.copy()
        wrong[1, 2] = value
        with pytest.raises(ValueError, match="a value that its place does not have"):
            predict(wrong)


def test_a_table_that_lacks_units_of_the_space_is_refused():
    table = random_table(SMALL)
    poorer = replace(table, entries=dict(list(table.entries.items())[:-1]))
    with pytest.raises(HwnasError, match=r"has no entry for head .*hwnas profile"):
        array_predictor(poorer, SMALL)
