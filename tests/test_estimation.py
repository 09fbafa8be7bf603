"""A table estimated from another device's: on simulated devices whose truth is known."""

import statistics
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from simulated import Costs, SimulatedDevice, SimulatedMachine

from hwnas.errors import HwnasError
from hwnas.estimation import estimate
from hwnas.latency import LatencyTable, load_table, table_path
from hwnas.profiling import covers, profile
from hwnas.space import lower
from hwnas.space_toml import parse_space
from hwnas.whole_networks import Setup, candidates, check_table, spread

SPACE = parse_space("""
name = "simulated"
input_size = 16
classes = 4
stem = { channels = 16, stride = 1, max_pool = false }
head = { channels = 32 }
[unit]
split_ratio = ["1/4", "1/2"]
kernel = [3, 5]
squeeze_excite = [false, true]
residual = [false]
groups = [1, 2]
extra_depthwise = [false, true]
[[stage]]
depth = [1, 2]
width = [32]
[[stage]]
depth = [1, 3]
width = [64, 128]
""")
OTHER = Costs(node_us=2.0, mac_ns=0.4, byte_ns=0.5, border_us=5.0)
"""A board on which arithmetic is twenty times as slow, memory and changes of layout ten times, every node twice."""


def device(costs: Costs = OTHER) -> SimulatedDevice:
    return SimulatedDevice(SimulatedMachine(costs), "board")


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> LatencyTable:
    return profile(SPACE, SimulatedDevice(SimulatedMachine()), folder=tmp_path_factory.mktemp("known"))


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables")


@pytest.fixture(scope="module")
def estimated(known: LatencyTable, tables: Path) -> LatencyTable:
    return estimate(known, SPACE, device(), folder=tables, networks=24)


def ratios(table: LatencyTable, costs: Costs = OTHER) -> list[float]:
    """The true over the predicted milliseconds of networks that nobody measured, from the fastest to the slowest."""
    setup = Setup(SPACE, device(costs), 1, 1, "fp32", 0)
    codes = spread(candidates(SPACE, table.unit_ms(SPACE), Random(7)), 40)
    networks = [lower(SPACE, SPACE.decode(code)) for code in codes]
    return [costs.model_ms(setup.model(network)) / table.predict(network).latency_ms for network in networks]


def errors(table: LatencyTable, costs: Costs = OTHER) -> list[float]:
    return [ratio - 1 for ratio in ratios(table, costs)]


def test_two_dozen_networks_of_another_device_give_its_table(known: LatencyTable, estimated: LatencyTable):
    assert covers(estimated, SPACE)
    found = statistics.fmean(map(abs, errors(estimated)))
    by_one_factor = ratios(known)
    middle = statistics.median(by_one_factor)
    assert found < statistics.fmean(abs(ratio / middle - 1) for ratio in by_one_factor) / 2


def test_the_error_that_the_table_states_is_that_of_networks_it_was_not_fitted_on(estimated: LatencyTable):
    calibration = estimated.calibration
    assert sum(network.held_out for network in calibration.networks) == 8
    assert calibration.mean_absolute_error == pytest.approx(statistics.fmean(map(abs, errors(estimated))), abs=0.03)
    assert statistics.fmean(error <= calibration.upper_ratio for error in errors(estimated)) > 0.8
    checked = check_table(estimated, SPACE, device(), networks=20)
    assert checked.mean_absolute_error == pytest.approx(calibration.mean_absolute_error, abs=0.03)


def test_a_device_that_is_but_slower_is_found_to_be_so(known: LatencyTable, tmp_path: Path):
    slower = Costs(*(3 * getattr(Costs(), name) for name in Costs.__slots__))
    table = estimate(known, SPACE, device(slower), folder=tmp_path, networks=10)
    assert statistics.fmean(map(abs, errors(table, slower))) < 0.02


def test_the_table_says_that_it_is_estimated_and_is_not_taken_for_a_measured_one(
    known: LatencyTable, estimated: LatencyTable, tables: Path
):
    path = table_path(tables, SPACE.name, estimated.conditions)
    assert load_table(path) == estimated
    assert estimated.conditions.origin == "estimated"
    with pytest.raises(HwnasError, match=r"is estimated, not measured: on 8 networks .* Measure it: hwnas profile"):
        estimated.check_origin()
    known.check_origin()
    again = estimate(known, SPACE, device(), folder=tables, networks=10)  # an estimate may take the place of another
    assert load_table(path) == again
    measured = profile(SPACE, device(), folder=tables)  # and is not completed, but measured anew
    assert measured.conditions.origin == "measured"
    assert statistics.fmean(map(abs, errors(measured))) < 0.02
    with pytest.raises(HwnasError, match=r"There is a measured table of simulated on board"):
        estimate(known, SPACE, device(), folder=tables)


def test_what_cannot_be_estimated_from_is_refused(known: LatencyTable, estimated: LatencyTable, tmp_path: Path):
    with pytest.raises(HwnasError, match=r"from a measured one\. That of board is estimated"):
        estimate(estimated, SPACE, device(), folder=tmp_path)
    with pytest.raises(HwnasError, match=r"at least 10 measured networks.* It was given 3"):
        estimate(known, SPACE, device(), folder=tmp_path, networks=3)
    lacking = replace(known, entries=dict(list(known.entries.items())[:-1]))
    with pytest.raises(HwnasError, match="has no entry for"):
        estimate(lacking, SPACE, device(), folder=tmp_path)
    assert not list(tmp_path.iterdir())
