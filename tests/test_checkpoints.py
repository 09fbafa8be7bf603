"""Property: a checkpoint comes back bit for bit, or not at all."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest

from hwnas.checkpoints import SUMS, load_checkpoint, newest_checkpoint, save_checkpoint
from hwnas.errors import HwnasError


def tree(seed: int = 0) -> tuple:
    """Arrays of several shapes and kinds, an empty one among them, under names that no file system likes."""
    rng = np.random.default_rng(seed)
    named = {"a/b.c": rng.standard_normal((3, 4), np.float32), "..": rng.standard_normal(5), "ü 'x'\n": np.float32(3)}
    return named, [rng.integers(0, 9, (2, 2)), {"count": np.array(4, np.int32), "later": np.zeros((0, 3))}]


def same(found, expected) -> None:
    import jax

    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to be copied and broken."""
    return save_checkpoint(tmp_path_factory.mktemp("written"), 7, tree())


@pytest.fixture
def checkpoint(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / written.name))


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def test_a_checkpoint_comes_back_bit_for_bit_whatever_its_arrays_are_called(checkpoint: Path):
    same(load_checkpoint(checkpoint, tree(1)), tree())


def test_every_file_has_a_sum_that_sha256sum_can_check(checkpoint: Path):
    listed = [line.split("  ", 1)[1] for line in (checkpoint / SUMS).read_text().splitlines()]
    assert listed == [str(path.relative_to(checkpoint)) for path in files_of(checkpoint) if path.name != SUMS]
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=checkpoint, check=True)


def test_a_flipped_bit_in_any_file_is_found(checkpoint: Path):
    rng = Random(0)
    for path in files_of(checkpoint):
        content = path.read_bytes()
        places = range(len(content)) if path.name == SUMS else rng.sample(range(len(content)), 5)
        for place in places:
            broken = bytearray(content)
            broken[place] ^= 1 << rng.randrange(8)
            path.write_bytes(broken)
            with pytest.raises(HwnasError, match="is damaged"):
                load_checkpoint(checkpoint, tree())
        path.write_bytes(content)
    same(load_checkpoint(checkpoint, tree()), tree())


def test_the_end_of_a_line_of_the_sums_is_checked_to_the_bit(checkpoint: Path):
    sums = checkpoint / SUMS
    sums.write_bytes(sums.read_bytes()[:-1] + b"\x0b")  # for Python a line may end so, too
    with pytest.raises(HwnasError, match=f"its {SUMS} was changed since it was written"):
        load_checkpoint(checkpoint, tree())


def test_a_truncated_a_missing_and_a_foreign_file_are_named(checkpoint: Path):
    largest = max(files_of(checkpoint / "arrays"), key=lambda path: path.stat().st_size)
    name, content = str(largest.relative_to(checkpoint)), largest.read_bytes()
    largest.write_bytes(content[:-1])
    with pytest.raises(HwnasError, match=f"{name} was changed since it was written"):
        load_checkpoint(checkpoint, tree())
    largest.unlink()
    with pytest.raises(HwnasError, match=f"{name} is missing"):
        load_checkpoint(checkpoint, tree())
    largest.write_bytes(content)
    (checkpoint / "notes.txt").write_text("mine")
    with pytest.raises(HwnasError, match=r"notes.txt was changed since it was written"):
        load_checkpoint(checkpoint, tree())


@pytest.mark.parametrize("content", [None, b"", b"no sums", b"\xff\xfe"])
def test_missing_empty_and_unreadable_sums_are_damage(checkpoint: Path, content: bytes | None):
    (checkpoint / SUMS).unlink()
    if content is not None:
        (checkpoint / SUMS).write_bytes(content)
    with pytest.raises(HwnasError, match=r"is damaged.*Remove that folder"):
        load_checkpoint(checkpoint, tree())


def test_the_checkpoint_of_another_network_is_refused_with_the_array_and_both_shapes(checkpoint: Path):
    named, rest = tree()
    for other, message in (
        (({**named, "..": np.zeros(6)}, rest), r"the shape of 0000.* is \(5,\) there and \(6,\) here"),
        ((named, [*rest, np.zeros(3)]), r"0006.* is missing there and \(3,\) here"),
        ((named, rest[:1]), r"0004.* is \(\) there and missing here"),
    ):
        with pytest.raises(HwnasError, match=f"belongs to another network: .*{message}"):
            load_checkpoint(checkpoint, other)


def test_only_whole_checkpoints_count_and_the_newest_two_are_kept(tmp_path: Path):
    assert newest_checkpoint(tmp_path / "nothing") is None
    unfinished = tmp_path / "unfinished-00000099"
    unfinished.mkdir()
    (tmp_path / "step-00000098 (copy)").mkdir()
    assert newest_checkpoint(tmp_path) is None
    for step in (1, 12, 5):
        save_checkpoint(tmp_path, step, {"x": np.full(3, step)})
    assert newest_checkpoint(tmp_path) == (12, tmp_path / "step-00000012")
    assert sorted(os.listdir(tmp_path)) == ["step-00000005", "step-00000012", "step-00000098 (copy)"]


def test_a_checkpoint_of_the_same_step_takes_the_place_of_the_old_one(tmp_path: Path):
    for seed in (0, 1):
        path = save_checkpoint(tmp_path, 3, tree(seed))
    same(load_checkpoint(path, tree()), tree(1))


def test_saving_and_loading_leave_nothing_on_standard_error_and_no_thread(tmp_path: Path):
    code = """
import sys, threading, time, pathlib
import numpy as np
from hwnas.checkpoints import load_checkpoint, save_checkpoint
path = save_checkpoint(pathlib.Path(sys.argv[1]), 1, {"x": np.ones((3, 4))})
load_checkpoint(path, {"x": np.ones((3, 4))})
for _ in range(200):  # they may still be ending
    if len(threading.enumerate()) > 1:
        time.sleep(0.05)
print(len(threading.enumerate()))
"""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("1\n", "")


def test_a_folder_that_cannot_be_made_is_one_clear_message(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HwnasError, match=r"could not be written: .*Free some space or give another folder"):
        save_checkpoint(tmp_path / "file" / "checkpoints", 1, tree())


def test_what_is_no_fault_of_the_disk_keeps_its_traceback(tmp_path: Path):
    with pytest.raises(ValueError, match="empty"):
        save_checkpoint(tmp_path, 1, {})
    assert os.listdir(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path):
    """A disk of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(options, capture_output=True).returncode:
        pytest.skip("a small disk can only be mounted by root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("step", [1, 2])
def test_on_a_full_disk_there_is_one_message_and_the_checkpoint_before_stays(
    small_disk: Path, caplog: pytest.LogCaptureFixture, step: int
):
    before = save_checkpoint(small_disk, 1, tree())
    noise = np.random.default_rng(0).standard_normal(100_000)
    with pytest.raises(HwnasError, match=f"step-0000000{step} could not be written: the disk is full"):
        save_checkpoint(small_disk, step, {"x": noise})
    assert caplog.records == []  # nothing of Orbax's tracebacks
    assert newest_checkpoint(small_disk) == (1, before)
    assert os.listdir(small_disk) == [before.name]
    same(load_checkpoint(before, tree()), tree())
