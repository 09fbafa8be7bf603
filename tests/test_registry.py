"""The registry of devices: what is written is read again, whose file counts, and what the doctor makes of facts."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from hwnas import devices, opening, registry, stages
from hwnas.conditions import Conditions, profile_command
from hwnas.doctor import findings
from hwnas.errors import HwnasError
from hwnas.registry import Entry, read, store
from hwnas.runtimes import GPU_RUNTIMES, RUNTIMES

FULL = Entry(
    "board-2.local", "pi@board:2222", ("-J", "gate"), "'my python/bin/python3' -X utf8", "/media/x", "openvino", 4,
    (4, 5), 'with a "fan" ü', "ARM",
)  # fmt: skip


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "some/hwnas.toml"
    monkeypatch.setenv(registry.CONFIG, str(path))
    return path


def test_a_device_is_read_as_it_was_written_and_the_rest_of_the_file_stays(config: Path):
    store(FULL, config)
    store(Entry("arm", "local"), config)
    config.write_text("# mine\n" + config.read_text().replace("[devices.arm]", "# hers\n[ devices . 'arm' ]"))
    assert read(config) == {"board-2.local": FULL, "arm": Entry("arm", "local")}
    changed = dataclasses.replace(FULL, threads=1, cores=())
    farm = Entry("lab", boards=("arm", "board-2.local"), threads=2, notes="on the shelf")
    store(changed, config)
    store(Entry("arm", "pi@[::1]:22"), config)
    store(farm, config)
    assert read(config) == {"board-2.local": changed, "arm": Entry("arm", "pi@[::1]:22"), "lab": farm}
    assert config.read_text().startswith("# mine\n")


def test_what_is_written_in_another_form_is_not_spoilt(config: Path):
    config.parent.mkdir()
    config.write_text('[devices]\narm = {target = "a"}\n')
    with pytest.raises(HwnasError, match=r"cannot be put into .*Add by hand:\n\[devices\.arm\]"):
        store(Entry("arm", "b"), config)
    assert read(config) == {"arm": Entry("arm", "a")}


def test_the_project_s_file_comes_before_the_user_s_and_a_named_one_before_both(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store(Entry("arm", "named"), config)
    assert registry.registered() == {"arm": (Entry("arm", "named"), config)}
    monkeypatch.delenv(registry.CONFIG)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "user"))
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "user/hwnas/hwnas.toml"
    assert registry.files() == (home,)
    store(Entry("arm", "user"), home)
    store(Entry("arm2", "user"), home)
    store(Entry("arm", "project"), Path("hwnas.toml"))
    assert {name: entry.target for name, (entry, _) in registry.registered().items()} == {
        "arm": "project", "arm2": "user"
    }  # fmt: skip


MISTAKES = {
    "not TOML": ("[devices.arm", "cannot be read"),
    "something else": ("[boards.arm]\ntarget = 'x'", r"tables for devices.*boards"),
    "no target": ("[devices.arm]\nthreads = 1", "does not say where it is"),
    "no such field": ("[devices.arm]\ntarget = 'x'\nport = 22", "has 'port'; it can have target"),
    "a wrong kind": ("[devices.arm]\ntarget = 'x'\nthreads = '4'", "threads of the device 'arm' is a int; it is '4'"),
    "a wrong list": ("[devices.arm]\ntarget = 'x'\ncores = ['a']", "is a list of int"),
    "an option for a target": ("[devices.arm]\ntarget = '-oProxyCommand=x'", "a target is local or USER@HOST"),
    "two words for a target": ("[devices.arm]\ntarget = 'pi@board rm'", "a target is local or USER@HOST"),
    "no runtime": ("[devices.arm]\ntarget = 'x'\nruntime = 'tvm'", "runtime of the device 'arm' is one of cpu"),
    "a farm that has a target": ("[devices.lab]\nboards = ['a', 'b']\ntarget = 'x'", "has boards: say target of each"),
    "a farm of one board": ("[devices.lab]\nboards = ['a']", "two or more other devices; they are \\['a'\\]"),
    "a farm of one board twice": ("[devices.lab]\nboards = ['a', 'a']", "two or more other devices"),
    "a farm of farms": (
        "[devices]\na.target = 'x'\nb.target = 'y'\nlab.boards = ['a', 'b']\narm.boards = ['a', 'lab']",
        "boards of 'arm' are devices, not farms; 'lab' has boards itself",
    ),
    "a farm of what is not there": ("[devices.arm]\nboards = ['cpu', 'b']", "There is no device 'b'"),
    "a quote that never ends": ("[devices.arm]\ntarget = 'x'\npython = '\"'", "no shell can read its python"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_in_the_file_is_one_message_that_names_it(config: Path, what: str):
    content, text = MISTAKES[what]
    config.parent.mkdir()
    config.write_text(content)
    with pytest.raises(HwnasError, match=text):
        opening.open_device("arm")


def test_arm_is_this_machine_or_what_is_registered_or_three_ways_to_go_on(
    config: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert devices.entry_of("arm") == Entry("cpu", "local", runtime="cpu")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with pytest.raises(
        HwnasError, match=r"Four ways to go on:\n.*hwnas devices add arm .*\n.*adb:SERIAL.*\n.*\n.*emulated"
    ):
        opening.open_device("arm")
    store(Entry("arm", "pi@board", threads=4), config)
    assert devices.entry_of("arm").target == "pi@board"
    assert (devices.threads_of("arm", None), devices.threads_of("arm", 2), devices.threads_of("cpu", None)) == (4, 2, 1)
    with pytest.raises(HwnasError, match="hwnas devices add phone USER@HOST"):
        opening.open_device("phone")


def test_a_search_refuses_an_emulated_device_before_it_measures_anything():
    conditions = Conditions("arm", "c", 1, "r", "1", 1, 1, "fp32", "g", "s", origin="emulated")

    class Emulated:
        def conditions(self, *settings: Any) -> Conditions:
            return conditions

    class Job:
        threads, batch, precision, force = 1, 1, "fp32", False

    with pytest.raises(HwnasError, match=r"arm is emulated: .* --force"):
        stages.latency_table(Job(), Emulated())  # pyright: ignore[reportArgumentType]


GOOD = {
    "system": "Linux 6 aarch64", "chip": "ARM 0x41 0xd0b", "board": "Raspberry Pi 5", "emulated": False,
    "python": "3.11.2", "packages": {"numpy": "2", "onnxruntime": "1.27"}, "free_bytes": 9 << 30,
    "kinds": [{"megahertz": 2400.0, "cores": [0, 1, 2, 3]}], "governor": "performance", "celsius": 45.0,
    "slows_down_at_celsius": 80.0, "throttled": "no", "load_average": 0.1,
}  # fmt: skip

FAULTS = {
    "emulated": ({"emulated": True}, "real board"),
    "onnxruntime": ({"packages": {"onnxruntime": ""}}, "ssh -p 22 pi@board 'env/bin/python -m pip install numpy onnx"),
    "free disk": ({"free_bytes": 1 << 20}, "ssh -p 22 pi@board 'du "),
    "processors": ({"kinds": [*GOOD["kinds"], {"megahertz": 1000.0, "cores": [4]}]}, "cores = [0, 1, 2, 3]"),
    "governor": ({"governor": "ondemand"}, "ssh -p 22 pi@board 'echo performance | sudo tee /sys/"),
    "temperature": ({"celsius": 75.0}, "fan"),
    "throttling": ({"throttled": "under-voltage"}, "supply"),
    "load": ({"load_average": 3.0}, "ssh -p 22 pi@board 'ps "),
}


def test_the_doctor_has_something_to_say_of_each_fault_and_of_no_other():
    entry = Entry("arm", "pi@board:22", python="env/bin/python")
    assert [finding.what for finding in findings(entry, GOOD) if finding.mend] == []
    for what, (change, mend) in FAULTS.items():
        (found,) = [finding for finding in findings(entry, GOOD | change) if finding.mend]
        assert found.what == what
        assert mend in found.mend
        assert found.fatal == (what == "onnxruntime")


def test_a_gpu_is_measured_at_the_paper_s_batch_of_8_unless_another_is_asked_for(config: Path):
    store(Entry("jetson", "me@jetson", runtime="tensorrt"), config)
    store(Entry("jetson2", "me@jetson2", runtime="tensorrt"), config)
    store(Entry("jetsons", boards=("jetson", "jetson2")), config)
    asked = ("cpu", "openvino", "gpu", "cuda", "xla-gpu", "jetson", "jetsons")
    assert [devices.batch_of(name, None) for name in asked] == [1, 1, 8, 8, 8, 8, 8]
    assert devices.batch_of("gpu", 1) == 1
    assert {name for name, what in RUNTIMES.items() if "GPU" in what} == set(GPU_RUNTIMES)
    conditions = Conditions("jetson", "c", 1, "ONNX Runtime TensorRT", "1", 1, 1, "fp32", "g", "s")
    assert profile_command("s", conditions) == "hwnas profile --device jetson --space s --batch 1"
    assert profile_command("s", dataclasses.replace(conditions, batch=8)) == "hwnas profile --device jetson --space s"
    on_processor = dataclasses.replace(conditions, runtime="ONNX Runtime CPU")
    assert profile_command("s", on_processor) == "hwnas profile --device jetson --space s"
