"""The builder on a processor whose truth is known: it recovers it, and says where the world is not as it assumes."""

import statistics
import zlib

import pytest
from simulated import Costs, Heat, Neighbour, SimulatedDevice, SimulatedMachine

from hwnas.cautions import CAUTIONS, Seen, cautions_of, texts_of
from hwnas.chains import chain_of, copies_of, host_of, network_of
from hwnas.devices import Timing
from hwnas.latency import ComposedEntry, Entry
from hwnas.network import NetworkBuilder
from hwnas.onnx_model import random_weights, to_onnx
from hwnas.profiling import keys_of, profile
from hwnas.space_toml import parse_space
from hwnas.whole_networks import Setup, check_table

SPACE = parse_space("""
name = "simulated"
input_size = 16
classes = 4
stem = { channels = 16, stride = 1, max_pool = false }
head = { channels = 32 }
[unit]
split_ratio = ["1/2"]
kernel = [3, 5]
squeeze_excite = [false, true]
residual = [false]
groups = [1, 2]
extra_depthwise = [false]
[[stage]]
depth = [1, 2]
width = [32]
[[stage]]
depth = [1, 3]
width = [64, 128]
""")

SIXTY_PERCENT_SLOW = {"quiet_ms": 40.0, "busy_ms": 60.0}


def built(tmp_path, machine):
    device = SimulatedDevice(machine)
    return device, profile(SPACE, device, folder=tmp_path)


def truth_ms(machine, place):
    """What the unit at a place really adds to its host."""
    setup = Setup(SPACE, SimulatedDevice(machine), 1, 1, "fp32", 0)
    with_unit, host = (
        machine.model_ms(setup.model(network_of(SPACE, places))) if places else 0.0
        for places in (chain_of(SPACE, place), host_of(SPACE, place))
    )
    return (with_unit - host) / copies_of(place)


def entry_errors(table, machine, kind):
    places = keys_of(SPACE)
    return [
        table.entries[key].latency_ms / truth_ms(machine, place) - 1
        for key, place in places.items()
        if isinstance(table.entries[key], kind)
    ]


def small_model(channels=32):
    b = NetworkBuilder("test", (3, 16, 16))
    with b.unit("stem"):
        x = b.conv_bn(b.input, channels, kernel=3, activation="relu")
    network = b.build(x)
    return to_onnx(network, random_weights(network, 0)).SerializeToString()


@pytest.mark.parametrize(
    ("disturbances", "most"),
    [
        ({"noise": 0.01}, 0.02),
        ({"noise": 0.01, "outliers": 0.02}, 0.02),
        ({"noise": 0.01, "drift": 0.08}, 0.06),
        ({"noise": 0.01, "neighbour": Neighbour(**SIXTY_PERCENT_SLOW, seed=1)}, 0.04),
    ],
    ids=["noise", "outliers", "drift", "a neighbour 60 percent of the time"],
)
def test_the_costs_of_units_are_recovered_from_a_disturbed_machine(tmp_path, disturbances, most):
    machine = SimulatedMachine(**disturbances)
    _, table = built(tmp_path, machine)
    for kind in (Entry, ComposedEntry):
        errors = entry_errors(table, machine, kind)
        assert len(errors) > 10
        assert abs(statistics.fmean(errors)) < most
        assert statistics.median(map(abs, errors)) < most
    assert table.calibration.mean_absolute_error < most
    assert table.calibration.spearman > 0.99
    table.check_error()


def test_a_world_that_does_not_add_up_is_seen_and_said(tmp_path):
    _, additive = built(tmp_path / "a", SimulatedMachine(noise=0.002))
    assert "not additive" not in additive.cautions
    assert additive.calibration.mean_absolute_error < 0.01

    class Whimsical(SimulatedMachine):
        """Whole networks take up to a third longer for a reason that no unit shows."""

        def model_ms(self, content):
            exact = super().model_ms(content)
            return exact * (1 + 0.3 * (zlib.crc32(content) % 97) / 97) if len(content) > 60_000 else exact

    device, table = built(tmp_path / "b", Whimsical(noise=0.002))
    assert "not additive" in table.cautions
    assert "noisy" not in table.cautions
    assert "err by" in str(table.calibration.failure)
    assert check_table(table, SPACE, device, networks=30).failure


def test_costs_that_grow_with_the_weights_of_the_whole_network_are_followed_by_the_line(tmp_path):
    device, table = built(tmp_path, SimulatedMachine(Costs(squared_ms=3.0), noise=0.002))
    check = check_table(table, SPACE, device, networks=40)
    assert check.mean_absolute_error < 0.02
    assert abs(check.bias) < 0.01


def test_a_machine_that_slows_down_in_the_middle_of_a_profile_is_noticed(tmp_path):
    device, table = built(tmp_path, SimulatedMachine(noise=0.005, throttle=lambda second: 1.3 if second > 1 else 1.0))
    assert {"throttled", "unsteady"} <= set(table.cautions)
    assert any(group.unsteady for group in device.groups)
    assert table.calibration.mean_absolute_error < 0.05


def test_timings_of_a_machine_that_is_slow_all_the_time_carry_its_pace():
    machine = SimulatedMachine(noise=0.005)
    device = SimulatedDevice(machine)
    model = small_model()
    before = device.measure_steadily([model])[0]
    assert before.pace == 1
    assert before.median_ms == pytest.approx(machine.model_ms(model), rel=0.02)
    machine.throttle = lambda second: 1.5
    after = device.measure_steadily([model])[0]
    assert after.pace == pytest.approx(1.5, rel=0.05)
    assert after.median_ms == pytest.approx(1.5 * machine.model_ms(model), rel=0.03)
    assert after.at_usual_pace().median_ms == pytest.approx(machine.model_ms(model), rel=0.03)


def test_measuring_waits_for_a_hot_processor_and_no_longer_than_is_allowed():
    machine = SimulatedMachine(heat=Heat(celsius=100.0))
    device = SimulatedDevice(machine)
    dict(device.measure([small_model()]))
    assert device.groups[-1].waited_s > 0
    assert machine.heat is not None
    assert machine.heat.celsius < machine.heat.limit
    oven = SimulatedMachine(heat=Heat(celsius=100.0, idle=95.0))
    slow = SimulatedDevice(oven)
    dict(slow.measure([small_model()], Timing(cool_down_s=7.0)))
    assert slow.groups[-1].waited_s == 7.0
    cool = SimulatedDevice(SimulatedMachine(heat=Heat(celsius=50.0)))
    dict(cool.measure([small_model()]))
    assert cool.groups[-1].waited_s == 0


def test_a_quiet_machine_costs_three_samples_a_model_and_a_disturbed_one_more():
    quiet, disturbed = (SimulatedMachine(noise=0.003, neighbour=n) for n in (None, Neighbour(**SIXTY_PERCENT_SLOW)))
    models = [small_model(channels) for channels in range(16, 56, 4)]
    found = [SimulatedDevice(machine).measure_steadily(models) for machine in (quiet, disturbed)]
    assert all(len(m.samples_ms) == 3 for m in found[0].values())
    assert quiet.busy_ns < disturbed.busy_ns
    for results, machine in zip(found, (quiet, disturbed), strict=True):
        for model, measurement in zip(models, results.values(), strict=True):
            assert measurement.at_usual_pace().median_ms == pytest.approx(machine.model_ms(model), rel=0.03)


def test_the_same_seed_gives_the_same_table(tmp_path):
    first, second = (built(tmp_path / name, SimulatedMachine(seed=4))[1] for name in ("a", "b"))
    assert first.entries == second.entries
    assert first.calibration == second.calibration


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        (SimulatedMachine(load_average=5.0), "busy"),
        (SimulatedMachine(neighbour=Neighbour(40.0, 60.0)), "slowed"),
        (SimulatedMachine(neighbour=Neighbour(40.0, 60.0, steals=True)), "stolen"),
        (SimulatedMachine(heat=Heat(celsius=100.0)), "cooled down"),
        (SimulatedMachine(throttle=lambda second: 1.0 if second < 0.03 else 1.2), "throttled"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_disturbance_has_its_caution_and_a_quiet_machine_has_none(tmp_path, machine, name):
    _, quiet = built(tmp_path / "quiet", SimulatedMachine(noise=0.005))
    assert quiet.cautions == ()
    device = SimulatedDevice(machine)
    for _ in range(3):
        device.measure_steadily([small_model(channels) for channels in (16, 32, 64)])
    seen = Seen(device.conditions(), device.groups, quiet.calibration)
    assert name in cautions_of(seen)


def test_every_caution_has_a_name_of_its_own_and_a_text_with_advice():
    names = [caution.name for caution in CAUTIONS]
    assert len(set(names)) == len(names)
    assert [text.split(":")[0] for text in texts_of(names)] == names
    assert all(". " in caution.text for caution in CAUTIONS)
