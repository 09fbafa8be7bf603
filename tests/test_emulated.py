"""A board of another architecture without the hardware: aarch64 under QEMU, behind a real sshd on the loopback.

The user land is made by `python benchmarks/arm64_userland.py`; where it is not, these tests are skipped.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.arm64_userland import default_folder, python_of
from benchmarks.loopback import Board
from hwnas import devices, profiling, whole_networks
from hwnas.conditions import check_origin
from hwnas.devices import Device, Timing, facts_of, line_to
from hwnas.errors import HwnasError
from hwnas.latency import load_table
from hwnas.onnx_model import random_weights, to_onnx
from hwnas.opening import open_device
from hwnas.profiling import keys_of
from hwnas.registry import Entry, store
from hwnas.space import lower
from hwnas.space_toml import load_space

ONCE = Timing(rounds=1, patience_s=0.0, agreeing=1, sample_ms=0.0, least_runs=1, warm_up_runs=1, warm_up_ms=0.0)


@pytest.fixture(scope="module")
def entry(board: Board) -> Entry:
    if not (default_folder() / "done").exists() or not shutil.which("qemu-aarch64-static"):
        pytest.skip("no arm64 user land: apt-get install qemu-user-static; python benchmarks/arm64_userland.py")
    return board.entry("arm-emulated", python=python_of(default_folder() / "root"))


@pytest.fixture(scope="module")
def emulated(entry: Entry) -> Iterator[Device]:
    with Device(entry.name, line_to(entry)) as opened:
        yield opened


SMALL = """
name = "small"
input_size = 8
classes = 4
stem = { channels = 8, stride = 1, max_pool = false }
head = { channels = 16 }
[unit]
split_ratio = ["1/2"]
kernel = [3]
squeeze_excite = [false]
residual = [false]
groups = [1]
extra_depthwise = [false]
[[stage]]
depth = [1, 2]
width = [16]
"""


def models(precision: str, batch: int = 1) -> list[bytes]:
    """The smallest network of a space, and the largest one with a batch."""
    space = load_space("shufflenet-tiny")
    networks = ((lower(space, space.smallest), 1), (lower(space, space.largest), batch))
    return [
        to_onnx(network, random_weights(network, 0), batch=images, precision=precision).SerializeToString()
        for network, images in networks
    ]


def test_it_says_that_it_is_emulated_and_is_refused_where_a_real_one_is_asked_for(entry: Entry, emulated: Device):
    facts = facts_of(entry)
    assert facts["emulated"]
    assert facts["system"].endswith("aarch64")
    conditions = emulated.conditions()
    assert (conditions.origin, conditions.runtime, conditions.chip) == (
        "emulated", "ONNX Runtime CPU", "aarch64 in QEMU"
    )  # fmt: skip
    with pytest.raises(HwnasError, match="arm-emulated is emulated"):
        check_origin(conditions)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_what_networks_compute_there_agrees_with_this_machine(emulated: Device, precision: str):
    with open_device("cpu") as cpu:
        for model in models(precision):
            (there,), (here,) = emulated.outputs(model), cpu.outputs(model)
            limit = 1e-4 if precision == "fp32" else 0.05
            assert np.abs(there - here).max() <= limit * np.abs(here).max()


def test_networks_are_timed_there(emulated: Device):
    content = models("fp32", batch=4)  # 130 times the work: no noise is as long
    found = dict(emulated.measure(content, ONCE))
    assert found.keys() == {0, 1}
    assert found[1].minimum_ms > found[0].minimum_ms > 0


def test_a_profile_whose_line_is_cut_at_twenty_random_moments_ends_with_a_table_that_a_search_refuses(
    entry: Entry, emulated: Device, hwnas: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    emulated.close()  # it holds the processors
    monkeypatch.setattr(profiling, "TIMING", ONCE)
    monkeypatch.setattr(whole_networks, "TIMING", ONCE)
    monkeypatch.setattr(devices, "ATTEMPTS", 1)
    (tmp_path / "small.toml").write_text(SMALL)
    monkeypatch.setenv("HWNAS_CONFIG", str(tmp_path / "hwnas.toml"))
    store(entry, tmp_path / "hwnas.toml")
    where = ("--device", entry.name, "--space", tmp_path / "small.toml")
    rng, kills, end = random.Random(0), 0, threading.Event()

    def cut() -> None:
        nonlocal kills
        while kills < 20 and not end.wait(rng.choice((0.5, 0.5, 5.0)) * rng.random()):
            for client in clients_of(entry):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(client, signal.SIGKILL)
                    kills += 1

    cutter = threading.Thread(target=cut)
    cutter.start()
    refusals, answer = [], None
    try:
        while answer is None or kills < 20:
            done = hwnas("profile", *where, "--tables", tmp_path, "--json")
            if done.status == 0:
                answer = json.loads(done.out)
            else:
                refusals.append(done.err)
    finally:
        end.set()
        cutter.join()
    assert not [text for text in refusals if "what was finished is kept" not in text]
    assert kills >= 20
    table = load_table(Path(answer["file"]))
    space = load_space(str(tmp_path / "small.toml"))
    assert table.entries.keys() == keys_of(space).keys()
    assert (answer["origin"], table.conditions.origin) == ("emulated", "emulated")
    assert "emulated" in table.cautions
    monkeypatch.setenv("HWNAS_TABLES", str(tmp_path))
    search = hwnas("search", *where, "--budget-ms", "1e9")
    assert search.status == 2
    assert "arm-emulated is emulated" in search.err
    assert "--force" in search.err


def clients_of(entry: Entry) -> list[int]:
    """The processes of this one that run ssh to the board."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            parent = path.with_name("stat").read_text().rpartition(")")[2].split()[1]
            if words[0] == b"ssh" and entry.ssh_options[1].encode() in words and int(parent) == os.getpid():
                found.append(int(path.parent.name))
    return found
