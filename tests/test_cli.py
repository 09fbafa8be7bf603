"""The command line: what it promises of every verb, and one clear line for everything that a user can get wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SHORT, TINY, Answer, Home

from hwnas.runs import write_text

VERBS = ("search", "profile", "train", "retrain", "export", "show", "breakdown", "guidelines")

Command = Callable[..., Answer]


def refused(answer: Answer, *words: str) -> None:
    """The answer is one line on standard error that holds the words, and exit status 2."""
    assert answer.status == 2, answer
    assert answer.out == ""
    last = answer.err.rstrip("\n").splitlines()[-1]
    assert last.startswith("Error: ")
    assert "Traceback" not in answer.err
    for word in words:
        assert word in last


# ---- help --------------------------------------------------------------------------------------------------------


def test_help_loads_none_of_the_heavy_libraries():
    heavy = ("jax", "flax", "onnx", "onnxruntime", "optuna", "sklearn", "matplotlib", "orbax", "numpy")
    code = f"""
import sys
from hwnas.cli import main
sys.argv = ["hwnas", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code
print([name for name in {heavy} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_names_every_verb(hwnas: Command):
    answer = hwnas("--help")
    assert answer.status == 0
    assert all(f" {verb} " in answer.out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_seed_a_json_form_and_an_example(hwnas: Command, verb: str):
    answer = hwnas(verb, "--help")
    assert answer.status == 0
    assert "--seed" in answer.out
    assert "--json" in answer.out
    assert f"Example: hwnas {verb} " in " ".join(answer.out.split())


def test_without_a_verb_the_help_is_shown(hwnas: Command):
    assert "hwnas search --budget-ms 1" in hwnas().out


def test_the_shell_completes_verbs_and_options():
    command = [shutil.which("hwnas", path=Path(sys.executable).parent) or "hwnas"]
    source = os.environ | {"_HWNAS_COMPLETE": "source_bash"}
    script = subprocess.run(command, env=source, capture_output=True, text=True).stdout
    assert "complete -o default -F" in script
    for words, place, wanted in (("hwnas se", "1", "search"), ("hwnas search --budget-", "2", "--budget-ms")):
        asked = os.environ | {"_HWNAS_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": place}
        done = subprocess.run(command, env=asked, capture_output=True, text=True)
        assert done.stdout.split() == [wanted]


# ---- JSON --------------------------------------------------------------------------------------------------------


def only_json(answer: Answer) -> dict[str, Any]:
    """The one JSON object that standard output holds; not a number in it is NaN or infinite."""
    assert answer.status == 0, answer.err

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    data = json.loads(answer.out, parse_constant=refuse)
    assert isinstance(data, dict)
    return data


def test_search_prints_one_json_object_and_where_the_run_is(found: dict[str, Any]):
    assert (found["run"] / "result.json").is_file()
    assert found["winner"]["measured"]["median_ms"] <= found["budget_ms"] == 1000


def test_profile_prints_one_json_object(hwnas: Command, tmp_path: Path, here: Home):
    facts = only_json(hwnas("profile", "--space", here.space, "--tables", tmp_path, "--json"))
    assert facts["file"] == str(tmp_path / "cpu/tiny-fp32-t1-b1.json")
    assert facts["device"].startswith("cpu (")
    assert facts["origin"] == "measured"


def test_a_table_measured_by_the_real_clock_is_used_or_refused_as_its_own_check_says(
    hwnas: Command, here: Home, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    command = [sys.executable, "-m", "hwnas", "profile", "--space", here.space, "--tables", str(tmp_path), "--json"]
    done = subprocess.run(command, env=here.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check = json.loads(done.stdout)["check"]
    monkeypatch.setenv("HWNAS_TABLES", str(tmp_path))
    supernet = shutil.copytree(here.folder / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("tiny-*"))
    answer = search(hwnas, here, "--runs", supernet)
    if check == "passed":
        assert answer.status == 0, answer
    else:
        refused(answer, check)


def test_a_check_of_a_table_is_told_and_kept_in_it(
    hwnas: Command, here: Home, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    table = copied_table(here, monkeypatch, tmp_path)
    facts = only_json(hwnas("profile", "--check", table, "--space", here.space, "--json"))
    assert facts["holds"]
    assert facts["check"] == "passed"
    (kept,) = json.loads(table.read_text())["calibration"]["checks"]
    assert abs(kept["shift"]) < 0.02
    assert json.loads(table.read_text())["calibration"]["upper_ratio"] == pytest.approx(
        facts["upper_bound_percent_from_now_on"] / 100
    )
    shown = only_json(hwnas("show", table, "--json"))
    assert shown["upper_bound_percent"] == pytest.approx(facts["upper_bound_percent_from_now_on"])


def test_a_check_that_a_table_fails_ends_with_1_and_widens_its_bound(
    hwnas: Command, here: Home, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    table = copied_table(here, monkeypatch, tmp_path)
    data = json.loads(table.read_text())
    before = data["calibration"]["upper_ratio"]
    line = data["calibration"]["line"]
    line |= {name: [value / 1.2 for value in line[name]] for name in ("slopes", "parameter_ns")}
    line["intercept_ms"] /= 1.2
    table.write_text(json.dumps(data))
    answer = hwnas("profile", "--check", table, "--space", here.space, "--json")
    assert answer.status == 1
    facts = json.loads(answer.out)
    assert not facts["holds"]
    assert "err by" in facts["check"]
    after = json.loads(table.read_text())["calibration"]["upper_ratio"]
    assert after > before + 0.05


def test_train_prints_one_json_object_and_trains_the_supernet_of_a_search(
    hwnas: Command, here: Home, found: dict[str, Any]
):
    facts = only_json(hwnas("train", "--space", here.space, "--epochs", "1", "--json"))
    assert (here.folder / facts["supernet"] / "supernet.json").is_file()
    assert len(list((here.folder / "runs").glob("supernet-tiny-*"))) == 1
    assert 0 <= facts["largest_validation_accuracy"] <= 1


def test_retrain_and_then_export_make_a_model_from_an_architecture_alone(
    hwnas: Command, here: Home, found: dict[str, Any], tmp_path: Path
):
    architecture, run, model = found["run"] / "architecture.json", tmp_path / "again", tmp_path / "model.onnx"
    facts = only_json(hwnas("retrain", architecture, "--epochs", "1", "--run", run, "--json"))
    assert facts["run"] == str(run)
    assert facts["parameters"] == found["winner"]["parameters"]
    proof = only_json(hwnas("export", run, "--output", model, "--json"))
    assert proof["agreement"] > 0.99
    shown = only_json(hwnas("show", model, "--json"))
    assert shown["sha256"] == proof["model_sha256"]
    assert shown["architecture"] == json.loads(architecture.read_text())


def test_export_of_a_search_writes_the_model_that_the_search_proved(
    hwnas: Command, found: dict[str, Any], tmp_path: Path
):
    proof = only_json(hwnas("export", found["run"], "--output", tmp_path / "new/model.onnx", "--json"))
    assert proof["operators"] == found["proof"]["operators"]
    assert proof["table_sha256"] == found["proof"]["table_sha256"]
    assert (tmp_path / "new/model.onnx").stat().st_size > 1000


def test_show_prints_one_json_object_of_whatever_it_is_given(hwnas: Command, here: Home, found: dict[str, Any]):
    model = found["run"] / "model.onnx"
    for what in (found["run"], here.space, here.table, model, "shufflenet-v2-0.5x", "shufflenet-224"):
        only_json(hwnas("show", what, "--json"))


def test_without_json_the_result_is_a_table_and_what_happens_is_told_on_standard_error(
    hwnas: Command, here: Home, found: dict[str, Any]
):
    shown = hwnas("show", found["run"])
    assert "measured ms" in shown.out
    assert shown.err == ""
    trained = hwnas("train", "--space", here.space, "--epochs", "1")
    assert trained.err.startswith("Training the supernet of tiny on digits")


# ---- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--budget-ms", "0"), ("above 0", "0.0")),
        (("--budget-ms", "-1"), ("above 0", "-1.0")),
        (("--budget-ms", "nan"), ("above 0", "nan")),
        (("--budget-ms", "inf"), ("above 0", "inf")),
        (("--budget-ms", "1", "--sampler", "guess"), ("'guess'", "evolution")),
        (("--budget-ms", "1", "--device", "toaster"), ("'toaster'", "cpu")),
        (("--budget-ms", "1", "--precision", "fp7"), ("'fp7'", "fp32")),
        (("--budget-ms", "1", "--threads", "1000"), ("1000 threads", "Give --threads 1 to")),
        (("--budget-ms", "1", "--data", "nowhere"), ("'nowhere'", "digits")),
        (("--budget-ms", "1", "--space", "nothing"), ("'nothing'", "shufflenet-tiny")),
        (("--budget-ms", "1", "--learning-rate", "-1"), ("above 0", "-1.0")),
        (("--budget-ms", "1", "--learning-rate", "nan"), ("above 0", "nan")),
    ],
)
def test_a_setting_out_of_range_is_one_line(hwnas: Command, here: Home, arguments: tuple[str, ...], words):
    refused(hwnas("search", "--space", here.space, *arguments), *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "Neither is given"),
        (("--budget-ms", 1, "--budget", "cpu=1"), "Both are given"),
        (("--budget", "cpu=1", "--device", "cpu"), "--device cpu is given besides"),
        (("--budget", "cpu"), "It is 'cpu'"),
        (("--budget", "=3"), "It is '=3'"),
        (("--budget", "cpu=soon"), "It is 'cpu=soon'"),
        (("--budget", "cpu=1", "--budget", "cpu=2"), "cpu was given more than one"),
        (("--budget", "cpu=1000", "--budget", "toaster=2"), "no device 'toaster'"),
    ],
)
def test_budgets_of_several_devices_are_one_for_each(
    hwnas: Command, here: Home, arguments: tuple[object, ...], words: str
):
    refused(hwnas("search", "--space", here.space, *arguments), words)


def test_a_missing_or_unknown_option_is_a_mistake_too(hwnas: Command):
    assert hwnas("search").status == 2
    unknown = hwnas("search", "--budget-m", "1")
    assert unknown.status == 2
    assert "--budget-ms" in unknown.err


def test_a_wrong_field_of_a_space_is_named_with_its_line(hwnas: Command, tmp_path: Path):
    path = tmp_path / "wrong.toml"
    path.write_text(TINY.replace("kernel", "kernels"))
    refused(hwnas("search", "--budget-ms", 1, "--space", path), f"{path}", "line 11", "'kernels'")


def test_a_folder_of_images_with_one_class_is_refused(hwnas: Command, here: Home, tmp_path: Path):
    save_images(tmp_path / "photos/cats", 3)
    refused(search(hwnas, here, "--data", tmp_path / "photos"), "cats")


def test_a_broken_image_is_named(hwnas: Command, here: Home, tmp_path: Path):
    for name in ("cats", "dogs"):
        save_images(tmp_path / "photos" / name, 20)
    broken = tmp_path / "photos/dogs/5.png"
    broken.write_bytes(broken.read_bytes()[:40])
    refused(search(hwnas, here, "--data", tmp_path / "photos"), str(broken))


def save_images(folder: Path, count: int) -> None:
    from PIL import Image

    folder.mkdir(parents=True)
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")


def search(hwnas: Command, home: Home, *arguments: object) -> Answer:
    return hwnas("search", "--budget-ms", 1000, "--space", home.space, *SHORT, *arguments)


def test_a_truncated_table_is_refused_by_search_and_by_show(
    hwnas: Command, here: Home, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    table = copied_table(here, monkeypatch, tmp_path)
    table.write_text(table.read_text()[:-100])
    refused(search(hwnas, here), str(table), "Delete the file")
    refused(hwnas("show", table), str(table), "Delete the file")


def test_the_table_of_another_device_is_refused_and_the_command_that_is_named_mends_it(
    hwnas: Command, here: Home, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    table = copied_table(here, monkeypatch, tmp_path)
    chip = json.loads(table.read_text())["conditions"]["chip"]
    table.write_text(table.read_text().replace(json.dumps(chip), '"Abacus 3"'))
    runs = ("--runs", shutil.copytree(here.folder / "runs", tmp_path / "runs"))
    answer = search(hwnas, here, *runs)
    refused(answer, "'Abacus 3'", f"'{chip}'", "hwnas profile --device cpu --space ")
    command = answer.err.rpartition("Measure: hwnas ")[2].split()
    assert hwnas(*command).status == 0
    assert search(hwnas, here, *runs).status == 0


def copied_table(home: Home, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """A copy of the table in a folder of tables of its own, which the commands then use."""
    shutil.copytree(home.folder / "cache/latency_tables", folder / "tables")
    monkeypatch.setenv("HWNAS_TABLES", str(folder / "tables"))
    return folder / "tables/cpu" / home.table.name


@pytest.mark.parametrize("whose", ["supernet", "winner"])
def test_a_flipped_byte_in_a_checkpoint_is_found(
    hwnas: Command, here: Home, found: dict[str, Any], tmp_path: Path, whose: str
):
    shutil.copytree(here.folder / "runs", tmp_path / "runs")
    run = tmp_path / "runs" / found["run"].name
    folder = run if whose == "winner" else next((tmp_path / "runs").glob("supernet-*"))
    newest = max(folder.glob("checkpoints/**/step-*"), key=lambda path: path.name)
    largest = max(newest.glob("**/d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    refused(search(hwnas, here, "--runs", tmp_path / "runs"), "damaged", largest.name, "Remove that folder")
    if whose == "winner":
        refused(hwnas("export", run, "--output", tmp_path / "model.onnx"), "damaged", largest.name)
        assert not (tmp_path / "model.onnx").exists()


def test_what_is_not_there_or_not_a_model_is_refused(hwnas: Command, found: dict[str, Any], tmp_path: Path):
    refused(hwnas("show", "nonsense"), "'nonsense'")
    refused(hwnas("show", tmp_path), str(tmp_path), "result.json is missing")
    refused(hwnas("export", tmp_path), str(tmp_path), "run.json")
    refused(hwnas("retrain", tmp_path / "architecture.json"), "architecture.json")
    model = tmp_path / "model.onnx"
    for content in (b"", b"no model", (found["run"] / "model.onnx").read_bytes()[:5000]):
        model.write_bytes(content)
        refused(hwnas("show", model), str(model), "not an ONNX model")


def test_a_result_or_settings_file_that_was_cut_short_is_refused(hwnas: Command, found: dict[str, Any], tmp_path: Path):
    run = shutil.copytree(found["run"], tmp_path / "run")
    (run / "result.json").write_text((run / "result.json").read_text()[:200])
    refused(hwnas("show", run), str(run / "result.json"))
    (run / "architecture.json").unlink()
    refused(hwnas("export", run), str(run / "architecture.json"))
    (run / "run.json").write_text("{}")
    refused(hwnas("export", run), "run.json", "'space' is missing")


def test_an_output_that_cannot_be_written_is_refused(hwnas: Command, found: dict[str, Any], tmp_path: Path):
    blocked = write_file(tmp_path / "file")
    refused(hwnas("export", found["run"], "--output", blocked / "model.onnx"), str(blocked), "could not be written")


def test_a_run_folder_that_cannot_be_made_is_refused(hwnas: Command, here: Home, tmp_path: Path):
    blocked = write_file(tmp_path / "file")
    refused(search(hwnas, here, "--run", blocked / "run"), str(blocked / "run"))
    refused(search(hwnas, here, "--runs", blocked / "runs"), str(blocked / "runs"))


def write_file(path: Path) -> Path:
    write_text(path, "something else")
    return path


# ---- a full disk -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path):
    """Mounts file systems of a given size, which only root may do."""
    mounted: list[Path] = []

    def mount(kilobytes: int) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        options = f"size={kilobytes}k"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip(f"only root may mount a small disk: {done.stderr.decode().strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_stops_a_profile_which_goes_on_later(hwnas: Command, here: Home, small_disk: Callable[[int], Path]):
    disk = small_disk(8)
    command = ("profile", "--space", here.space, "--tables", disk)
    refused(hwnas(*command), "No space left", "run it again")
    kept = (disk / "cpu/tiny-fp32-t1-b1.journal").stat().st_size
    subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
    assert kept > 0
    assert hwnas(*command).status == 0


@pytest.mark.parametrize(("left_kilobytes", "named"), [(8, "study.db"), (190, "checkpoints")])
def test_a_full_disk_stops_a_search_which_goes_on_later(
    hwnas: Command,
    here: Home,
    found: dict[str, Any],
    small_disk: Callable[[int], Path],
    left_kilobytes: int,
    named: str,
):
    disk = small_disk(4096)
    shutil.copytree(here.folder / "runs", disk / "runs", ignore=shutil.ignore_patterns("tiny-*"))
    filler = disk / "filler"
    space = os.statvfs(disk)
    filler.write_bytes(bytes(space.f_bavail * space.f_frsize - (left_kilobytes << 10)))
    answer = search(hwnas, here, "--runs", disk / "runs")
    refused(answer, named)
    assert "full" in answer.err or "No space left" in answer.err
    filler.unlink()
    assert search(hwnas, here, "--runs", disk / "runs").status == 0


# ---- Ctrl-C ------------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_with_130_and_one_line(home: Home, tmp_path: Path):
    arguments = ["train", "--space", home.space, "--epochs", "5000", "--runs", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-m", "hwnas", *arguments], env=home.environment, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("Training the supernet")
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(60) == 130
    assert rest == "Stopped. What was finished is kept; run the same command again to go on.\n"
