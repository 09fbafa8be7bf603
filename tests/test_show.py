"""`hwnas show`: the right facts of whatever it is given."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Home
from test_experiments import timings

from hwnas.errors import HwnasError
from hwnas.latency import load_table
from hwnas.reference import REFERENCE
from hwnas.runs import load_result
from hwnas.show import facts_of
from hwnas.space_toml import load_space, shipped_spaces


@pytest.mark.parametrize("name", shipped_spaces())
def test_a_shipped_space_is_shown_with_its_exact_size_and_its_ends(name: str):
    facts = facts_of(name)
    assert facts["space"] == name
    assert facts["architectures"] == load_space(name).size
    assert facts["smallest_macs"] < facts["largest_macs"]
    assert facts["smallest_parameters"] < facts["largest_parameters"]
    assert facts["choices"][0] == "split_ratio: 1/4, 1/2, 3/4"


def test_a_space_of_the_user_is_shown(home: Home):
    facts = facts_of(home.space)
    assert facts["space"] == "tiny"
    assert facts["input"] == "16x16 RGB"
    assert facts["architectures"] == 2 * 2 * (2 + 4)


def test_a_network_of_the_literature_is_shown_with_its_published_counts():
    facts = facts_of("mobilenet-v2-1.0")
    assert facts["parameters"] == 3_504_872
    assert facts["input"] == "3x224x224"


def test_every_network_of_the_literature_is_shown():
    for name in REFERENCE:
        assert facts_of(name)["macs"] > 0


def test_the_guideline_sheet_of_a_network_is_shown_with_its_worst_units_first():
    facts = facts_of("mobilenet-v2-1.0")
    assert [text.split(":")[0] for text in facts["guidelines"]] == ["G1 broken", "G2 kept", "G3 kept", "G4 broken"]
    units = facts["units_worst_first"]
    assert len(units) == facts["units"]
    assert units[0]["G1"] == max(unit["G1"] for unit in units)
    assert units[-1]["unit"] in ("stem", "head")


def test_the_architecture_of_a_run_is_shown_with_its_guideline_sheet(found: dict[str, Any], tmp_path: Path):
    run, alone = facts_of(str(found["run"])), facts_of(str(found["run"] / "architecture.json"))
    assert alone["network"] == "tiny"
    assert run["guidelines"] == alone["guidelines"]
    assert run["units_worst_first"] == alone["units_worst_first"]
    space = load_space("shufflenet-tiny")
    (tmp_path / "smallest.json").write_text(space.smallest.to_json())
    assert facts_of(str(tmp_path / "smallest.json"))["macs"] == facts_of("shufflenet-tiny")["smallest_macs"]


@pytest.mark.parametrize("text", ['{"stages": []}', '{"stages": [], "space": 3}', '{"stages": 1, "space": "nowhere"}'])
def test_what_is_no_architecture_is_refused(tmp_path: Path, text: str):
    (tmp_path / "architecture.json").write_text(text)
    with pytest.raises(HwnasError, match=r"not an architecture|nowhere|search space"):
        facts_of(str(tmp_path / "architecture.json"))


def test_a_table_shows_its_verdicts_or_how_to_measure_them(home: Home, found: dict[str, Any], tmp_path: Path):
    assert facts_of(str(home.table))["guidelines"] == "not measured; hwnas guidelines measures them"
    table = replace(load_table(home.table), guidelines=timings(**{"8_groups": 1.9}))
    table.save(tmp_path / "table.json")
    assert facts_of(str(tmp_path / "table.json"))["guidelines"][1].startswith("G2 holds here: 8 groups cost 1.90x")


def test_a_run_is_shown_with_what_was_promised_and_measured(found: dict[str, Any]):
    facts, result = facts_of(str(found["run"])), load_result(found["run"])
    assert facts["budget_ms"] == 1000
    assert facts["budget_binds"] is False
    assert facts["measured_ms"] == result.proof.measured.median_ms
    assert facts["test_accuracy"] == result.winner.test_accuracy
    assert facts["scored_architectures"] == 4


def test_a_table_is_shown_with_its_conditions_errors_and_digest(home: Home, found: dict[str, Any]):
    facts, table = facts_of(str(home.table)), load_table(home.table)
    assert facts["space"] == "tiny"
    assert facts["entries"] == len(table.entries)
    assert facts["memory"][1].startswith("mean absolute error ")
    replace(table, memory=None).save(home.folder / "without.json")
    assert facts_of(str(home.folder / "without.json"))["memory"].startswith("not measured; hwnas profile --device cpu")
    assert table.conditions.chip in facts["device"]
    assert 0 < facts["fastest_unit_ms"] < facts["slowest_unit_ms"]
    assert facts["sha256"] == found["proof"]["table_sha256"]


def test_a_model_is_shown_with_its_metadata(home: Home, found: dict[str, Any]):
    facts = facts_of(str(found["run"] / "model.onnx"))
    assert facts["inputs"] == ["image [1, 3, 16, 16]"]
    assert facts["outputs"][0].endswith("[1, 10]")
    assert facts["operators"] == found["proof"]["operators"]
    assert facts["sha256"] == found["proof"]["model_sha256"]
    assert facts["architecture"] == json.loads((found["run"] / "architecture.json").read_text())
    assert facts["table_sha256"] == found["proof"]["table_sha256"]
    assert float(facts["measured_ms"]) == found["proof"]["measured"]["median_ms"]


def test_a_model_without_our_metadata_is_shown(tmp_path: Path):
    import onnx
    from onnx import TensorProto, helper

    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])
    answer = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [image], [answer])
    onnx.save_model(helper.make_model(graph), str(tmp_path / "other.onnx"))
    facts = facts_of(str(tmp_path / "other.onnx"))
    assert facts["inputs"] == ["x [batch, 3]"]
    assert facts["operators"] == {"Relu": 1}


@pytest.mark.parametrize("content", [b"", b"not a model at all", b"\x08\x07"])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(HwnasError, match=r"model\.onnx is not an ONNX model"):
        facts_of(str(tmp_path / "model.onnx"))


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, found: dict[str, Any]):
    with pytest.raises(HwnasError, match="holds no finished search"):
        facts_of(str(tmp_path))
    run = shutil.copytree(found["run"], tmp_path / "stopped")
    (run / "result.json").unlink()
    with pytest.raises(HwnasError, match=r"stopped holds no finished search: result\.json is missing"):
        facts_of(str(run))


def test_a_supernet_that_comes_with_hwnas_is_shown_by_its_name():
    facts = facts_of("cifar10")
    assert (facts["space"], facts["data"], len(facts["classes"])) == ("shufflenet-cifar", "cifar10", 10)


def test_a_name_that_means_nothing_is_refused_with_all_that_can_be_shown():
    with pytest.raises(HwnasError, match=r"nothing called 'shufflenet-tinny'.*\.onnx.*shufflenet-tiny"):
        facts_of("shufflenet-tinny")
