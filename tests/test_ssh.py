"""The line to a board, over a real sshd on the loopback: what it must give, and all that can go wrong with it."""

import contextlib
import json
import os
import random
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.loopback import Board, listening_deaf, measuring_there, parent_of
from hwnas import lines, ssh
from hwnas.devices import Device, Timing, line_to
from hwnas.errors import DeviceError, DeviceLostError, UnfitDeviceError
from hwnas.network import NetworkBuilder
from hwnas.onnx_model import random_weights, to_onnx

QUICK = Timing(rounds=3, patience_s=2.0, sample_ms=0.05, least_runs=2, timeout_s=60)
ENDLESS = Timing(rounds=10**9, patience_s=1e9, agreeing=10**9, timeout_s=60)
SLACK_S = 25.0
"""How much later than its time-out a device may be lost on a busy machine: less than the other limits of the line."""


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "PAUSE_S", 0.05)


def model(channels: int = 8, side: int = 8) -> bytes:
    b = NetworkBuilder("test", (3, side, side))
    with b.unit("stem"):
        x = b.conv_bn(b.input, channels, kernel=3, activation="relu")
    network = b.build(x)
    return to_onnx(network, random_weights(network, 0)).SerializeToString()


@pytest.fixture
def reach(board: Board) -> Iterator[Callable[..., Device]]:
    """Opens the board with changes of its entry in the registry."""
    devices: list[Device] = []

    def open_board(**changes: object) -> Device:
        entry = board.entry(**changes)
        devices.append(Device(entry.name, line_to(entry)))
        return devices[-1]

    yield open_board
    for device in devices:
        device.close()


def with_module(folder: Path, name: str, text: str) -> str:
    """A command that runs this Python with a module of ours before all others."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(text)
    return f"env PYTHONPATH={shlex.quote(str(folder))} {shlex.quote(sys.executable)}"


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def start_endless(board: Board, device: Device) -> Iterator[object]:
    """Begins a measurement that would never end, and waits until the board is at it."""
    answers = device.measure([model()], ENDLESS)
    until(lambda: measuring_there(board))
    return answers


def test_a_board_answers_as_this_machine_does_and_keeps_the_models(board: Board, reach: Callable[..., Device]):
    device = reach(cores=(0,))
    conditions = device.conditions()
    assert (conditions.device, conditions.cores, conditions.origin) == ("board", 1, "measured")
    large = model(512, side=64)  # more than 2000 times the work of the others: no noise is as long
    results = dict(device.measure([model(8), large, model(16)], QUICK))
    assert sorted(results) == [0, 1, 2]
    assert results[1].minimum_ms > max(results[0].minimum_ms, results[2].minimum_ms) > 0
    kept = {path.name: path.stat().st_mtime_ns for path in (board.folder / "files").iterdir()}
    dict(device.measure([large, model(8)], QUICK))
    device.close()
    assert len(dict(device.measure([model(16)], QUICK))) == 1
    assert {path.name for path in (board.folder / "files").iterdir()} == kept.keys()
    ((_, memory_bytes),) = device.peak_memory([model()], QUICK)
    assert memory_bytes > 1e6


def test_a_file_that_is_spoilt_on_the_board_is_sent_again(board: Board, reach: Callable[..., Device]):
    device = reach()
    content = model(24)
    (name,) = device.line.placed([_file(board, content)])
    Path(name).write_bytes(content[:-1])
    assert len(dict(device.measure([content], QUICK))) == 1
    assert Path(name).read_bytes() == content


def _file(board: Board, content: bytes) -> Path:
    path = board.folder / "some.onnx"
    path.write_bytes(content)
    return path


def test_a_model_that_does_not_run_there_is_named_after_the_others_were_timed(reach: Callable[..., Device]):
    results = []
    with pytest.raises(DeviceError, match=r"1 of 2 models do not run on board: 0\.onnx"):
        results.extend(reach().measure([b"no model", model()], QUICK))
    assert [index for index, _ in results] == [1]


def test_the_talk_of_a_login_shell_is_no_answer(board: Board, reach: Callable[..., Device]):
    talks = board.configure("c0", key="talks")
    assert len(dict(reach(ssh_options=talks).measure([model()], QUICK))) == 1


def test_a_board_is_added_by_one_command_listed_and_checked_and_one_that_cannot_measure_is_not(
    board: Board, hwnas: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tmp_path / "boards.toml"
    monkeypatch.setenv("HWNAS_CONFIG", "")
    monkeypatch.setattr("hwnas.ssh.OPTIONS", (*ssh.OPTIONS, "-F", str(board.folder / "client")))
    words = ("--config", config, "devices")
    folder = ("--folder", board.folder / "files")
    bare = with_module(tmp_path / "bare", "onnxruntime", NO_PACKAGE)
    refused = hwnas(*words, "add", "arm", "board", "--python", bare, *folder)
    assert refused.status == 2
    assert "is not registered" in refused.err
    assert not config.exists()
    added = hwnas(*words, "add", "arm", "board", "--python", sys.executable, "--notes", "here", *folder)
    assert added.status == 0, added.err
    assert "anchor network" in added.out
    assert added.out.endswith("hwnas profile --device arm\n")
    listed = hwnas(*words).out
    assert "ONNX Runtime CPU" in listed.splitlines()[0]
    assert listed.startswith("arm ")
    checked = json.loads(hwnas(*words, "check", "arm", "--json").out)
    assert checked["can_measure"]
    assert {"reached", "numpy", "onnxruntime", "free disk", "anchor network"} <= {
        f["what"] for f in checked["findings"]
    }
    dead = hwnas(*words, "add", "x", "nobody@no-such-host.invalid", "--json")
    assert (dead.status, json.loads(dead.out)["can_measure"]) == (2, False)


# ---- nothing is left behind --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["killed", "closed", "stopped"])
def test_nothing_runs_on_the_board_after_the_line_is_cut(
    board: Board, reach: Callable[..., Device], how: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ssh, "SILENCE_S", 4.0)
    monkeypatch.setattr(ssh, "ALIVE_S", 0.2)
    device = reach()
    start_endless(board, device)
    if how == "stopped":
        time.sleep(6.0)
        assert measuring_there(board)  # it goes on while the line lives
    client = device.line.process_id
    assert client
    if how == "closed":
        device.close()
    else:
        os.kill(client, signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    until(lambda: not measuring_there(board))


def test_if_the_agent_is_killed_what_it_started_ends_too(board: Board, reach: Callable[..., Device]):
    answers = start_endless(board, reach())
    (child,) = measuring_there(board)
    os.kill(parent_of(child), signal.SIGKILL)
    until(lambda: child not in measuring_there(board))
    del answers


# ---- what can go wrong -------------------------------------------------------------------------------------------


def test_a_line_cut_at_twenty_random_moments_gives_the_same_set_of_results(reach: Callable[..., Device]):
    device, rng, kills = reach(), random.Random(0), 0
    models = {channels: model(channels) for channels in range(8, 20)}
    found: dict[int, float] = {}
    end = threading.Event()

    def cut() -> None:
        nonlocal kills
        while kills < 20:
            end.wait(rng.uniform(0.05, 1.0))
            if (client := device.line.process_id) is not None:
                try:
                    os.kill(client, signal.SIGKILL)
                    kills += 1
                except ProcessLookupError:
                    continue

    cutter = threading.Thread(target=cut)
    cutter.start()
    try:
        while kills < 20 or len(found) < len(models):
            left = [channels for channels in models if channels not in found] or [8]
            try:
                for index, measurement in device.measure([models[channels] for channels in left], QUICK):
                    found[left[index]] = measurement.median_ms
            except DeviceLostError:
                continue  # more than three cuts in one request
    finally:
        kills = max(kills, 20)
        end.set()
        cutter.join()
    assert found.keys() == models.keys()
    assert all(latency_ms > 0 for latency_ms in found.values())


@pytest.mark.parametrize(("first", "spoil"), [(1, "(sed -u ${n}q; kill -9 0)"), (2, "sed -u ${n}s/.*/garbage/")])
def test_whichever_message_is_lost_or_spoilt_the_results_are_complete_in_the_end(
    reach: Callable[..., Device], tmp_path: Path, first: int, spoil: str
):
    python, count = tmp_path / "python", tmp_path / "count"
    count.write_text(str(first))
    python.write_text(  # of each further connection one more message comes through
        f'#!/bin/sh\nn=$(cat {count}); echo $((n + 1)) > {count}\n{sys.executable} "$@" | {spoil}\n'
    )
    python.chmod(0o755)
    device, models = reach(python=str(python)), {channels: model(channels) for channels in (8, 12, 16)}
    found: dict[int, float] = {}
    for _ in range(20):
        left = [channels for channels in models if channels not in found]
        try:
            for index, measurement in device.measure([models[channels] for channels in left], QUICK):
                found[left[index]] = measurement.median_ms
            break
        except DeviceLostError:
            continue
    assert found.keys() == models.keys()
    assert int(count.read_text()) >= len(["ready", "missing", "held", "held", "held", "held", "missing", "held"])


OLD = "import sys; sys.version_info = (3, 7, 3); sys.version = '3.7.3 (old)'"
NO_PACKAGE = "raise ModuleNotFoundError(\"No module named 'onnxruntime'\")"

UNFIT = {
    "wrong Python": (lambda board, folder: {"python": with_module(folder, "sitecustomize", OLD)}, "python", "3.7.3"),
    "no Python": (lambda board, folder: {"python": "/nowhere/python3"}, "python", "/nowhere/python3"),
    "no onnxruntime": (
        lambda board, folder: {"python": with_module(folder, "onnxruntime", NO_PACKAGE)},
        "packages",
        r"onnxruntime is not installed\. Install.* '.*python -m pip install numpy onnxruntime'",
    ),
    "no numpy": (
        lambda board, folder: {"python": with_module(folder, "numpy", NO_PACKAGE.replace("onnxruntime", "numpy"))},
        "packages",
        "No module named 'numpy'",
    ),
    "no OpenVINO": (
        lambda board, folder: {
            "python": with_module(folder, "openvino", NO_PACKAGE.replace("onnxruntime", "openvino")),
            "runtime": "openvino",
        },
        "packages",
        r"openvino is not installed\. Install.* '.*python -m pip install numpy openvino'",
    ),
    "disk full": (
        lambda board, folder: {"python": f"prlimit --fsize=2000 {sys.executable}", "folder": str(folder / "full")},
        "disk",
        "File too large",
    ),
    "no right to write": (lambda board, folder: {"folder": "/proc/hwnas"}, "disk", "/proc/hwnas"),
    "processors that are not there": (lambda board, folder: {"cores": (0, 4095)}, "cores", "4095"),
    "strange host key": (
        lambda board, folder: {"ssh_options": board.configure("c1", known="strange")},
        "host key",
        "accept its key: ssh -F .* board",
    ),
    "strange user": (lambda board, folder: {"ssh_options": board.configure("c2", key="other")}, "login", "ssh-copy-id"),
    "no such host": (
        lambda board, folder: {"target": "no-such-host.invalid", "ssh_options": ()},
        "unreachable",
        "is on",
    ),
}


@pytest.mark.parametrize("what", UNFIT)
def test_what_a_person_must_mend_is_said_at_once_with_the_command(
    board: Board, reach: Callable[..., Device], tmp_path: Path, what: str
):
    changes, fault, text = UNFIT[what]
    began = time.monotonic()
    with pytest.raises(UnfitDeviceError, match=text) as caught:
        reach(**changes(board, tmp_path / "other")).conditions()
    assert caught.value.fault == fault
    assert time.monotonic() - began < 30


def test_a_measuring_process_that_the_system_kills_is_said_to_lack_memory(board: Board, reach: Callable[..., Device]):
    answers = start_endless(board, reach())
    (child,) = measuring_there(board)
    os.kill(child, signal.SIGKILL)
    with pytest.raises(UnfitDeviceError, match="was killed") as caught:
        list(answers)
    assert caught.value.fault == "memory"


def test_two_who_measure_on_one_processor_are_told_apart(board: Board, reach: Callable[..., Device]):
    first, second, elsewhere = reach(), reach(cores=(0,)), reach(cores=(0,))
    first.conditions()
    with pytest.raises(
        UnfitDeviceError, match=rf"processor 0 is being measured on by process \d+ of user {os.getuid()}"
    ):
        second.conditions()
    first.close()
    assert elsewhere.conditions().cores == 1  # it waits a moment for the first to end


@pytest.mark.parametrize(
    "says",
    [
        "sleep 1000",
        'echo \'{"hwnas agent ready": "/tmp"}\'; sleep 1000',
        'echo \'{"hwnas agent ready": "/tmp"}\'; echo garbage; sleep 1000',
        'echo \'{"hwnas agent ready": "/tmp"}\'; echo 7; sleep 1000',
        "yes",
        "exit 3",
    ],
)
def test_silence_and_nonsense_end_within_the_time_out(reach: Callable[..., Device], tmp_path: Path, says: str):
    (tmp_path / "says").write_text(says)
    with ends_within(3.0):
        dict(reach(python=f"sh {tmp_path / 'says'}").measure([model()], Timing(timeout_s=3.0)))


@pytest.fixture
def deaf_port() -> Iterator[int]:
    with listening_deaf() as port:
        yield port


@contextlib.contextmanager
def ends_within(timeout_s: float) -> Iterator[None]:
    """What is done inside loses the device at its time-out, and long before any other limit would end it."""
    began = time.monotonic()
    with pytest.raises(DeviceLostError, match="what was finished is kept"):
        yield
    assert time.monotonic() - began < timeout_s + SLACK_S


def test_a_board_that_takes_the_connection_and_says_nothing_blocks_no_longer_than_its_time_out(
    board: Board, reach: Callable[..., Device], deaf_port: int
):
    device = reach(ssh_options=board.configure("c3", port=deaf_port))
    with ends_within(2.0):
        dict(device.measure([model()], Timing(timeout_s=2.0)))


def test_a_board_that_is_gone_at_the_start_blocks_no_longer_than_its_time_out(
    board: Board, reach: Callable[..., Device]
):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = closed.getsockname()[1]
    device = reach(ssh_options=board.configure("c4", port=nobody))
    with ends_within(2.0):
        dict(device.measure([model()], Timing(timeout_s=2.0)))


@pytest.mark.parametrize("then", ["is deaf", "is gone"])
def test_a_board_that_stops_in_the_middle_of_a_group_blocks_no_longer_than_its_time_out(
    board: Board, reach: Callable[..., Device], deaf_port: int, then: str
):
    device = reach(ssh_options=board.configure("c5"))
    device.conditions()
    (child,) = measuring_there(board)
    stopped = [child, parent_of(child)]
    answers = device.measure([model()], replace(ENDLESS, timeout_s=3.0))
    time.sleep(1.0)
    try:
        for process in stopped:
            os.kill(process, signal.SIGSTOP)
        board.configure("c5", port=deaf_port if then == "is deaf" else 1)
        with ends_within(3.0):
            dict(answers)
    finally:
        for process in stopped:
            os.kill(process, signal.SIGKILL)


def test_a_measuring_process_that_hangs_is_given_up_and_the_next_request_starts_another(
    board: Board, reach: Callable[..., Device]
):
    device = reach()
    device.conditions()
    (child,) = measuring_there(board)
    os.kill(child, signal.SIGSTOP)
    with pytest.raises(DeviceLostError, match=r"has not (answered|taken a file) for"):
        dict(device.measure([model()], Timing(timeout_s=1.0)))
    until(lambda: child not in measuring_there(board))
    assert len(dict(device.measure([model()], QUICK))) == 1


def test_a_clock_that_jumps_on_the_board_changes_nothing(reach: Callable[..., Device], tmp_path: Path):
    jumping = "import random, time; time.time = lambda: random.uniform(-1e9, 1e10)"
    device = reach(python=with_module(tmp_path / "jumping", "sitecustomize", jumping))
    assert len(dict(device.measure([model()], QUICK))) == 1
