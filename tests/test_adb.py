"""A phone, by the real adb client, which reaches a daemon that speaks adbd's side of the protocol (`adb_daemon.py`).

The runner there has the command line of onnxruntime_perf_test and runs the models for real (`native_runner.py`). The
adb server is one of the tests' own: its port, and its keys.
"""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import native_runner
import pytest
from adb_daemon import Daemon
from conftest import TINY

from benchmarks.arm64_userland import default_folder, python_of
from hwnas import android, doctor, lines, measure, perf_test, phone
from hwnas.devices import Device, Timing, line_to
from hwnas.errors import DeviceError, DeviceLostError, HwnasError, UnfitDeviceError
from hwnas.latency import load_table
from hwnas.network import NetworkBuilder
from hwnas.onnx_model import random_weights, to_onnx
from hwnas.registry import Entry, store

QUICK = Timing(rounds=2, patience_s=0.0, agreeing=1, sample_ms=0.05, least_runs=2, timeout_s=60)
ENDLESS = Timing(rounds=10**9, patience_s=1e9, agreeing=10**9, timeout_s=60)
SLACK_S = 25.0
"""How much later than its time-out a phone may be lost on a busy machine: less than the other limits of the line."""
RUNNER, USERLAND = Path(native_runner.__file__), default_folder()
CORES = sorted(os.sched_getaffinity(0))
PROPERTIES = {
    "ro.product.manufacturer": "Maker", "ro.product.model": "Model 7", "ro.soc.manufacturer": "QTI",
    "ro.soc.model": "SM8550", "ro.board.platform": "kalama", "ro.product.cpu.abilist": "x86_64,arm64-v8a",
    "ro.build.version.release": "14",
}  # fmt: skip


def model(channels: int = 8, side: int = 8) -> bytes:
    b = NetworkBuilder("test", (3, side, side))
    with b.unit("stem"):
        x = b.conv_bn(b.input, channels, kernel=3, activation="relu")
    network = b.build(x)
    return to_onnx(network, random_weights(network, 0)).SerializeToString()


WIDE_BYTES = 16 << 20


def wide_model() -> bytes:
    """Its one weight has `WIDE_BYTES`."""
    b = NetworkBuilder("test", (1024, 1, 1))
    with b.unit("stem"):
        x = b.conv_bn(b.input, WIDE_BYTES // 4 // 1024, kernel=1, activation="relu")
    network = b.build(x)
    return to_onnx(network, random_weights(network, 0)).SerializeToString()


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module", autouse=True)
def _adb_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if not shutil.which("adb"):
        pytest.skip("no adb: apt-get install adb")
    home = tmp_path_factory.mktemp("adb")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("ANDROID_ADB_SERVER_PORT", str(port))
        patch.setattr(lines, "PAUSE_S", 0.2)
        yield
        subprocess.run(["adb", "kill-server"], capture_output=True, timeout=20)


@pytest.fixture(scope="module")
def loaded_runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The socket of a process that keeps ONNX Runtime loaded, so that runners start as quickly as native ones do.

    It runs each model once, and writes what it costs on a machine that nothing disturbs.
    """
    path = tmp_path_factory.mktemp("runner") / "socket"
    environment = {"OPENBLAS_NUM_THREADS": "1", "RUNNER_STEADY": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    server = subprocess.Popen([sys.executable, RUNNER, "--serve", path], env=os.environ | environment)
    try:
        until(path.exists)
        yield str(path)
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def runner(tmp_path: Path) -> Path:
    """The runner as a file of its own."""
    return written(tmp_path / "onnxruntime_perf_test", f"#!{sys.executable} -IS\n{RUNNER.read_text()}")


@pytest.fixture
def daemon(tmp_path: Path, loaded_runtime: str) -> Iterator[Daemon]:
    root = tmp_path / "phone"
    cpus = root / "sys/devices/system/cpu"
    for core in CORES:
        written(cpus / f"cpu{core}/cpufreq/cpuinfo_max_freq", f"{2_800_000 if core == CORES[-1] else 1_800_000}\n")
        written(cpus / f"cpu{core}/cpufreq/scaling_max_freq", "1800000\n")
        written(cpus / f"cpu{core}/cpufreq/scaling_governor", "walt\n")
    for number, (kind, celsius) in enumerate({"cpu-1-2": 41000, "battery": 300, "cpu-1-3": 43000}.items()):
        zone = root / f"sys/class/thermal/thermal_zone{number}"
        written(zone / "type", f"{kind}\n")
        written(zone / "temp", f"{celsius}\n")
        written(zone / "trip_point_0_type", "passive\n")
        written(zone / "trip_point_0_temp", "95000\n")
    environment = {"RUNNER_SERVER": loaded_runtime, "RUNNER_LOG": str(tmp_path / "starts")}
    started = Daemon(root, PROPERTIES, environment)
    yield started
    started.unplug()


@pytest.fixture
def entry(daemon: Daemon, runner: Path) -> Entry:
    return Entry("phone", f"adb:127.0.0.1:{daemon.port}", runner=str(runner))


@pytest.fixture
def reach(entry: Entry) -> Iterator[Callable[..., Device]]:
    """Opens the phone with changes of its entry in the registry."""
    opened: list[Device] = []

    def open_phone(**changes: Any) -> Device:
        opened.append(Device(entry.name, line_to(replace(entry, **changes))))
        return opened[-1]

    yield open_phone
    for device in opened:
        device.close()


# ---- what it gives -----------------------------------------------------------------------------------------------


def test_a_phone_says_what_it_is_and_times_models_on_its_fastest_processor(
    daemon: Daemon, reach: Callable[..., Device], runner: Path, tmp_path: Path
):
    daemon.environment.pop("RUNNER_SERVER")  # the runner itself runs the models, as often as it is told
    device = reach()
    conditions = device.conditions()
    assert (conditions.device, conditions.chip, conditions.cores) == ("phone", "QTI SM8550 (kalama)", len(CORES))
    assert conditions.runtime == "ONNX Runtime CPU (onnxruntime_perf_test)"
    assert conditions.runtime_version == perf_test.version_of([runner])
    assert (conditions.governor, conditions.origin) == ("walt", "measured")
    assert conditions.system.startswith("Android 14, Linux ")
    large = model(512, side=64)  # more than 2000 times the work of the others: no noise is as long
    results = dict(device.measure([model(8), large, model(16)], QUICK))
    assert sorted(results) == [0, 1, 2]
    assert results[1].minimum_ms > max(results[0].minimum_ms, results[2].minimum_ms) > 0
    (facts,) = device.groups
    assert (facts.megahertz, facts.celsius, facts.load_average >= 0) == ((1800.0, 1800.0), 43.0, True)
    starts = [json.loads(line) for line in (tmp_path / "starts").read_text().splitlines()]
    assert {tuple(cores) for cores, _ in starts} == {(CORES[-1],)}
    assert all("-x 1 -y 1" in shlex.join(words) for _, words in starts)
    with pytest.raises(HwnasError, match=f"threads cannot be timed on phone, which has {len(CORES)} processors"):
        device.conditions(threads=len(CORES) + 1)


def test_models_and_the_runner_are_sent_once_and_again_if_they_were_spoilt(
    daemon: Daemon, reach: Callable[..., Device]
):
    device = reach()
    dict(device.measure([model(8), model(64)], QUICK))
    assert len(daemon.pushed) == len(["runner", "8", "64", "anchor"])
    dict(device.measure([model(64), model(8), model(16)], QUICK))
    device.close()
    dict(device.measure([model(16)], QUICK))
    assert len(daemon.pushed) == len(["runner", "8", "64", "anchor", "16"])
    folder = daemon.root / "data/local/tmp/hwnas"
    spoilt = folder / daemon.pushed[-1]
    content = spoilt.read_bytes()
    spoilt.write_bytes(content[:-1])
    dict(device.measure([model(16)], QUICK))
    assert spoilt.read_bytes() == content
    assert not [path.name for path in folder.iterdir() if path.name.startswith(("part-", "result-"))]


def test_the_oldest_models_make_room_and_what_was_left_unfinished_goes(
    daemon: Daemon, entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    opened = phone.Phone(entry, lambda: None)
    paths = [written(tmp_path / f"{letter}.onnx", letter * 1000) for letter in "abc"]
    (first,), (second,) = opened.hold(paths[:1]), opened.hold(paths[1:2])
    folder = daemon.root / "data/local/tmp/hwnas"
    os.utime(daemon.here(first), (2e9, 2e9))
    (folder / "part-x").mkdir()
    os.utime(folder / "part-x", (1e9, 1e9))
    monkeypatch.setattr(phone, "CACHE_BYTES", 2500)
    (third,) = opened.hold(paths[2:])
    left = {path.name for path in folder.iterdir() if not path.name.startswith("runner-")}
    assert left == {Path(first).name, Path(third).name}
    assert second not in left


def test_a_model_that_does_not_run_is_named_after_the_others_were_timed(reach: Callable[..., Device]):
    results = []
    with pytest.raises(
        DeviceError, match=r"1 of 2 models do not run on phone: 0\.onnx: .*the runner ended with status 1"
    ):
        results.extend(reach().measure([b"no model", model()], QUICK))
    assert [index for index, _ in results] == [1]


def test_peak_memory_is_what_a_model_adds_to_that_of_the_runner(daemon: Daemon, reach: Callable[..., Device]):
    daemon.environment.pop("RUNNER_SERVER")
    small, large = (found for _, found in reach().peak_memory([model(8), wide_model()], QUICK))
    assert small < 4 << 20
    assert large - small > WIDE_BYTES
    with pytest.raises(
        DeviceError, match=r"memory of 0\.onnx cannot be measured on phone: the runner ended with status"
    ):
        list(reach().peak_memory([b"no model"], QUICK))


def test_what_the_runner_does_not_tell_is_an_error_of_its_own(reach: Callable[..., Device]):
    device = reach()
    with pytest.raises(DeviceError, match="tells neither what a model computes"):
        device.outputs(model(), QUICK)
    with pytest.raises(DeviceError, match="nor the times of its nodes"):
        device.profile(model(), QUICK)


def test_a_phone_is_added_by_one_command_listed_and_checked(
    daemon: Daemon, hwnas: Any, tmp_path: Path, runner: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tmp_path / "phones.toml"
    monkeypatch.setenv("HWNAS_CONFIG", "")
    words = ("--config", config, "devices")
    target = f"adb:127.0.0.1:{daemon.port}"
    assert "has a runner" in hwnas(*words, "add", "phone", target).err
    refused = hwnas(*words, "add", "phone", target, "--runner", tmp_path / "none")
    assert (refused.status, config.exists()) == (2, False)
    added = hwnas(*words, "add", "phone", target, "--runner", runner, "--notes", "here")
    assert added.status == 0, added.err
    assert added.out.endswith("hwnas profile --device phone\n")
    assert hwnas(*words).out.startswith(f"phone     {target}  Maker Model 7 QTI SM8550 (kalama), Android 14")
    checked = json.loads(hwnas(*words, "check", "phone", "--json").out)
    assert checked["can_measure"]
    seen = {finding["what"]: finding for finding in checked["findings"]}
    assert {"reached", "ABI", "free disk", "runtime", "anchor network"} <= seen.keys()
    assert seen["temperature"]["found"] == "43 °C, slows down at 95 °C"
    assert seen["throttling"]["found"] == "not shown"
    assert f"adb -s {target[4:]} shell 'su -c" in seen["governor"]["mend"]


def test_a_latency_table_of_a_phone_is_made_as_of_any_device(entry: Entry, hwnas: Any, tmp_path: Path):
    config = tmp_path / "phones.toml"
    store(entry, config)
    space = written(tmp_path / "tiny.toml", TINY.replace("[16, 32]", "[32]"))
    profiled = hwnas("--config", config, "profile", "--device", "phone", "--space", str(space), "--json")
    assert profiled.status == 0, profiled.err
    table = load_table(Path(os.environ["HWNAS_CACHE"]) / "latency_tables/phone/tiny-fp32-t1-b1.json")
    assert table.conditions.device == "phone"
    assert table.memory


# ---- nothing is left behind, nothing waits for ever --------------------------------------------------------------


def start_endless(daemon: Daemon, device: Device, tmp_path: Path) -> Iterator[tuple[int, Any]]:
    """Begins a measurement that would never end, and waits until the phone is at it."""
    answers = device.measure([model()], ENDLESS)
    until((tmp_path / "starts").exists)
    return answers


def test_nothing_runs_on_the_phone_after_the_line_is_closed(
    daemon: Daemon, reach: Callable[..., Device], tmp_path: Path
):
    device = reach()
    start_endless(daemon, device, tmp_path)
    device.close()
    until(lambda: not daemon.running)


def test_a_phone_that_is_unplugged_and_plugged_in_again_gives_the_same_set_of_results(
    daemon: Daemon, reach: Callable[..., Device], tmp_path: Path
):
    def unplug() -> None:
        for count in (1, 4):
            until(
                lambda count=count: (
                    (tmp_path / "starts").exists() and (tmp_path / "starts").read_text().count("\n") > count
                )
            )
            daemon.unplug()
            time.sleep(0.1)
            daemon.plug()

    thread = threading.Thread(target=unplug)
    thread.start()
    found = dict(reach().measure([model(8), model(16), model(24)], QUICK))
    thread.join()
    assert found.keys() == {0, 1, 2}


def test_a_phone_that_is_unplugged_for_good_ends_within_the_time_out_and_leaves_nothing_there(
    daemon: Daemon, reach: Callable[..., Device], tmp_path: Path
):
    answers = start_endless(daemon, reach(), tmp_path)
    daemon.unplug()
    began = time.monotonic()
    with pytest.raises(DeviceLostError, match=r"was lost: .*what was finished is kept"):
        list(answers)
    assert time.monotonic() - began < 60 + SLACK_S
    until(lambda: not daemon.running)


def hanging(folder: Path) -> str:
    return str(written(folder / "hangs", "#!/bin/sh\nexec sleep 1000\n"))


def test_a_runner_that_hangs_is_given_up_within_the_time_out_and_ended(
    daemon: Daemon, reach: Callable[..., Device], tmp_path: Path
):
    device = reach(runner=hanging(tmp_path))
    began = time.monotonic()
    with pytest.raises(DeviceLostError, match="has not answered for"):
        dict(device.measure([model()], Timing(timeout_s=3.0)))
    assert time.monotonic() - began < 3.0 + SLACK_S
    until(lambda: not daemon.running)


def test_a_phone_that_says_nothing_any_more_is_given_up_within_the_time_out(
    daemon: Daemon, reach: Callable[..., Device]
):
    device = reach()
    device.conditions()
    daemon.deaf = True
    began = time.monotonic()
    with pytest.raises(DeviceLostError, match="has not answered for"):
        dict(device.measure([model()], Timing(timeout_s=2.0)))
    assert time.monotonic() - began < 2.0 + SLACK_S


@pytest.mark.parametrize("text", [b"", b"garbage\n", b"core x most 7\n\nhwnas 0\n"])
def test_a_shell_that_prints_nonsense_is_a_lost_phone(daemon: Daemon, reach: Callable[..., Device], text: bytes):
    daemon.spoil = text
    with pytest.raises(DeviceLostError, match="what was finished is kept"):
        reach().conditions()


@pytest.mark.parametrize("prints", ["true", "echo garbage > $result", "echo x,0,1,1,0 > $result"])
def test_a_runner_that_writes_nonsense_fails(reach: Callable[..., Device], tmp_path: Path, prints: str):
    script = f"#!/bin/sh\nfor result; do :; done\n{prints}\n"
    with pytest.raises(DeviceError, match=r"durations|is no duration"):
        dict(reach(runner=str(written(tmp_path / "odd", script))).measure([model()], QUICK))


def elf(folder: Path, machine: int) -> str:
    path = folder / f"elf-{machine}"
    path.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(11) + machine.to_bytes(2, "little") + bytes(44))
    path.chmod(0o755)
    return str(path)


UNFIT = {
    "a runner for another machine": (
        lambda daemon, folder: {"runner": elf(folder, 40)},
        "abi",
        r"elf-40 is for armeabi-v7a; the phone runs x86_64, arm64-v8a\. Build the runner",
    ),
    "a library for another machine": (
        lambda daemon, folder: {"libraries": (elf(folder, 243),)},
        "abi",
        "elf-243 is for riscv64",
    ),
    "a file that is no program": (
        lambda daemon, folder: {"runner": elf(folder, 62)},
        "abi",
        "Build the runner",
    ),
    "a library that was not given": (
        lambda daemon, folder: {
            "runner": str(
                written(
                    folder / "unlinked",
                    '#!/bin/sh\necho \'CANNOT LINK EXECUTABLE "x": library "libonnxruntime.so" not found\'\nexit 1\n',
                )
            )
        },
        "libraries",
        "libonnxruntime.so.* not found.*--library",
    ),
    "no runner": (lambda daemon, folder: {"runner": str(folder / "none")}, "runner", "there is no file .*/none"),
    "processors that are not there": (lambda daemon, folder: {"cores": (0, 4095)}, "cores", r"\[4095\] are not among"),
    "disk full": (lambda daemon, folder: setattr(daemon, "disk_bytes", 100) or {}, "disk", "No space left on device"),
    "no right to write": (lambda daemon, folder: {"folder": "/proc/hwnas"}, "disk", "name another folder"),
    "not authorised": (
        lambda daemon, folder: setattr(daemon, "authorised", False) or {},
        "unauthorised",
        "unauthorized.*Unlock the phone and allow USB debugging",
    ),
}


@pytest.mark.parametrize("what", UNFIT)
def test_what_a_person_must_mend_is_said_with_the_command(
    daemon: Daemon, reach: Callable[..., Device], tmp_path: Path, what: str
):
    changes, fault, text = UNFIT[what]
    began = time.monotonic()
    with pytest.raises(UnfitDeviceError, match=text) as caught:
        dict(reach(**changes(daemon, tmp_path)).measure([model()], QUICK))
    assert caught.value.fault == fault
    assert time.monotonic() - began < 30


def test_two_who_measure_on_one_phone_are_told_apart(daemon: Daemon, reach: Callable[..., Device], tmp_path: Path):
    first, second = reach(), reach()
    start_endless(daemon, first, tmp_path)
    with pytest.raises(UnfitDeviceError, match=r"is being measured on by another process here\. Wait"):
        dict(second.measure([model()], QUICK))
    first.close()
    assert len(dict(second.measure([model()], QUICK))) == 1


def test_without_adb_the_package_is_named(reach: Callable[..., Device], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UnfitDeviceError, match="sudo apt-get install adb"):
        reach().conditions()


def test_the_doctor_says_of_a_phone_that_is_not_there_how_to_look_for_it(entry: Entry, daemon: Daemon):
    daemon.unplug()
    (found,) = doctor.examine(entry)
    assert (found.what, found.fatal) == ("reached", True)
    assert "try: adb devices" in found.mend


# ---- heat --------------------------------------------------------------------------------------------------------


def test_measuring_waits_until_the_processor_is_cool(daemon: Daemon, entry: Entry, monkeypatch: pytest.MonkeyPatch):
    machine = phone.PhoneMachine(phone.Phone(entry, lambda: None))
    temperature, waits = daemon.root / "sys/class/thermal/thermal_zone0/temp", []

    def cooler(seconds: float) -> None:
        waits.append(seconds)
        temperature.write_text(f"{92000 - 1000 * len(waits)}\n")

    monkeypatch.setattr(machine, "sleep", cooler)
    temperature.write_text("92000\n")
    assert measure.cool_down(machine, 60.0) == len(waits) == len([91, 90, 89])
    temperature.write_text("50000\n")
    daemon.program("dumpsys", 'echo "Thermal Status: 2"')
    assert measure.cool_down(machine, 2.0) == 2.0
    seen = machine.phone.look()
    assert (seen.throttled, seen.celsius, seen.limit_celsius) == ("moderate", 87.0, 87.0)


def looked(*said: str) -> android.Look:
    return android.look_of("\n".join(said))


def test_what_a_phone_shows_or_hides_is_read_as_it_is():
    shown = looked(
        "property ro.soc.model SM8550", "property ro.board.platform kalama", "load 11.2 11.0 10.9 3/4123 8211",
        *(f"core {core} most {khz}" for core, khz in enumerate([2016000] * 3 + [2803200] * 4 + [3187200])),
        "core 7 governor walt", "zone 0 type cpu-1-7", "zone 0 temp 61200", "zone 0 limit 115000", "zone 0 limit 95000",
        "zone 1 type gpuss-0", "zone 1 temp 99000", "zone 2 type cpuss-0", "zone 2 temp 63",
        "zone 3 type cpu-0-0", "zone 3 temp -274000",
        "\tTemperature{mValue=62.5, mType=0, mName=CPU0, mStatus=0}", "\tTemperature{mValue=99.0, mType=1, mName=GPU}",
        "Thermal Status: 0", "/dev/block/dm-42 112345678 1000 50000000 1% /data",
    )  # fmt: skip
    assert shown.fastest == [7, 6, 5, 4, 3, 2, 1, 0]
    assert [kind["cores"] for kind in shown.kinds] == [[7], [3, 4, 5, 6], [0, 1, 2]]
    assert (shown.celsius, shown.limit_celsius, shown.throttled, shown.governor) == (63.0, 95.0, "no", "walt")
    assert (shown.load_average, shown.free_bytes, shown.chip) == (2.0, 50_000_000 << 10, "SM8550 (kalama)")
    hidden = looked("load ", "core 0 most ", "core 1 most ", "zone 0 type ", "zone 0 temp ", "uname Linux 4 armv7l")
    assert (hidden.celsius, hidden.limit_celsius, hidden.throttled, hidden.governor) == (None, None, None, "not shown")
    assert (hidden.fastest, hidden.load_average, hidden.free_bytes) == ([1, 0], 0.0, 0)
    assert (hidden.chip, hidden.system, hidden.emulated) == ("phone", "Android ?, Linux 4 armv7l", False)
    assert looked("property ro.kernel.qemu 1").emulated


# ---- the runner's files ------------------------------------------------------------------------------------------


def test_the_result_file_is_read_as_onnxruntime_perf_test_writes_it():
    found = perf_test.results_of("hwnas,0.00041,40529920,99,0\na,b,0.0005,40529920,99,1\n")
    assert found == perf_test.Results((0.41, 0.5), 40529920)
    for text in ("", "hwnas,0.1,1,1", "hwnas,x,1,1,0", "hwnas,0.1,1,1,1", "hwnas,-1,1,1,0", "Min Latency: 0.1 s"):
        with pytest.raises(ValueError, match=r"no duration|could not convert|invalid literal"):
            perf_test.results_of(text)


def test_builds_are_told_apart_by_their_release_and_their_bytes(tmp_path: Path):
    program = written(tmp_path / "a", "program")
    library = written(tmp_path / "b", "..VERS_1.22.0..")
    assert perf_test.version_of([program, library]).startswith("1.22.0, build ")
    assert (
        perf_test.version_of([program]) != perf_test.version_of([library]) != perf_test.version_of([program, library])
    )
    assert perf_test.abi_of(Path(elf(tmp_path, 183))) == "arm64-v8a"
    assert perf_test.abi_of(Path(elf(tmp_path, 7))) == "machine 7"
    assert perf_test.abi_of(program) is None


@pytest.mark.parametrize("target", ["adb:-s", "adb:a b", "adb: x", "adbx:y z"])
def test_a_serial_number_is_no_option_and_has_no_spaces(target: str):
    with pytest.raises(HwnasError, match="a target is local or USER@HOST"):
        Entry("phone", target, runner="x")


# ---- a phone of another architecture -----------------------------------------------------------------------------


def test_the_runner_of_an_emulated_arm64_phone_runs_and_says_that_it_is_emulated(
    daemon: Daemon, reach: Callable[..., Device], tmp_path: Path
):
    if not (USERLAND / "done").exists() or not shutil.which("qemu-aarch64-static"):
        pytest.skip("no arm64 user land: apt-get install qemu-user-static; python benchmarks/arm64_userland.py")
    daemon.properties.write_text("ro.product.cpu.abilist=arm64-v8a\nro.kernel.qemu=1\n")
    daemon.environment.pop("RUNNER_SERVER")
    python = python_of(USERLAND / "root")
    script = f'#!/bin/sh\nexec {python} "${{0%/*}}/{RUNNER.name}" "$@"\n'
    device = reach(runner=str(written(tmp_path / "emulated", script)), libraries=(str(RUNNER),))
    assert device.conditions().origin == "emulated"
    assert dict(device.measure([model()], replace(QUICK, rounds=1)))[0].minimum_ms > 0
