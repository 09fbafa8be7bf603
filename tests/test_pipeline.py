"""The main job, end to end on a space of the size of a thimble: what comes out, again, after a kill, and in budget."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
import onnxruntime
import optuna
import pytest
import steady
from conftest import Home

import hwnas
from hwnas.errors import HwnasError
from hwnas.latency import Measurement, Prediction, load_table
from hwnas.limits import limits_of
from hwnas.pipeline import Plan, candidate_of, find, run_folder
from hwnas.runs import Requirement, load_result
from hwnas.show import facts_of
from hwnas.single import retrain_architecture
from hwnas.space_toml import load_space
from hwnas.stages import Job, Listener, draw_within, load_settings, make_job


def tiny_job(home: Home, runs: Path, listener: Listener | None = None, **settings: Any) -> Job:
    settings = {"epochs": 1, "retrain_epochs": 1, "runs": runs} | settings
    return make_job(home.space, "digits", listener=listener or Listener(), **settings)


def copied_runs(home: Home, folder: Path) -> Path:
    """A copy of the finished run and its supernet, to change."""
    return shutil.copytree(home.folder / "runs", folder / "runs")


# ---- what comes out ----------------------------------------------------------------------------------------------


def test_a_run_s_folder_holds_everything_and_a_person_can_read_it(found: dict[str, Any]):
    run = found["run"]
    space = load_space(load_settings(run)["space"])
    architecture = space.from_json((run / "architecture.json").read_text())
    assert json.loads(architecture.to_json()) in [finalist["architecture"] for finalist in found["finalists"]]
    assert load_result(run).winner.test_accuracy == found["winner"]["test_accuracy"]
    assert load_settings(run)["plan"]["budget_ms"] == 1000
    assert "tiny" in (run / "report.html").read_text()
    for name in ("pareto", "predicted_measured", "architecture"):
        ElementTree.parse(run / f"{name}.svg")
    assert (run / load_settings(run)["checkpoints"]).is_dir()


def test_the_study_holds_every_scored_architecture(found: dict[str, Any]):
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{found['run'] / 'study.db'}")
    done = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    assert len(done) == len(found["scored"]) == 4
    assert max(trial.value for trial in done if trial.value is not None) == found["scored"][0]["accuracy"]


def test_the_model_runs_alone_and_carries_what_was_promised(found: dict[str, Any]):
    path = found["run"] / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    metadata = {entry.key: entry.value for entry in onnx.load_model(str(path)).metadata_props}
    assert metadata["space"] == "tiny"
    assert metadata["table_sha256"] == found["proof"]["table_sha256"]
    assert json.loads(metadata["classes"]) == [str(digit) for digit in range(10)]
    assert float(metadata["predicted_ms"]) <= float(metadata["upper_ms"])
    assert float(metadata["measured_ms"]) == found["proof"]["measured"]["median_ms"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": np.zeros((1, 3, 16, 16), np.float32)})
    assert np.asarray(logits).shape == (1, 10)


def test_the_model_agrees_with_jax_on_a_thousand_images(found: dict[str, Any]):
    assert found["proof"]["images"] >= 1000
    assert found["proof"]["agreement"] >= 0.999
    assert found["proof"]["largest_difference"] < 1e-4


def test_the_table_of_the_run_covers_the_space_and_its_digest_is_in_the_proof(home: Home, found: dict[str, Any]):
    table, space = load_table(home.table), load_space(home.space)
    for architecture in (space.smallest, space.largest):
        assert table.predict(hwnas.lower(space, architecture)).upper_ms > 0
    assert table.digest == found["proof"]["table_sha256"]


def test_the_events_of_a_training_tell_every_step(found: dict[str, Any]):
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard is not installed"
    )
    (folder,) = found["run"].parent.glob("supernet-*/events")
    events = accumulators.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    steps = [event.step for event in events.Scalars("loss")]
    assert steps == list(range(1, len(steps) + 1))
    assert len(events.Scalars("learning rate")) == len(steps) > 10
    assert len(events.Scalars("images a second")) == len(steps) - 1  # the first step compiles
    assert all(0 <= event.value <= 1 for event in events.Scalars("accuracy/smallest"))


# ---- again -------------------------------------------------------------------------------------------------------


def test_the_same_search_again_trains_nothing_and_finds_the_same(here: Home, found: dict[str, Any], tmp_path: Path):
    steps: list[str] = []
    notes: list[str] = []
    listener = Listener(note=notes.append, progress=lambda done, total, words: steps.append(words))
    runs = copied_runs(here, tmp_path)
    folder, result = find(tiny_job(here, runs, listener), Plan(1000, trials=4))
    assert folder == runs / found["run"].name
    assert steps == []
    assert [note[:24] for note in notes] == ["The budget does not bind"]
    assert not result.binds
    assert [c.architecture for c in result.scored] == [c["architecture"] for c in found["scored"]]
    assert result.winner.test_accuracy == found["winner"]["test_accuracy"]
    assert result.proof.table_sha256 == found["proof"]["table_sha256"]


def test_a_search_by_predictor_tells_its_held_out_error_everywhere(here: Home, found: dict[str, Any], tmp_path: Path):
    folder, result = find(tiny_job(here, copied_runs(here, tmp_path)), Plan(1000, trials=12, predictor=10))
    told = result.held_out
    assert folder.name == f"{found['run'].name}-predictor10"
    assert told
    assert told.count == 10
    assert told.low <= told.tau <= told.high
    assert len(result.scored) == 12
    assert load_result(folder).held_out == told
    assert f"Kendall tau of {told.tau:.2f}" in (folder / "report.html").read_text()


def test_a_job_that_is_stopped_again_and_again_goes_on_and_finds_the_same(
    here: Home, found: dict[str, Any], tmp_path: Path
):
    runs = copied_runs(here, tmp_path)
    shutil.rmtree(runs / found["run"].name)
    moments = iter(("% at", "% at", "loss"))  # while it scores the first architectures, then while the winner trains
    moment: str | None = ""

    def interrupt(done: int, total: int, words: str) -> None:
        if moment and moment in words:
            raise KeyboardInterrupt

    while moment := next(moments, None):
        with pytest.raises(KeyboardInterrupt):
            find(tiny_job(here, runs, Listener(progress=interrupt)), Plan(1000, trials=4))
    folder, result = find(tiny_job(here, runs), Plan(1000, trials=4))
    assert folder.name == found["run"].name
    assert [c.architecture for c in result.scored] == [c["architecture"] for c in found["scored"]]
    assert result.winner.test_accuracy == found["winner"]["test_accuracy"]


def test_a_finished_run_stays_whole_while_the_same_search_runs_again(here: Home, found: dict[str, Any], tmp_path: Path):
    runs = copied_runs(here, tmp_path)
    run = runs / found["run"].name

    def interrupt(text: str) -> None:
        if text.startswith("Scoring"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find(tiny_job(here, runs, Listener(stage=interrupt)), Plan(1000, trials=4))
    proof = hwnas.export_run(run, tmp_path / "model.onnx", 0, Listener())
    assert proof.operators == found["proof"]["operators"]


def test_a_kill_in_training_loses_nothing_before_the_newest_checkpoint(here: Home, found: dict[str, Any], tmp_path):
    code = f"""
import os, pathlib, signal
import hwnas.training
from hwnas.stages import Listener, make_job, trained_supernet
hwnas.training.CHECKPOINT_SECONDS = 0
def progress(done, total, words):
    if done == 20:
        os.kill(os.getpid(), signal.SIGKILL)
trained_supernet(make_job("tiny.toml", "digits", listener=Listener(progress=progress), epochs=1,
                          runs=pathlib.Path({str(tmp_path)!r})))
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=here.folder, env=here.environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    steps: list[tuple[int, int]] = []
    job = tiny_job(here, tmp_path, Listener(progress=lambda done, total, words: steps.append((done, total))))
    _, model = hwnas.trained_supernet(job)
    total = steps[0][1]
    assert steps == [(step, total) for step in range(20, total + 1)]  # step 20 was told of and not kept
    _, whole = hwnas.trained_supernet(tiny_job(here, here.folder / "runs"))
    assert same_weights(model, whole)


def same_weights(one: Any, other: Any) -> bool:
    import jax
    from flax import nnx

    pairs = zip(*(jax.tree.leaves(nnx.state(model, nnx.Param)) for model in (one, other)), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


# ---- budgets -----------------------------------------------------------------------------------------------------


def test_an_impossible_budget_is_refused_before_anything_is_trained(here: Home, found: dict[str, Any], tmp_path: Path):
    with pytest.raises(HwnasError, match=r"The fastest architecture of tiny needs .* ms .*budget is 0.0001 ms"):
        find(tiny_job(here, tmp_path), Plan(0.0001))
    assert list(tmp_path.iterdir()) == []


def test_more_trials_are_added_to_the_study_until_the_space_is_searched_out(
    here: Home, found: dict[str, Any], tmp_path: Path
):
    notes: list[str] = []
    job = tiny_job(here, copied_runs(here, tmp_path), Listener(note=notes.append))
    _, result = find(job, Plan(1000, trials=100))
    assert len(result.scored) == job.space.size == 24
    before = {json.dumps(candidate["architecture"]): candidate["accuracy"] for candidate in found["scored"]}
    assert before.items() <= {json.dumps(c.architecture): c.accuracy for c in result.scored}.items()
    assert any("Every architecture of tiny" in note for note in notes)


def test_a_budget_that_binds_is_kept_as_measured(here: Home, found: dict[str, Any], tmp_path: Path):
    job, table = tiny_job(here, copied_runs(here, tmp_path)), load_table(here.table)
    predict = table.predictor(job.space)
    budget_ms = (predict(job.space.smallest).upper_ms + predict(job.space.largest).upper_ms) / 2
    folder, result = find(job, Plan(budget_ms, trials=4))
    assert result.binds
    assert result.proof.measured.median_ms <= budget_ms
    assert all(candidate.upper_ms <= budget_ms for candidate in result.scored)
    assert folder == run_folder(job, Plan(budget_ms))


def test_limits_on_memory_and_size_are_kept_and_the_proof_says_so(here: Home, found: dict[str, Any], tmp_path: Path):
    job, table = tiny_job(here, copied_runs(here, tmp_path)), load_table(here.table)
    ends = limits_of(job, table, table.digest, 1.0, 1.0)
    least, most = ([limit.needs(a) for limit in ends] for a in (job.space.smallest, job.space.largest))
    memory_mb, size_mb = (
        most[0] * 1.3,
        (least[1] + most[1]) / 2,
    )  # how much memory is given back differs from time to time
    plan = Plan(1000, trials=4, memory_mb=memory_mb, size_mb=size_mb)
    folder, result = find(job, plan)
    memory, size = result.proof.requirements
    assert (memory.name, memory.limit, size.name, size.limit) == ("memory", memory_mb, "size", size_mb)
    file_bytes = (folder / "model.onnx").stat().st_size
    assert size.measured == file_bytes / 1e6
    assert 0 <= size.promised * 1e6 - file_bytes < 100
    assert size.promised <= size_mb
    assert 0 < memory.measured <= memory_mb
    sizes = [ends[1].needs(job.space.from_json(json.dumps(c.architecture))) for c in result.scored]
    assert max(sizes) <= size_mb < most[1]
    assert all([r.name for r in candidate.requirements] == ["memory"] for candidate in result.finalists)
    metadata = {entry.key: entry.value for entry in onnx.load_model(str(folder / "model.onnx")).metadata_props}
    assert float(metadata["memory_measured_mb"]) == memory.measured
    assert f"{size.measured:.4g} MB measured" in (folder / "report.html").read_text()
    assert facts_of(str(folder))["size"] == size.text
    assert size.text in hwnas.outcome(result)
    assert folder == run_folder(job, plan) != run_folder(job, Plan(1000, trials=4))


def test_a_search_for_two_devices_keeps_the_budget_of_each(
    here: Home, found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # the second one is the first under another name, with a table of its own
    monkeypatch.setattr("hwnas.devices.command_of", lambda runtime: steady.command_of("cpu"))
    tables = shutil.copytree(here.table.parents[1], tmp_path / "tables")
    job = tiny_job(here, copied_runs(here, tmp_path), tables=tables)
    predict = load_table(here.table).predictor(job.space)
    budget_ms = (predict(job.space.smallest).upper_ms + predict(job.space.largest).upper_ms) / 2
    plan = Plan(1000, trials=4, further=(hwnas.Budget("openvino", budget_ms),))
    folder, result = find(job, plan)
    (requirement,) = result.proof.requirements
    assert (requirement.name, requirement.limit, requirement.unit) == ("latency on openvino", budget_ms, "ms")
    assert requirement.kept
    assert requirement.text in hwnas.outcome(result)
    assert all([r.name for r in one.requirements] == [requirement.name] for one in result.finalists)
    (file,) = (tables / "openvino").glob("*.json")
    elsewhere = load_table(file).predictor(job.space)
    for one in result.scored:
        prediction = elsewhere(job.space.from_json(json.dumps(one.architecture)))
        assert prediction.upper_ms <= budget_ms
        assert one.elsewhere_ms == {"openvino": prediction.latency_ms}
    metadata = {entry.key: entry.value for entry in onnx.load_model(str(folder / "model.onnx")).metadata_props}
    assert json.loads(metadata["further_devices"])["openvino"]["measured_ms"] == requirement.measured
    assert "On openvino" in (folder / "report.html").read_text()
    assert load_result(folder) == result
    assert folder == run_folder(job, plan) != run_folder(job, Plan(1000, trials=4))
    with pytest.raises(HwnasError, match=r"least latency on openvino needs .* ms .* Raise --budget openvino"):
        find(job, replace(plan, further=(hwnas.Budget("openvino", 1e-5),)))
    with pytest.raises(HwnasError, match=r"A device has one budget\. cpu was given more than one"):
        find(job, replace(plan, further=(hwnas.Budget("cpu", 1000),)))
    with pytest.raises(HwnasError, match=r"a number of milliseconds above 0\. On openvino it is nan"):
        find(job, replace(plan, further=(hwnas.Budget("openvino", float("nan")),)))


def test_a_supernet_within_a_limit_trains_only_what_keeps_it(here: Home, found: dict[str, Any], tmp_path: Path):
    table = load_table(here.table)
    job = tiny_job(here, tmp_path)
    predict = table.predictor(job.space)
    within_ms = (predict(job.space.smallest).upper_ms + predict(job.space.largest).upper_ms) / 2
    stages: list[str] = []
    job = replace(job, within_ms=within_ms, listener=Listener(stage=stages.append))
    draw, rng = draw_within(job, table), Random(0)
    assert draw is not None
    everything = {job.space.sample(rng) for _ in range(1000)}
    assert len(everything) == job.space.size
    kept = {architecture for architecture in everything if predict(architecture).upper_ms <= within_ms}
    assert 0 < len(kept) < len(everything)
    assert {job.space.decode(draw(rng)) for _ in range(500)} == kept
    folder, _ = hwnas.trained_supernet(job, table)
    assert f"tiny within {within_ms:g} ms on digits" in stages[0]
    assert json.loads((folder / "supernet.json").read_text())["within_ms"] == within_ms
    assert folder.name not in [path.name for path in found["run"].parent.iterdir()]


def test_limits_that_cannot_be_are_refused_before_anything_is_trained(
    here: Home, found: dict[str, Any], tmp_path: Path
):
    job = tiny_job(here, tmp_path / "runs")
    with pytest.raises(HwnasError, match=r"--size-mb is a number of megabytes above 0\. It is -1"):
        find(job, Plan(1000, size_mb=-1))
    with pytest.raises(HwnasError, match=r"architecture of tiny of least size needs .* MB .*--size-mb"):
        find(job, Plan(1000, size_mb=0.001))
    tables = tmp_path / "tables"
    replace(load_table(here.table), memory=None).save(tables / "cpu" / here.table.name)
    with pytest.raises(HwnasError, match=r"--memory-mb needs to know .* Measure: hwnas profile --device cpu --space"):
        find(replace(job, tables=tables), Plan(1000, memory_mb=50))
    assert not (tmp_path / "runs").exists()


def test_a_finalist_that_breaks_a_limit_as_measured_is_dropped():
    architecture = load_space("shufflenet-tiny").smallest
    timing, prediction = Measurement((0.5, 0.5)), Prediction(0.5, 0.6)
    broken, kept = (
        candidate_of(architecture, 0.9, prediction, timing, 1.0, (Requirement("memory", 20.0, 19.0, measured, "MB"),))
        for measured in (20.1, 19.9)
    )
    assert (broken.kept, kept.kept) == (False, True)


def test_a_learning_rate_that_diverges_is_said_with_what_to_do(here: Home, found: dict[str, Any], tmp_path: Path):
    architecture = found["run"] / "architecture.json"
    with pytest.raises(HwnasError, match=r"Training diverged: .* of up to 1e\+30\. .*Give a lower --learning-rate"):
        retrain_architecture(
            architecture, tmp_path, None, lambda space: replace(tiny_job(here, tmp_path), learning_rate=1e30)
        )
    for rate in (0.0, -1.0, float("nan")):
        with pytest.raises(HwnasError, match=f"The learning rate is a number above 0, such as 0.05. It is {rate}"):
            replace(tiny_job(here, tmp_path), learning_rate=rate)


def test_a_limit_of_the_supernet_that_cannot_be_is_refused(here: Home, found: dict[str, Any], tmp_path: Path):
    with pytest.raises(HwnasError, match=r"--within-ms is a number of milliseconds above 0\. It is -1"):
        tiny_job(here, tmp_path, within_ms=-1.0)
    table = load_table(here.table)
    with pytest.raises(HwnasError, match=r"No architecture of tiny is within 0\.0001 ms .*Raise the budget"):
        hwnas.trained_supernet(tiny_job(here, tmp_path, within_ms=0.0001), table)
    with pytest.raises(HwnasError, match="Fair sampling takes every value equally often"):
        hwnas.trained_supernet(tiny_job(here, tmp_path, within_ms=1000.0, method="fair"), table)
    assert list(tmp_path.iterdir()) == []


# ---- from Python -------------------------------------------------------------------------------------------------


def test_what_the_package_s_docstring_shows_runs(
    here: Home, found: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copied_runs(here, tmp_path)
    assert hwnas.__doc__ is not None
    lines = [line[4:] for line in hwnas.__doc__.splitlines() if line.startswith("    ")]
    program = "\n".join(lines)
    assert program.count('"shufflenet-tiny"') == 2
    program = program.replace('"shufflenet-tiny"', repr(here.space))
    program = program.replace('device="cpu"', 'device="cpu", epochs=1, retrain_epochs=1').replace(
        "1.0", "1000, trials=4"
    )
    with contextlib.chdir(tmp_path):
        exec(program, {})
    printed = capsys.readouterr().out
    assert "test accuracy in" in printed
    assert "Prediction(" in printed


def test_every_public_name_is_there():
    for name in hwnas.__all__:
        assert getattr(hwnas, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hwnas.nothing


def test_importing_the_package_loads_neither_jax_nor_onnx_runtime():
    code = "import hwnas, sys; print(sorted({'jax', 'onnxruntime', 'onnx', 'optuna'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
