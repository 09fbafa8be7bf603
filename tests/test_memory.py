"""Peak memory: live ranges laid by hand, a plane on a made-up device, and the real runtime in processes of its own."""

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from simulated import BASE_BYTES, BYTES_A_BYTE, SimulatedDevice, SimulatedMachine

from hwnas import measure
from hwnas.devices import Device, Timing
from hwnas.errors import DeviceError
from hwnas.lines import Line
from hwnas.memory import MemoryNetwork, fit_memory
from hwnas.memory_profiling import FITTED, HELD_OUT, profile_memory
from hwnas.model_size import model_bytes
from hwnas.network import NetworkBuilder
from hwnas.onnx_model import random_weights, to_onnx
from hwnas.opening import open_device
from hwnas.reference import reference
from hwnas.space import lower
from hwnas.space_toml import load_space
from hwnas.whole_networks import Setup
from hwnas.working_set import working_bytes

TINY = load_space("shufflenet-tiny")


# ---- what is worked on ----------------------------------------------------------------------------------------------


def test_the_peak_of_a_chain_is_its_largest_pair_of_neighbours():
    b = NetworkBuilder("chain", (3, 8, 8))
    with b.unit("all"):
        x = b.conv_bn(b.input, 10, activation="relu")
        x = b.conv_bn(x, 20, name="wide", activation="relu")
        x = b.conv_bn(x, 5, name="last")
    assert working_bytes(b.build(x)) == ((10 + 20) * 64 + 10 * 20) * 4


def test_a_tensor_that_is_read_later_stays_in_memory_until_then():
    def network(skipped: bool):
        b = NetworkBuilder("skip", (4, 8, 8))
        with b.unit("all"):
            x = b.conv(b.input, 4, name="first")
            y = b.conv(x, 8, name="second")
            y = b.conv(y, 4, name="third")
            y = b.add(y, x) if skipped else y
        return b.build(y)

    assert working_bytes(network(skipped=False)) == ((4 + 8) * 64 + 4 * 8) * 4
    assert working_bytes(network(skipped=True)) == ((4 + 8 + 4) * 64 + 8 * 4) * 4


def test_an_activation_in_place_costs_nothing_unless_its_input_is_read_again():
    def network(again: bool):
        b = NetworkBuilder("in place", (4, 8, 8))
        with b.unit("all"):
            x = b.conv(b.input, 8, name="conv")
            y = b.activation(x, "relu", name="relu")
            y = b.add(x, y) if again else y
        return b.build(y)

    assert working_bytes(network(again=False)) == ((4 + 8) * 64 + 4 * 8) * 4
    assert working_bytes(network(again=True)) == 3 * 8 * 64 * 4


def test_tensors_grow_with_the_batch_and_everything_shrinks_with_the_precision():
    network = reference("mobilenet-v2-1.0")
    once = working_bytes(network)
    assert 7.9 * once < working_bytes(network, batch=8) < 8 * once
    assert working_bytes(network, precision="int8") == once // 4
    assert once == 4 * (96 * 112 * 112 + 96 * 56 * 56 + 9 * 96)  # the first stride-2 depthwise convolution


# ---- the plane -------------------------------------------------------------------------------------------------------


def networks(count: int, noise: float = 0.0, working: float = 2.0) -> list[MemoryNetwork]:
    rng = random.Random(3)
    found = []
    for index in range(count):
        size, live = rng.randrange(100_000, 9_000_000), rng.randrange(50_000, 4_000_000)
        truth = (BASE_BYTES + 3 * size + working * live) * (1 + rng.gauss(0, noise))
        found.append(MemoryNetwork((index,), size, live, (round(truth),), held_out=index % 2 == 1))
    return found


def test_the_plane_recovers_a_truth_that_is_one_and_its_bound_is_tight():
    memory = fit_memory(networks(30))
    assert memory.intercept_bytes == pytest.approx(BASE_BYTES, rel=1e-3)
    assert memory.per_model_byte == pytest.approx(3, rel=1e-3)
    assert memory.per_working_byte == pytest.approx(2, rel=1e-2)
    assert memory.mean_absolute_error < 1e-4
    assert memory.upper_ratio < 1e-3


def test_nineteen_of_twenty_new_networks_stay_under_the_upper_bound():
    everyone = networks(2000, noise=0.05)
    shares = []
    for first in range(0, 1500, 60):
        known, new = everyone[first : first + 60], everyone[first + 60 : first + 260]
        memory = fit_memory(known)
        upper = [memory.expected_bytes(n.model_bytes, n.working_bytes) * (1 + memory.upper_ratio) for n in new]
        shares.append(sum(n.measured_bytes <= most for n, most in zip(new, upper, strict=True)) / len(new))
    assert 0.92 < sum(shares) / len(shares) < 0.99


def test_what_is_worked_on_never_lowers_the_prediction_and_the_greatest_sample_counts():
    memory = fit_memory(networks(30, working=-1.0))
    assert memory.per_working_byte == 0
    twice = replace(networks(1)[0], samples_bytes=(5, 9, 7))
    assert twice.measured_bytes == 9


def test_a_profile_of_memory_on_a_made_up_device_finds_what_it_is_made_of():
    setup = Setup(TINY, SimulatedDevice(SimulatedMachine(session_noise=0.01)), 1, 1, "fp32", 0)
    rng = random.Random(1)
    codes = {TINY.encode(TINY.sample(rng)) for _ in range(40)} | {
        TINY.encode(architecture) for architecture in (TINY.smallest, TINY.largest)
    }
    done: list[None] = []
    memory = profile_memory(setup, codes, lambda: done.append(None))
    assert len(memory.networks) == len(done) == FITTED + HELD_OUT
    assert sum(network.held_out for network in memory.networks) == HELD_OUT
    ends = [
        network for network in memory.networks if network.encoding in map(TINY.encode, (TINY.smallest, TINY.largest))
    ]
    assert [network.held_out for network in ends] == [False, False]
    for architecture in (TINY.smallest, TINY.largest):
        network = lower(TINY, architecture)
        truth = BASE_BYTES + BYTES_A_BYTE * model_bytes(network)
        assert memory.upper_bytes(network, 1, "fp32") == pytest.approx(truth, rel=0.06)


# ---- the real runtime ------------------------------------------------------------------------------------------------


def test_a_larger_model_adds_more_memory_and_a_measurement_repeats():
    small, large = (lower(TINY, a) for a in (TINY.smallest, TINY.largest))
    models = [to_onnx(n, random_weights(n, 0)).SerializeToString() for n in (small, large, small)]
    with open_device("cpu") as cpu:
        found = dict(cpu.peak_memory(models))
    assert found[1] - found[0] > len(models[1]) - len(models[0]) > 4e6
    assert found[0] == pytest.approx(found[2], rel=0.15)
    assert found[0] > len(models[0])


def test_what_the_process_had_before_and_what_it_gave_back_do_not_count(tmp_path: Path):
    network = lower(TINY, TINY.smallest)
    (tmp_path / "a.onnx").write_bytes(to_onnx(network, random_weights(network, 0)).SerializeToString())
    code = f"""
import numpy
from hwnas import measure
runtime = measure.make_runtime("cpu")
given_back = numpy.ones(50_000_000)
del given_back
kept = numpy.ones(25_000_000)
request = {{"memory_here": {str(tmp_path / "a.onnx")!r}, "threads": 1, "seed": 0}}
print(measure.memory_here(request, runtime)["memory_bytes"])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    with open_device("cpu") as cpu:
        alone = dict(cpu.peak_memory([tmp_path / "a.onnx"]))[0]
    assert int(run.stdout) == pytest.approx(alone, rel=0.3)


def test_a_model_that_does_not_load_is_named_and_the_device_goes_on():
    network = lower(TINY, TINY.smallest)
    good = to_onnx(network, random_weights(network, 0)).SerializeToString()
    with open_device("cpu") as cpu:
        with pytest.raises(DeviceError, match=r"The memory of 0\.onnx cannot be measured on cpu: .*"):
            dict(cpu.peak_memory([b"no model"]))
        assert dict(cpu.peak_memory([good]))[0] > 0


def test_a_system_that_does_not_tell_the_memory_of_a_process_gets_a_table_without_it(tmp_path: Path):
    program = Path(measure.__file__).read_text()
    (tmp_path / "measure.py").write_text(program.replace('"/proc/self/status"', '"/proc/self/nothing"'))
    with Device("cpu", Line("cpu", (sys.executable, str(tmp_path / "measure.py")))) as silent:
        setup = Setup(TINY, silent, 1, 1, "fp32", 0)
        codes = [TINY.encode(TINY.smallest), TINY.encode(TINY.largest)]
        assert profile_memory(setup, codes) is None


def test_a_model_that_hangs_while_its_memory_is_measured_leaves_no_process_behind(tmp_path: Path):
    os.mkfifo(tmp_path / "a.onnx")  # to read it waits for a writer
    with open_device("cpu") as cpu:
        cpu.conditions()
        measuring = cpu.line.process_id
        assert measuring is not None
        with pytest.raises(DeviceError, match=r"has not answered for 1 s"):
            dict(cpu.peak_memory([tmp_path / "a.onnx"], Timing(timeout_s=1.0)))
        deadline = time.monotonic() + 10  # a process that was killed is still there until the kernel has run it again
        while members := [path for path in Path("/proc").glob("[0-9]*/stat") if group_of(path) == measuring]:
            assert time.monotonic() < deadline, members
            time.sleep(0.01)


def group_of(stat: Path) -> int | None:
    """The process group of a process that is not yet dead; None of any other."""
    try:
        state, _, group, *_ = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(group)


def test_a_process_that_ends_without_an_answer_is_an_error_of_its_model(tmp_path: Path):
    broken = tmp_path / "measure.py"
    broken.write_text("import sys; sys.exit(9)")
    source = Path(measure.__file__).read_text(encoding="utf-8")
    alone = tmp_path / "alone.py"
    alone.write_text(source.replace("os.path.abspath(sys.argv[0])", repr(str(broken))))
    request = json.dumps({"memory": ["a.onnx"], "threads": 1, "seed": 0})
    run = subprocess.run([sys.executable, str(alone)], input=request, capture_output=True, text=True, check=True)
    answers = [json.loads(line) for line in run.stdout.splitlines()]
    assert answers == [{"model": 0, "error": "its process ended with status 9"}, {"done": 1}]
