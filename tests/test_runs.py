"""Results come back from their folder as they were written, and what is broken is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hwnas.errors import HwnasError
from hwnas.runs import Candidate, Compared, Proof, Requirement, RunResult, Timing, load_result, write_bytes, write_text

TIMING = Timing(0.9, 0.01, 50)
TOO_BIG = Requirement("memory", 20.0, 19.5, 21.0, "MB")


def result() -> RunResult:
    """A small result with every kind of row: measured and not, kept and not."""
    scored = Candidate({"space": "s", "stages": []}, 0.5, 0.8, 0.85)
    winner = Compared("found", 100, 10, 0.6, 0.55, TIMING)
    return RunResult(
        space="s",
        data="digits",
        device="cpu",
        chip="Abacus 3",
        runtime="ONNX Runtime 1",
        threads=1,
        batch=1,
        precision="fp32",
        budget_ms=1.0,
        binds=True,
        fastest_ms=0.1,
        scored=(scored, replace(scored, accuracy=0.4)),
        finalists=(
            replace(scored, measured=TIMING, kept=True),
            replace(scored, measured=TIMING, kept=False, requirements=(TOO_BIG,)),
        ),
        winner=winner,
        proof=Proof(
            1024, 1.0, 1e-6, {"Conv": 3}, 17, 0.8, 0.85, TIMING, "a", "b", (Requirement("size", 2.0, 1.9, 1.9, "MB"),)
        ),
        baselines=(replace(winner, name="baseline"),),
        seconds={"search": 1.5},
    )


def test_a_result_comes_back_equal(tmp_path: Path):
    result().save(tmp_path)
    assert load_result(tmp_path) == result()


def test_a_requirement_is_kept_up_to_its_limit():
    assert not TOO_BIG.kept
    assert replace(TOO_BIG, measured=20.0).kept
    assert TOO_BIG.text == "memory 21 MB of 20 MB (promised 19.5 MB)"


def test_a_result_without_baselines_comes_back_equal(tmp_path: Path):
    replace(result(), baselines=()).save(tmp_path)
    assert load_result(tmp_path).baselines == ()


def test_a_folder_without_a_result_is_refused_with_what_to_do(tmp_path: Path):
    with pytest.raises(HwnasError, match=r"result\.json is missing.*run it again to finish it"):
        load_result(tmp_path)


@pytest.mark.parametrize("missing", ["winner", "proof", "scored", "threads"])
def test_a_result_that_lacks_a_part_is_refused_with_its_name(tmp_path: Path, missing: str):
    result().save(tmp_path)
    data = json.loads((tmp_path / "result.json").read_text())
    del data[missing]
    (tmp_path / "result.json").write_text(json.dumps(data))
    with pytest.raises(HwnasError, match=rf"result\.json is not the result of a run: .*{missing}"):
        load_result(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "3", '{"scored": 1}', "\x00"])
def test_what_is_not_a_result_is_refused(tmp_path: Path, text: str):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(HwnasError, match=r"result\.json is not the result of a run"):
        load_result(tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path):
    (tmp_path / "result.json").write_bytes(b"\xff\xfe")
    with pytest.raises(HwnasError, match=r"result\.json is not the result of a run"):
        load_result(tmp_path)


def test_a_file_is_written_whole_and_folders_are_made(tmp_path: Path):
    path = tmp_path / "a/b/file"
    write_text(path, "first")
    write_bytes(path, b"second")
    assert path.read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_no_part(tmp_path: Path):
    write_text(tmp_path / "file", "old")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file/below", tmp_path / "folder", tmp_path / ("n" * 300)):
        with pytest.raises(HwnasError, match="could not be written"):
            write_text(path, "new")
    assert (tmp_path / "file").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
