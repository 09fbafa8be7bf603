"""`hwnas guidelines`: what it measures, prints, draws and keeps."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import Answer, Home
from simulated import SimulatedDevice, SimulatedMachine
from test_experiments import timings

from hwnas import experiments, guideline_profiling
from hwnas.calibration import Measurement
from hwnas.devices import DEFAULT_TIMING
from hwnas.errors import DeviceError, HwnasError
from hwnas.experiments import EXPERIMENTS, all_cases, check_complete
from hwnas.guideline_report import guideline_facts, guideline_picture, guideline_rows
from hwnas.latency import load_table

Command = Callable[..., Answer]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Feature maps of 4x4, timed once or twice: seconds instead of minutes."""
    monkeypatch.setattr(experiments, "SIDE", 4)
    monkeypatch.setattr(guideline_profiling, "AGREEING", 1)


def test_facts_rows_and_pictures_hold_every_variant_at_every_width():
    taken = timings(**{"8_groups": 1.9})
    facts = guideline_facts(taken)
    json.dumps(facts)
    assert sum(map(len, facts["experiments"].values())) == len(all_cases("arm"))
    last = facts["experiments"]["G2"][-1]
    assert (last["variant"], last["multiplier"]) == ("8 groups", 4)
    assert (last["median_ms"], last["samples_ms"]) == (1.9, (1.9, 1.9, 1.9))
    assert last["times_slower"] == pytest.approx(1.9)
    assert last["reported_arm_times_slower"] == pytest.approx(2.3 / 1.8)
    assert facts["verdicts"][1].startswith("G2 holds here")
    for guideline, experiment in EXPERIMENTS.items():
        header, *rows = guideline_rows(guideline, taken)
        assert [row[0] for row in rows] == list(experiment.variants)
        assert {len(row) for row in rows} == {len(header)}
        picture = ElementTree.fromstring(guideline_picture(guideline, taken))
        words = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
        assert set(experiment.variants) < set(words)
        assert len(list(picture.iter("{http://www.w3.org/2000/svg}circle"))) == 9 * len(rows)


def test_the_bar_of_a_variant_is_as_long_as_it_is_slow():
    picture = ElementTree.fromstring(guideline_picture("G2", timings(**{"8_groups": 2.0})))
    bars = [e for e in picture.iter("{http://www.w3.org/2000/svg}rect") if e.get("class") == "f-main"]
    lengths = [float(bar.attrib["width"]) for bar in bars if bar.attrib["height"] == "12"]  # not the legend's
    assert lengths == pytest.approx([lengths[0]] * 3 + [2 * lengths[0]], abs=0.02)


@pytest.mark.usefixtures("small")
def test_the_command_measures_draws_and_keeps_the_experiments_in_the_table_of_the_space(
    hwnas: Command, home: Home, found: dict[str, Any], tmp_path: Path
):
    table = tmp_path / "cpu" / home.table.name
    table.parent.mkdir()
    shutil.copy(home.table, table)
    before = load_table(table)
    words = ("guidelines", "--space", "tiny.toml", "--tables", tmp_path, "--plots", tmp_path / "plots")
    answer = hwnas(*words, "--json")
    assert (answer.status, answer.err) == (0, "")
    facts = json.loads(answer.out)
    after = load_table(table)
    assert facts["stored_in"] == str(table)
    assert before.guidelines == ()
    assert [t.case for t in after.guidelines] == list(all_cases("arm"))
    check_complete(after.guidelines)
    assert after.entries == before.entries
    assert facts["experiments"]["G1"][0]["samples_ms"] == list(after.guidelines[0].measurement.samples_ms)
    assert facts["origin"] == "measured"
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["G1.svg", "G2.svg", "G3.svg", "G4.svg"]

    said = hwnas(*words, "--widths", "gpu")
    assert said.status == 0
    assert "G4: element-wise operators of a bottleneck" in said.out
    assert "8 groups cost" in said.out.replace("\n", " ")
    assert {t.case.widths for t in load_table(table).guidelines} == {"gpu"}


@pytest.mark.usefixtures("small", "here")
def test_without_a_table_the_command_says_which_one_makes_it(hwnas: Command, tmp_path: Path):
    answer = hwnas("guidelines", "--space", "tiny.toml", "--tables", tmp_path)
    assert answer.status == 0
    assert "no latency table" in answer.err
    assert "hwnas profile --device cpu --space tiny.toml" in answer.err
    assert "stored in" not in answer.out
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_channels_of_another_device_than_the_papers_are_refused(tmp_path: Path):
    with pytest.raises(HwnasError, match=r"arm or gpu\. They are 'mips'"):
        guideline_profiling.measure_guidelines(SimulatedDevice(SimulatedMachine()), tmp_path / "kept", widths="mips")


class Flaky(SimulatedDevice):
    """A device that dies when it is to time its third experiment."""

    timed = 0

    def measure_steadily(self, models, timing=DEFAULT_TIMING):
        self.timed += 1
        if self.timed == 3:
            raise DeviceError("it has died")
        return {index: Measurement((1.0 + index,) * 5) for index in range(len(models))}


@pytest.mark.usefixtures("small")
def test_an_experiment_that_is_finished_is_kept_and_not_measured_again(tmp_path: Path):
    device, kept, said = Flaky(SimulatedMachine()), tmp_path / "kept", []
    with pytest.raises(DeviceError):
        guideline_profiling.measure_guidelines(device, kept, on_progress=lambda *words: said.append(words))
    assert [done for done, _, _ in said] == [1, 2]
    assert said[1][2].startswith("G2 holds here: 8 groups cost")
    with kept.open("a") as file:
        file.write('{"guideline": "G3", "torn by a ki')
    timings = guideline_profiling.measure_guidelines(device, kept)
    assert device.timed == 5
    check_complete(timings)
    assert timings == guideline_profiling.measure_guidelines(device, kept)
    assert device.timed == 5
    with pytest.raises(HwnasError, match="begun under other conditions"):
        guideline_profiling.measure_guidelines(device, kept, batch=8)
