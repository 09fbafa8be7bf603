"""Conformance: what every runtime and every way of reaching a device must do. One that is not here is skipped, and why.

`ways.WAYS` is the list. A runtime that passes may be timed with: it computes what ONNX Runtime does, says what it is,
and costs no more than an error when a model, its process or its library fails.
"""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from ways import WAYS

from hwnas import measure, runtime_onnxruntime, runtimes
from hwnas.conditions import Conditions
from hwnas.devices import Device, MemoryNotShownError, Timing
from hwnas.errors import DeviceError, HwnasError
from hwnas.lines import Line
from hwnas.network import BatchNorm, Network, NetworkBuilder
from hwnas.onnx_model import random_weights, to_onnx
from hwnas.opening import open_device

QUICK = Timing(rounds=3, patience_s=2.0, sample_ms=0.05, least_runs=2, timeout_s=120)


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[Device]:
    with WAYS[request.param]() as opened:
        try:
            opened.conditions()
        except DeviceError as error:
            pytest.skip(str(error))
        yield opened


def onnx_of(network: Network, batch: int = 1) -> bytes:
    return to_onnx(network, random_weights(network, 3), batch=batch).SerializeToString()


def convolution(channels: int, side: int = 16) -> bytes:
    b = NetworkBuilder("convolution", (3, side, side))
    with b.unit("stem"):
        x = b.conv_bn(b.input, channels, kernel=3, activation="relu")
    return onnx_of(b.build(x))


def every_operator() -> Network:
    """A network with each operator that an exported model can have, in the forms that runtimes take apart."""
    b = NetworkBuilder("all", (3, 12, 12))
    with b.unit("stem"):
        x = b.conv_bn(b.input, 12, name="conv", kernel=3, stride=2, activation="relu6")
        x = b.add_node(BatchNorm(), b.conv(x, 12, name="bias", bias=True), name="norm_alone")[0]
    with b.unit("pools"):
        x = b.concat(b.pool(x, "max", name="max", stride=1), b.pool(x, "average", name="average", stride=1))
    with b.unit("grouped"):
        x = b.shuffle(b.conv_bn(x, 24, name="grouped", groups=4), 4, name="whole")  # and then a convolution
        x = b.conv_bn(x, 24, name="pointwise", activation="hard_sigmoid")
    with b.unit("unit"):
        left, right = b.split(b.shuffle(x, 2), (12, 12))
        right = b.conv_bn(right, 12, name="depthwise", kernel=5, groups=12)
        right = b.squeeze_excite(right, 4)
        x = b.concat(left, b.add(left, right, name="residual"))
    with b.unit("down"):
        x = b.conv_bn(b.shuffle(x, 3), 24, name="down", kernel=3, stride=2, groups=24)  # a shuffle, then depthwise
        x = b.conv_bn(x, 16, name="strided", stride=2)
    with b.unit("head"):
        x = b.classifier(x, 10)
    return b.build(x)


def expected(model: bytes, seed: int) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, measure.random_feed(runtime_onnxruntime.Model(session), seed))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_model_computes_what_onnx_runtime_does_whatever_its_operators(way: Device, batch: int):
    model = onnx_of(every_operator(), batch)
    (found,), (right,) = way.outputs(model, Timing(seed=5)), expected(model, seed=5)
    assert found.shape == right.shape == (batch, 10)
    assert np.abs(found - right).max() <= 1e-4 * np.abs(right).max()
    assert np.abs(way.outputs(model, Timing(seed=6))[0] - right).max() > 1e-2 * np.abs(right).max()


def test_feature_maps_come_out_as_the_onnx_file_lays_them_out(way: Device):
    model = convolution(5)
    (found,), (right,) = way.outputs(model), expected(model, seed=0)
    assert found.shape == right.shape == (1, 5, 16, 16)
    assert np.abs(found - right).max() <= 1e-4 * np.abs(right).max()


def test_conditions_say_what_ran(way: Device):
    found = way.conditions(threads=1, batch=2)
    assert (found.device, found.threads, found.batch, found.precision) == (way.name, 1, 2, "fp32")
    assert all((found.chip, found.runtime, found.runtime_version, found.system, found.governor))
    assert found.cores >= 1
    assert found.launch_ms >= 0
    assert (found.launch_ms > 0) == ("GPU" in found.runtime)


def test_no_two_runtimes_of_one_machine_have_the_same_conditions():
    found: list[Conditions] = []
    for name in {*runtimes.RUNTIMES} - {"gpu"}:  # which is one of the others
        with open_device(name) as opened, contextlib.suppress(DeviceError):
            found.append(opened.conditions())
    assert found
    for one, other in itertools.combinations(found, 2):
        assert {"device", "runtime"} <= {name for name, _, _ in one.differences(other)}


def test_what_a_runtime_cannot_do_is_refused_before_anything_is_timed(way: Device):
    with pytest.raises(HwnasError, match="1000 threads"):
        way.conditions(threads=1000)
    with pytest.raises(HwnasError, match="'fp3'"):
        way.conditions(precision="fp3")


def test_a_model_needs_memory_or_the_runtime_does_not_show_it(way: Device):
    with contextlib.suppress(MemoryNotShownError):
        ((_, found),) = way.peak_memory([convolution(512)])
        assert found > 16 * 16 * 512 * 4
    assert len(way.outputs(convolution(4))) == 1


def test_times_are_positive_and_grow_with_the_work(way: Device):
    small, large = convolution(4), convolution(512, side=64)  # 2000 times the work: no noise is as long
    times_ms = {index: found.minimum_ms for index, found in way.measure([small, large, small], QUICK)}
    assert min(times_ms[0], times_ms[2]) > 0
    if way.conditions().launch_ms == 0:  # to a GPU both are nothing
        assert times_ms[1] > max(times_ms[0], times_ms[2])
    assert way.anchor_ms is not None
    assert way.anchor_ms > 0


def test_a_broken_model_is_an_error_of_its_own_and_the_others_are_timed(way: Device, tmp_path: Path):
    good, results = convolution(4), []
    with pytest.raises(DeviceError, match=rf"2 of 3 models do not run on {way.name}: 0\.onnx"):
        results.extend(way.measure([good[:100], good, tmp_path / "missing.onnx"], QUICK))
    assert [index for index, _ in results] == [1]
    with pytest.raises(DeviceError, match=rf"does not run on {way.name}"):
        way.outputs(b"no model")
    assert len(way.outputs(good)) == 1


def test_a_hang_is_cut_and_a_dead_process_is_reported_and_both_are_mended_by_the_next_request(way: Device):
    model = convolution(4)
    way.outputs(model)
    for number, words in ((signal.SIGSTOP, r"has not answered for 0\.2 s"), (signal.SIGKILL, "has died")):
        assert way.line.process_id
        os.kill(way.line.process_id, number)
        with pytest.raises(DeviceError, match=words):
            way.outputs(model, Timing(timeout_s=0.2 if number == signal.SIGSTOP else 60))
        assert len(way.outputs(model)) == 1


# ---- the door for further runtimes -------------------------------------------------------------------------------


TALKING = """
print("a library greets")
import numpy as np
class Runtime:
    name, version, chip, precisions = "Talking", "1", "", ("fp32",)
    on_processor, shows_memory, openers, launch_ms = True, False, 2, 0.0
    def __init__(self, where): print("made for", where)
    def open(self, path, threads): print("opened"); return Model()
class Model:
    inputs = [("x", np.float32, [2])]
    def outputs(self, feed): print("ran"); return [feed["x"]]
    def repeated(self, feed): return (lambda: None), 4
"""


def laid_out(folder: Path) -> Path:
    """The package that measures, as on a board."""
    (folder / "hwnas").mkdir()
    for name, content in runtimes.board_files("cpu").items():
        (folder / name).write_bytes(content)
    return folder / "hwnas"


def test_a_file_beside_measure_py_is_a_runtime_and_what_it_prints_is_no_answer(tmp_path: Path):
    (laid_out(tmp_path) / "runtime_talking.py").write_text(TALKING)
    command = (sys.executable, str(tmp_path / "hwnas/measure.py"), "talking-board")
    with Device("board", Line("board", command)) as board:
        assert board.conditions().runtime == "Talking"
        assert board.outputs(b"anything", Timing(seed=1))[0].shape == (2,)
        assert dict(board.measure([b"a", b"b"], QUICK)).keys() == {0, 1}
        with pytest.raises(DeviceError, match="Talking tells no times of nodes"):
            board.profile(b"a", QUICK)


@pytest.mark.parametrize(
    ("source", "words"),
    [("import nothing_like_it", "No module named 'nothing_like_it'"), ("raise ImportError('get it there')", "get it")],
)
def test_a_runtime_that_cannot_work_here_says_what_to_do(tmp_path: Path, source: str, words: str):
    (laid_out(tmp_path) / "runtime_absent.py").write_text(source)
    command = (sys.executable, str(tmp_path / "hwnas/measure.py"), "absent")
    with (
        Device("board", Line("board", command)) as board,
        pytest.raises(DeviceError, match=f"The device board refuses: .*{words}"),
    ):
        board.conditions()


def test_gpu_without_a_gpu_is_one_message_that_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with (
        open_device("gpu") as gpu,
        pytest.raises(DeviceError, match=r"there is no GPU here .*pip install 'jax\[cuda13\]'"),
    ):
        gpu.conditions()


def test_x86_and_arm_are_this_processor_or_none(monkeypatch: pytest.MonkeyPatch):
    for machine, name in (("x86_64", "x86"), ("AMD64", "x86"), ("aarch64", "arm"), ("arm64", "arm")):
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        assert runtimes.local_name(name) == "cpu"
    with pytest.raises(HwnasError, match=r"no x86: the system calls it arm64"):
        runtimes.local_name("x86")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert runtimes.local_name("arm") is None


def test_a_call_of_many_runs_is_divided_by_them_and_a_sample_has_two_calls():
    now = [0]

    def run():
        now[0] += 16_000_000

    request = {"warm_up_runs": 1, "warm_up_ms": 0, "least_runs": 5, "sample_ms": 1.0}
    timed = measure.TimedModel(run, request, lambda: now[0], runs_a_call=16)
    assert timed.sample_ms() == 1.0
    assert timed.runs == measure.LEAST_CALLS


def test_queued_runs_of_onnx_runtime_run_on_inputs_that_stay_where_the_model_is(tmp_path: Path):
    (tmp_path / "a.onnx").write_bytes(convolution(4))
    model = measure.make_runtime("cpu").open(str(tmp_path / "a.onnx"), 1)
    waited: list[bool] = []

    class Session:
        """The real one, which notes whether each run was waited for."""

        def __getattr__(self, name):
            return getattr(real, name)

        def run_with_iobinding(self, binding, options=None):
            waited.append(options is None)
            real.run_with_iobinding(binding, options)

    real, model.session = model.session, Session()
    call = model.queued(measure.random_feed(model, 0), "cpu")  # what is done with "cuda" where there is a GPU
    call()
    assert waited == [False] * (runtime_onnxruntime.RUNS_A_CALL - 1) + [True]


def test_runtimes_are_told_apart_before_a_library_is_loaded():
    code = "import sys, hwnas.runtimes; print(*sorted({'jax', 'openvino', 'onnxruntime', 'onnx'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
