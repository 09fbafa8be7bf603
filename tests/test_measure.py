"""`measure.py` as a program of its own, and the device that talks to it; everything runs for real."""

import gc
import json
import os
import signal
import subprocess
import sys

import pytest

from hwnas import machine_facts, measure
from hwnas.devices import Timing
from hwnas.errors import DeviceError, HwnasError
from hwnas.network import NetworkBuilder
from hwnas.onnx_model import random_weights, to_onnx
from hwnas.opening import open_device
from hwnas.runtimes import board_program

QUICK = Timing(rounds=3, patience_s=2.0, sample_ms=0.05, least_runs=2, timeout_s=60)


def model(channels=8, side=8):
    b = NetworkBuilder("test", (3, side, side))
    with b.unit("stem"):
        x = b.conv_bn(b.input, channels, kernel=3, activation="relu")
    network = b.build(x)
    return to_onnx(network, random_weights(network, 0)).SerializeToString()


@pytest.fixture(scope="module")
def cpu():
    with open_device("cpu") as opened:
        yield opened


def request(paths, **changes):
    settings = Timing(rounds=2, patience_s=0.0, sample_ms=0.05, least_runs=2).request
    anchor = {"anchor": str(paths[0]), "anchor_ms": None}
    return json.dumps({"models": [str(path) for path in paths]} | settings | anchor | changes)


def test_one_file_in_an_empty_folder_answers_requests_line_by_line(tmp_path):
    (tmp_path / "program.pyz").write_bytes(board_program("cpu"))
    (tmp_path / "good.onnx").write_bytes(model())
    (tmp_path / "broken.onnx").write_bytes(model()[:100])
    lines = [
        '{"conditions": true}',
        request(["good.onnx", "broken.onnx", "missing.onnx"]),
        request(["good.onnx"], threads=1000),
        "this is not JSON",
        request(["good.onnx"], agreeing=4, tolerance=1000.0, rounds=1000),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, "-I", "program.pyz"],
        cwd=tmp_path, env=environment, input="\n".join(lines), capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    answers = [json.loads(line) for line in process.stdout.splitlines()]
    assert set(answers[0]["conditions"]) >= {"chip", "cores", "runtime", "runtime_version", "governor", "load_average"}
    assert answers[1]["model"] == 1
    assert "InvalidProtobuf" in answers[1]["error"]
    assert answers[2]["model"] == 2
    assert "missing.onnx" in answers[2]["error"]
    assert answers[3]["model"] == 0
    assert 1 <= len(answers[3]["samples_ms"]) <= 3
    assert answers[4]["done"] == 1
    lower_decile = sorted(samples := answers[4]["anchor_samples_ms"])[len(samples) // 10]
    assert answers[4]["anchor_ms"] == pytest.approx(lower_decile, rel=1e-5)
    assert answers[4].keys() >= {"before", "after", "waited_s"}
    assert "1000 threads were asked for" in answers[5]["error"]
    assert "JSONDecodeError" in answers[6]["error"]
    assert len(answers[7]["samples_ms"]) >= 4  # a disturbed one may turn out to be steady later
    assert answers[8]["done"] == 1


def test_a_sample_is_the_least_of_its_runs_after_one_that_does_not_count():
    lengths_ns, now = iter([9, 1, 50, 6, 5, 7]), [0]

    def run():
        now[0] += next(lengths_ns) * 1_000_000

    timed = measure.TimedModel(
        run, {"warm_up_runs": 1, "warm_up_ms": 0, "least_runs": 3, "sample_ms": 0}, lambda: now[0]
    )
    assert timed.runs == 3
    assert timed.sample_ms() == 5.0
    assert next(lengths_ns, None) is None


def test_a_short_model_is_run_as_often_as_a_sample_takes_and_warmed_up_as_long_as_is_asked():
    now, runs = [0], [0]

    def run():
        now[0] += 100_000
        runs[0] += 1

    timed = measure.TimedModel(
        run, {"warm_up_runs": 1, "warm_up_ms": 5, "least_runs": 3, "sample_ms": 2.0}, lambda: now[0]
    )
    assert timed.runs == 20
    assert runs[0] * 0.1 >= 5


def test_a_group_gives_samples_of_every_model_and_larger_models_take_longer(cpu):
    before = len(cpu.groups)
    results = dict(cpu.measure([model(8, 8), model(512, 64)], QUICK))  # 4000 times the work: no noise is as long
    assert sorted(results) == [0, 1]
    assert all(measurement.samples_ms for measurement in results.values())
    assert results[1].minimum_ms > results[0].minimum_ms > 0
    assert len(cpu.groups) == before + 1
    assert cpu.groups[-1].models == 2
    assert 0 < cpu.anchor_ms <= (1 + 1e-5) * cpu.groups[-1].anchor_ms.median_ms  # which has six digits


@pytest.mark.filterwarnings("error")
def test_a_device_that_is_closed_leaves_no_file_open_and_no_folder_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with open_device("cpu") as opened:
        assert len(list(opened.measure([model()], QUICK))) == 1
    assert list(tmp_path.iterdir()) == []
    del opened
    gc.collect()


def test_conditions_say_what_was_measured_on_what(cpu):
    found = cpu.conditions(threads=1, batch=2)
    assert (found.device, found.batch, found.precision, found.origin) == ("cpu", 2, "fp32", "measured")
    assert found.cores == len(machine_facts.CORES)
    assert found.chip
    assert found.runtime_version


def test_settings_that_the_device_cannot_meet_are_refused(cpu):
    with pytest.raises(HwnasError, match="1000 threads cannot be timed on cpu"):
        cpu.conditions(threads=1000)
    assert cpu.conditions(precision="int8").precision == "int8"
    with pytest.raises(HwnasError, match="'fp16'"):
        cpu.conditions(precision="fp16")
    with pytest.raises(HwnasError, match="at least one image"):
        cpu.conditions(batch=0)
    with pytest.raises(HwnasError, match=r"no device 'toaster'.*cpu.*gpu"):
        open_device("toaster")


def test_a_model_that_is_not_there_is_named_after_the_others_were_timed(cpu, tmp_path):
    results = []
    with pytest.raises(DeviceError, match=r"1 of 2 models .*missing\.onnx"):
        results.extend(cpu.measure([tmp_path / "missing.onnx", model()], QUICK))
    assert [index for index, _ in results] == [1]
    assert len(dict(cpu.measure([model()], QUICK))) == 1


def test_a_killed_child_is_reported_and_the_next_request_starts_another(cpu):
    running = cpu.measure([model(64, 64)], Timing(rounds=100_000, agreeing=100_000))
    os.kill(cpu.line.process_id, signal.SIGKILL)
    with pytest.raises(DeviceError, match="measuring process of cpu has died"):
        dict(running)
    assert len(dict(cpu.measure([model()], QUICK))) == 1


def test_a_child_that_hangs_is_ended_and_reported(cpu):
    cpu.conditions()
    os.kill(cpu.line.process_id, signal.SIGSTOP)
    with pytest.raises(DeviceError, match=r"has not answered for 0\.2 s"):
        dict(cpu.measure([model()], Timing(timeout_s=0.2)))
    assert cpu.conditions().device == "cpu"


def test_a_group_that_nobody_waited_for_does_not_answer_the_next_one(cpu):
    cpu.measure([model(), model(), model()], QUICK)
    assert len(dict(cpu.measure([model()], QUICK))) == 1
