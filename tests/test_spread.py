"""Agreement: training on several devices gives the weights that training on one gives."""

import os
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
split_ratio = ["1/2", "1/4"]
kernel = [3, 5]
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
data = DataSet("noise", ("a", "b"), 8, split(TrainSplit, 64), split(ValidationSplit, 8), split(TestSplit, 8), flip=True)
def paths(step):
    draw = Random(step)
    return np.array([space.encode(space.sample(draw)) for _ in range(2)], np.int32)
model = train(Supernet(space, rngs=nnx.Rngs(0)), data, Recipe(2, 16), Path(sys.argv[1]), paths=paths,
              distils=sys.argv[3] == "True")
leaves = jax.tree.leaves(nnx.split(model, nnx.Param)[1])
devices = {len(leaf.sharding.device_set) for leaf in leaves}
assert devices == {jax.device_count()} == {int(sys.argv[4])}, devices
np.savez(sys.argv[2], *map(np.asarray, leaves))
"""


def training(folder: Path, devices: int, distils: bool) -> "subprocess.Popen[bytes]":
    """A process with so many devices, which writes the weights after eight steps to `DEVICES.npz`."""
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, folder / str(devices), folder / f"{devices}.npz", str(distils), str(devices)],
        env=os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK_COMPILE}"},
    )


@pytest.mark.parametrize("distils", [False, True])
def test_four_devices_train_the_weights_that_one_device_trains(tmp_path: Path, distils: bool):
    processes = [training(tmp_path, devices, distils) for devices in (4, 1)]  # at the same time
    assert [process.wait() for process in processes] == [0, 0]
    found, expected = (np.load(tmp_path / f"{devices}.npz") for devices in (4, 1))
    assert len(found.files) == len(expected.files)
    for name in expected.files:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-5)
