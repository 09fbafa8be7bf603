"""Farms: boards of a kind that measure together, simulated ones and ones behind a real sshd; and how they disagree."""

import json
import os
import shlex
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import steady_board
from simulated import SimulatedDevice, SimulatedMachine
from test_profiling import SPACE
from test_ssh import ENDLESS, model, until

from benchmarks.loopback import Board
from hwnas import farm as farms
from hwnas import lines, memory_profiling
from hwnas.devices import Device, Timing, boards_of, line_to
from hwnas.errors import DeviceError, DeviceLostError, HwnasError
from hwnas.farm import Farm
from hwnas.latency import Entry, load_table
from hwnas.opening import open_device
from hwnas.profiling import profile
from hwnas.registry import Entry as Registered
from hwnas.registry import store
from hwnas.relation import related, relation
from hwnas.space_toml import parse_space

QUICK = Timing(rounds=3, patience_s=2.0, sample_ms=0.05, least_runs=2, timeout_s=60)
SMALL = SPACE.replace("[3, 5]", "[3]").replace("[false, true]", "[false]").replace("[64, 128]", "[64]")
MODELS = [model(channels) for channels in (8, 16, 24)]


# ---- who agrees --------------------------------------------------------------------------------------------------


def test_a_board_s_factor_is_the_median_over_the_networks_to_the_median_board():
    found = related({"a": (1.0, 10.0, 4.0), "b": (1.02, 10.2, 4.08), "c": (0.95, 9.5, 3.8)})
    assert {name: one.factor for name, one in found.items()} == pytest.approx({"a": 1.0, "b": 1.02, "c": 0.95})
    assert all(one.scatter < 1e-9 and not one.left_out for one in found.values())
    assert relation("d", (1.0, 1.02, 1.1), (1.0, 1.0, 1.0)).scatter == pytest.approx((0.02 / 1.02 + 0.08 / 1.02) / 3)


def test_boards_that_disagree_are_left_out_the_strangest_first_and_the_others_are_related_anew():
    found = related({"a": (1.0, 1.0), "slow": (2.0, 2.0), "b": (1.04, 1.04), "fast": (0.5, 0.5), "c": (1.0, 1.0)})
    assert {name for name, one in found.items() if one.left_out} == {"slow", "fast"}
    assert found["slow"].factor == pytest.approx(2.0)
    assert [found[name].factor for name in "abc"] == pytest.approx([1.0, 1.04, 1.0])
    assert "2 networks take 2 to 2 times as long there as on the median one: 2, 2 ms and not 1, 1" in (
        found["slow"].left_out
    )
    odd = related({"a": (1.0, 1.0, 1.0), "b": (1.0, 1.0, 1.0), "c": (1.0, 1.2, 0.8)})["c"]
    assert odd.factor == pytest.approx(1.0)
    assert "0.8 to 1.2 times" in odd.left_out


@pytest.mark.parametrize("factors", [(1.0, 1.3), (1.0, 1.0, 1.3, 1.3)])
def test_if_no_more_than_half_agree_nobody_can_tell_who_is_right(factors: tuple[float, ...]):
    with pytest.raises(HwnasError, match=r"More than half .* board0 1, 2 ms; .*1\.3, 2\.6 ms"):
        related({f"board{index}": (factor, 2 * factor) for index, factor in enumerate(factors)})


# ---- simulated boards --------------------------------------------------------------------------------------------


class SlowMachine(SimulatedMachine):
    """One that takes so many times as long for every model."""

    def __init__(self, factor: float, **disturbed: Any) -> None:
        super().__init__(**disturbed)
        self.factor = factor

    def model_ms(self, content: bytes) -> float:
        return self.factor * super().model_ms(content)


def simulated(*machines: SimulatedMachine, on_note: Callable[[str], None] = lambda text: None) -> Farm:
    return Farm("lab", [SimulatedDevice(machine, f"pi{n}") for n, machine in enumerate(machines, 1)], on_note)


def test_what_a_board_measures_is_told_as_the_median_board_would_take():
    with simulated(*(SlowMachine(factor, seed=n) for n, factor in enumerate((1.0, 1.06, 0.95)))) as farm:
        groups = [farm.measure(MODELS) for _ in range(farm.at_once)] + [farm.measure(MODELS) for _ in range(4)]
        found = [dict(results) for results in groups]
        steadily = farm.measure_steadily(MODELS * 15)
        relations = {one.board: one for one in farm.relations}
    truth = [SimulatedMachine().model_ms(content) for content in MODELS]
    for results in found:
        assert [results[index].median_ms for index in range(3)] == pytest.approx(truth, rel=0.02)
    assert [steadily[index].median_ms for index in range(45)] == pytest.approx(truth * 15, rel=0.02)
    assert [relations[f"pi{n}"].factor for n in (1, 2, 3)] == pytest.approx([1.0, 1.06, 0.95], rel=0.01)
    assert sum(one.timed for one in relations.values()) == 8 * 3 + 45
    assert min(one.timed for one in relations.values()) >= 15
    assert len(farm.groups) == 8 + 3
    assert farm.anchor_ms == pytest.approx(SimulatedMachine().model_ms(farms.anchor_model()), rel=0.02)


def test_a_board_that_disagrees_is_named_and_measures_nothing():
    said: list[str] = []
    with simulated(SlowMachine(1.0), SlowMachine(2.0), SlowMachine(1.0, seed=1), on_note=said.append) as farm:
        assert len(dict(farm.measure(MODELS))) == 3
        odd = next(one for one in farm.relations if one.board == "pi2")
    assert (odd.timed, odd.factor) == (0, pytest.approx(2.0, rel=0.02))
    assert len(said) == 1
    assert said[0].startswith("lab goes on without its board pi2: 5 networks take 1.9")


def test_a_board_that_was_slow_when_it_was_related_is_related_again():
    hot = SlowMachine(1.0, throttle=lambda second: 1.09 if second < 60 else 1.0)
    with simulated(hot, SlowMachine(1.0, seed=1), SlowMachine(1.0, seed=2)) as farm:
        assert farm.relate()[0].factor == pytest.approx(1.09, rel=0.02)
        hot.now_ns = 61e9
        for _ in range(6):
            dict(farm.measure(MODELS))
        relations = farm.relations
    assert [one.factor for one in relations] == pytest.approx([1.0] * 3, rel=0.02)
    assert all(one.timed == 6 for one in relations)


def test_a_farm_that_is_slower_than_for_its_table_tells_the_pace():
    slow = [SlowMachine(factor, seed=n, throttle=lambda second: 1.3) for n, factor in enumerate((1.0, 1.06, 0.95))]
    truth = [SimulatedMachine().model_ms(content) for content in (farms.anchor_model(), *MODELS)]
    with simulated(*slow) as farm:
        farm.anchor_ms = truth[0]
        found = dict(farm.measure(MODELS))
    assert [found[index].pace for index in range(3)] == pytest.approx([1.3] * 3, rel=0.02)
    assert [found[index].at_usual_pace().median_ms for index in range(3)] == pytest.approx(truth[1:], rel=0.03)


def test_models_that_do_not_run_are_told_after_the_others_were_timed():
    with simulated(SlowMachine(1.0), SlowMachine(1.0, seed=1)) as farm:
        results = []
        with pytest.raises(DeviceError, match=r"1 of 3 models do not run on pi\d: 1\.onnx"):
            results.extend(farm.measure([MODELS[0], b"no model", MODELS[1]]))
        assert [index for index, _ in results] == [0, 2]
        assert len(dict(farm.measure(MODELS))) == 3
        assert not any(one.left_out for one in farm.relations)


def test_a_table_from_a_farm_says_who_measured_it(tmp_path: Path):
    said: list[str] = []
    space = parse_space(SPACE)
    machines = (SlowMachine(1.0), SlowMachine(1.05, seed=1), SlowMachine(1.4, seed=2), SlowMachine(0.97, seed=3))
    with simulated(*machines, on_note=said.append) as farm:
        table = profile(space, farm, folder=tmp_path)
    alone = profile(space, SimulatedDevice(SimulatedMachine()), folder=tmp_path)
    assert load_table(tmp_path / "lab/made-up-fp32-t1-b1.json") == table
    assert [one.board for one in table.boards if one.left_out] == ["pi3"]
    assert all(one.timed > 30 for one in table.boards if not one.left_out)
    for key, entry in table.entries.items():
        if isinstance(entry, Entry):
            assert entry.latency_ms == pytest.approx(alone.entries[key].latency_ms, rel=0.15)
    assert table.calibration.mean_absolute_error < 0.02


# ---- boards behind an sshd ---------------------------------------------------------------------------------------


class Lab:
    """Boards of this machine in a registry of their own, each of which can be taken from the network."""

    def __init__(self, server: Board) -> None:
        self.server = server

    def add(self, name: str, factor: float = 1.0, chip: str = "Cortex", pause_s: float = 0.0) -> None:
        python = shlex.join(
            [sys.executable, steady_board.__file__, str(factor), str(1000 + ord(name[-1])), chip, str(pause_s)]
        )
        folder = str(self.server.folder / f"files-{name}")
        entry = self.server.entry(name, python=python, folder=folder, ssh_options=self.server.configure(name))
        store(entry, Path(os.environ["HWNAS_CONFIG"]))

    def farm(self, *names: str, **options: Any) -> Farm:
        boards = boards_of(Registered("lab", boards=names))
        return Farm("lab", [Device(board.name, line_to(board)) for board in boards], **options)

    def take_away(self, board: Device) -> None:
        """Cuts a board's line, and nobody answers there any more."""
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            self.server.configure(board.name, port=closed.getsockname()[1])
        if client := board.line.process_id:
            os.killpg(client, signal.SIGKILL)


@pytest.fixture
def lab(board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setenv("HWNAS_CONFIG", str(tmp_path / "hwnas.toml"))
    monkeypatch.setattr(lines, "PAUSE_S", 0.05)
    monkeypatch.setattr(memory_profiling, "FITTED", 4)
    monkeypatch.setattr(memory_profiling, "HELD_OUT", 4)
    return Lab(board)


def test_a_board_lost_in_the_middle_costs_what_it_was_timing_and_is_named(lab: Lab, tmp_path: Path):
    for name, factor in (("pi1", 1.0), ("pi2", 1.04), ("pi3", 0.97)):
        lab.add(name, factor, pause_s=0.3)
    said: list[str] = []
    space, lost, before = parse_space(SPACE), [], {}

    def on_progress(done: int, total: int, what: str) -> None:
        if not lost:
            lost.append(what)
            before.update({one.board: one.timed for one in farm.relations})
            lab.take_away(farm._boards["pi2"])

    with lab.farm("pi1", "pi2", "pi3", on_note=said.append) as farm:
        table = profile(space, farm, folder=tmp_path, on_progress=on_progress)
        names = [*farm._boards]
    assert sorted(names) == ["pi1", "pi3"]
    assert len(said) == 1
    assert said[0].startswith("lab goes on without its board pi2: ")
    boards = {one.board: one for one in table.boards}
    assert boards["pi2"].left_out
    assert boards["pi2"].timed <= before["pi2"] + 12  # what it had finished before the news of the first group came
    assert boards["pi2"].factor == pytest.approx(1.04, rel=0.02)
    assert min(boards["pi1"].timed, boards["pi3"].timed) > 30
    assert load_table(tmp_path / "lab/made-up-fp32-t1-b1.json") == table
    assert table.calibration.mean_absolute_error < 0.02


def test_when_all_boards_are_lost_what_was_finished_is_kept_and_the_same_command_goes_on(lab: Lab, tmp_path: Path):
    for name in ("pi1", "pi2"):
        lab.add(name, pause_s=0.3)
    space, kept = parse_space(SMALL), []

    def on_progress(done: int, total: int, what: str) -> None:
        kept.append(what)
        for board in [*farm._boards.values()]:
            lab.take_away(board)

    with (
        lab.farm("pi1", "pi2") as farm,
        pytest.raises(DeviceLostError, match=r"lab has no board left\. pi1: .*; pi2: .*what was finished is kept"),
    ):
        profile(space, farm, folder=tmp_path, on_progress=on_progress)
    journal = tmp_path / "lab/made-up-fp32-t1-b1.journal"
    finished = journal.read_text().splitlines()[1:]
    assert len(kept) <= len(finished) > 0
    lab.add("pi1")
    lab.add("pi2")
    calls = []
    with lab.farm("pi1", "pi2") as farm:
        table = profile(space, farm, folder=tmp_path, on_progress=lambda *call: calls.append(call))
    assert calls[0][0] == len(finished) + 1
    assert {json.loads(line)["key"] for line in finished} <= table.entries.keys()


def test_a_board_that_is_gone_at_the_start_is_named_and_the_others_measure(lab: Lab):
    for name in ("pi1", "pi2", "pi3"):
        lab.add(name)
    said: list[str] = []
    with lab.farm("pi1", "pi2", "pi3", on_note=said.append) as farm:
        lab.take_away(farm._boards["pi3"])
        assert farm.conditions().device == "lab"
        assert len(dict(farm.measure(MODELS, QUICK))) == 3
        ((_, memory_bytes),) = farm.peak_memory(MODELS[:1], QUICK)
        assert memory_bytes > 1e6
        assert farm.outputs(MODELS[0])[0].size
    assert len(said) == 1
    assert "without its board pi3" in said[0]


def test_boards_of_another_kind_are_refused_by_name(lab: Lab):
    lab.add("pi1")
    lab.add("pi2", chip="Neoverse")
    with (
        lab.farm("pi1", "pi2") as farm,
        pytest.raises(HwnasError, match=r"pi1 and pi2 of lab differ \(chip: 'Cortex' and 'Neoverse'\)"),
    ):
        farm.conditions()


def test_closing_ends_what_the_boards_are_doing_and_nothing_is_left_there(lab: Lab):
    for name in ("pi1", "pi2"):
        lab.add(name)
    with lab.farm("pi1", "pi2") as farm:
        farm.relate()
        groups = [farm.measure(MODELS, ENDLESS) for _ in range(8)]
        until(lambda: not farm._free)
    for results in groups:
        with pytest.raises(DeviceLostError):
            dict(results)
    until(lambda: not [path for path in Path("/proc").glob("[0-9]*/cmdline") if _names(path, "files-pi")])


def _names(path: Path, text: str) -> bool:
    try:
        return text in path.read_text() and ".pyz" in path.read_text()
    except OSError:
        return False


def test_the_command_line_adds_lists_checks_and_profiles_a_farm(lab: Lab, hwnas: Any, tmp_path: Path):
    for name, factor in (("pi1", 1.0), ("pi2", 1.5), ("pi3", 1.02)):
        lab.add(name, factor)
    assert hwnas("devices", "add", "lab", "--boards", "pi1").status == 2
    assert "two or more" in hwnas("devices", "add", "lab", "--boards", "pi1,pi1").err
    assert "no device 'pi9'" in hwnas("devices", "add", "lab", "--boards", "pi1,pi9").err
    refused = hwnas("devices", "add", "lab", "--boards", "pi1,pi2")
    assert refused.status == 2
    assert "More than half" in refused.out
    assert "is not registered" in refused.err
    added = hwnas("devices", "add", "lab", "--boards", "pi1, pi2, pi3", "--notes", "on the shelf")
    assert added.status == 0, added.err
    assert "! pi2: relation: 1.4" in added.out
    assert "2 of 3 boards, Cortex" in added.out
    listed = hwnas("devices").out
    assert "pi1, pi2, pi3" in listed
    assert "on the shelf" in listed
    with open_device("lab") as opened:
        assert isinstance(opened, Farm)
    (tmp_path / "farm-space.toml").write_text(SMALL)
    shown = hwnas(
        "profile", "--device", "lab", "--space", str(tmp_path / "farm-space.toml"), "--tables", tmp_path, "--json"
    )
    assert shown.status == 0, shown.err
    assert "left out: 5 networks take" in json.loads(shown.out)["boards"][1]
    assert not shown.err
