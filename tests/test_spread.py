"""Agreement: several devices, of one process or of several, train and score as one device does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
TRAIN = """
import sys
from pathlib import Path
from random import Random
import jax, numpy as np
from flax import nnx
from hwnas.data import DataSet, TestSplit, TrainSplit, ValidationSplit
from hwnas.space_toml import parse_space
from hwnas import processes
from hwnas.scoring import Scorer
from hwnas.spread import spread_of
from hwnas.supernet import Supernet
from hwnas.training import Recipe, train

space = parse_space('''
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
squeeze_excite = [false, true]
residual = [false]
groups = [1, 2]
extra_depthwise = [false]
[[stage]]
depth = [1, 2]
width = [8, 16]
[head]
channels = 8
''')
rng = np.random.default_rng(0)
def split(kind, count):
    return kind(rng.integers(0, 256, (count, 8, 8, 3), np.uint8), np.arange(count, dtype=np.int32) % 2)
splits = split(TrainSplit, 64), split(ValidationSplit, 200), split(TestSplit, 8)
data = DataSet("noise", ("a", "b"), 8, *splits, flip=True)
def paths(step):
    draw = Random(step)
    return np.array([space.encode(space.sample(draw)) for _ in range(2)], np.int32)
folder, out, distils, devices, where = sys.argv[1:]
if where:
    processes.join(where)
assert jax.local_device_count() == int(devices) and jax.device_count() == int(devices) * processes.count()
mesh = spread_of(8).mesh
assert (mesh.size if mesh else 1) == jax.device_count()
scorer, draw = Scorer(Supernet(space, rngs=nnx.Rngs(0)), data, batch_size=16, calibration_images=48), Random(1)
codes = [space.encode(space.sample(draw)) for _ in range(3)]
accuracies = [scorer.accuracy(data.validation, code) for code in codes]
parts = [sum(scorer.correct(data.validation, code, part, 3) for part in range(3)) / 200 for code in codes]
assert parts == accuracies
model = train(Supernet(space, rngs=nnx.Rngs(0)), data, Recipe(2, 16), Path(folder), paths=paths,
              distils=distils == "True")
assert Path(folder).exists() == processes.leads()
np.savez(out, accuracies, *map(np.asarray, jax.tree.leaves(nnx.split(model, nnx.Param)[1])))
if where:
    processes.part()
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def training(folder: Path, name: str, devices: int, distils: bool, where: str = "") -> "subprocess.Popen[bytes]":
    """A process with so many devices, which writes accuracies and the weights after eight steps to `NAME.npz`."""
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, folder / name, folder / f"{name}.npz", str(distils), str(devices), where],
        env=os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK_COMPILE}"},
    )


@pytest.mark.parametrize(("processes", "distils"), [(1, True), (2, False)], ids=["one process", "two processes"])
def test_four_devices_train_and_score_as_one_device_does(tmp_path: Path, processes: int, distils: bool):
    port, devices = free_port(), 4 // processes
    places = [f"{this}/{processes}@127.0.0.1:{port}" if processes > 1 else "" for this in range(processes)]
    together = [training(tmp_path, f"process {this}", devices, distils, place) for this, place in enumerate(places)]
    together.append(training(tmp_path, "one device", 1, distils))
    assert [process.wait() for process in together] == [0] * len(together)
    expected = np.load(tmp_path / "one device.npz")
    for this in range(processes):
        found = np.load(tmp_path / f"process {this}.npz")
        assert len(found.files) == len(expected.files)
        accuracies, *weights = expected.files
        assert found[accuracies].tolist() == expected[accuracies].tolist()
        for leaf in weights:
            np.testing.assert_allclose(found[leaf], expected[leaf], rtol=1e-4, atol=1e-5)
