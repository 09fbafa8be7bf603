"""Property: networks of a space that train side by side reach what each reaches on its own."""

from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from hwnas import side_by_side
from hwnas.checkpoints import newest_checkpoint
from hwnas.data import DataSet, TestSplit, TrainSplit, ValidationSplit
from hwnas.jax_layers import Form
from hwnas.side_by_side import accuracies_from_scratch, at_a_time
from hwnas.space import lower
from hwnas.space_toml import parse_space
from hwnas.stages import Job
from hwnas.trained import retrained

SPACE = parse_space("""
name = "small"
input_size = 8
classes = 2
[stem]
channels = 8
stride = 1
max_pool = false
[unit]
split_ratio = ["1/2"]
kernel = [3]
squeeze_excite = [false]
residual = [false, true]
groups = [1]
extra_depthwise = [false]
[[stage]]
depth = [1, 2]
width = [16, 8]
[head]
channels = 8
""")


@pytest.fixture
def job() -> Job:
    """Two classes that differ in brightness, hard to tell apart after four steps."""
    rng = np.random.default_rng(0)

    def split(kind, count):
        labels = np.arange(count, dtype=np.int32) % 2
        images = (
            rng.integers(0, 200, (count, 8, 8, 3), np.uint8)
            + np.uint8(10) * labels.astype(np.uint8)[:, None, None, None]
        )
        return kind(images, labels)

    data = DataSet(
        "bright", ("no", "yes"), 8, split(TrainSplit, 32), split(ValidationSplit, 200), split(TestSplit, 2), True
    )
    return Job(SPACE, data, ("small", "bright"), batch_size=16, retrain_epochs=2)


@pytest.mark.usefixtures("quick_compile")
def test_accuracies_are_those_of_a_training_alone(job: Job, tmp_path: Path):
    rng = Random(0)
    architectures = list({SPACE.sample(rng) for _ in range(3)})
    together, checkpoints = accuracies_from_scratch(job, architectures, tmp_path, Form(control_flow=False))
    assert newest_checkpoint(tmp_path / checkpoints)
    alone = retrained(job, lower(SPACE, architectures[1]), tmp_path).validation_accuracy
    assert together[1] == pytest.approx(alone, abs=0.015)  # three images that lie on the border
    assert len(set(together)) > 1


def test_a_group_fills_the_memory_and_groups_are_even(job: Job, monkeypatch: pytest.MonkeyPatch):
    assert not side_by_side.helps()  # the tests run on a CPU
    assert at_a_time(job, 21) == 21
    larger = replace(job, batch_size=65536)
    assert at_a_time(larger, 21) in range(1, 21)
    monkeypatch.setattr(side_by_side, "MEMORY_SHARE", 1e-9)
    assert at_a_time(job, 21) == 1
