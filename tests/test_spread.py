"""Agreement: several devices, of one process or of several, train and score as one device does."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
TRAIN = """
import os, signal, sys
from pathlib import Path
from random import Random
import jax, numpy as np
from flax import nnx
from hwnas.data import DataSet, TestSplit, TrainSplit, ValidationSplit
from hwnas.space_toml import parse_space
from hwnas import processes, training
from hwnas.errors import HwnasError
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
    if step == int(dies_at or -1):
        os.kill(os.getpid(), signal.SIGKILL)
    draw = Random(step)
    return np.array([space.encode(space.sample(draw)) for _ in range(2)], np.int32)
folder, out, distils, devices, where, dies_at = sys.argv[1:]
training.CHECKPOINT_SECONDS = -1.0
training.prepare_process(Path(folder).parent / "compiled")
if where:
    processes.join(where)
assert jax.local_device_count() == int(devices) and jax.device_count() == int(devices) * processes.count()
mesh = spread_of(8).mesh
assert (mesh.size if mesh else 1) == jax.device_count()
scorer, draw = Scorer(Supernet(space, rngs=nnx.Rngs(0)), data, batch_size=16, calibration_images=48), Random(1)
codes = [space.encode(space.sample(draw)) for _ in range(3)] if distils == "True" else []
accuracies = [scorer.accuracy(data.validation, code) for code in codes]
parts = [sum(scorer.correct(data.validation, code, part, 3) for part in range(3)) / 200 for code in codes]
assert parts == accuracies
try:
    model = train(Supernet(space, rngs=nnx.Rngs(0)), data, Recipe(2, 16), Path(folder), paths=paths,
                  distils=distils == "True")
except HwnasError as error:
    processes.fail(error)
    print(error)
    processes.end_at_once(2)
assert Path(folder).exists() == processes.leads()
np.savez(out, accuracies, *map(np.asarray, jax.tree.leaves(nnx.split(model, nnx.Param)[1])))
if where:
    processes.part()
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def training(
    folder: Path, name: str, devices: int, distils: bool, where: str = "", dies_at: str = ""
) -> "subprocess.Popen[str]":
    """A process with so many devices, which writes accuracies and the weights after eight steps to `NAME.npz`.

    What it writes to standard error lies in `NAME.errors`.
    """
    words = (folder / name, folder / f"{name}.npz", str(distils), str(devices), where, dies_at)
    with (folder / f"{name}.errors").open("w") as errors:
        return subprocess.Popen(
            [sys.executable, "-c", TRAIN, *words],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK_COMPILE}"},
        )


def check_agreement(folder: Path, name: str) -> None:
    """The same accuracies, and weights that differ in rounding."""
    found, expected = (np.load(folder / f"{which}.npz") for which in (name, "one device"))
    accuracies, *weights = expected.files
    assert found[accuracies].tolist() == expected[accuracies].tolist()
    assert len(found.files) == len(expected.files)
    for leaf in weights:
        np.testing.assert_allclose(found[leaf], expected[leaf], rtol=1e-4, atol=1e-5)


def test_four_devices_train_and_score_as_one_device_does(tmp_path: Path):
    together = [training(tmp_path, "four devices", 4, True), training(tmp_path, "one device", 1, True)]
    assert [process.wait() for process in together] == [0, 0]
    check_agreement(tmp_path, "four devices")


def test_two_processes_train_as_one_device_does_also_after_one_of_them_was_killed(tmp_path: Path):
    def pair(dies_at: str) -> "tuple[subprocess.Popen[str], subprocess.Popen[str]]":
        place = f"2@127.0.0.1:{free_port()}"
        leads = training(tmp_path, "leads", 2, False, f"0/{place}")
        return leads, training(tmp_path, "follows", 2, False, f"1/{place}", dies_at)

    alone, (leads, follows) = training(tmp_path, "one device", 1, False), pair(dies_at="5")
    assert (follows.wait(), alone.wait()) == (-signal.SIGKILL, 0)
    said = leads.communicate()[0]
    if leads.returncode == -signal.SIGABRT:  # JAX itself, if Gloo has not noticed for 100 seconds
        assert said == ""
        assert "the JAX distributed service detected fatal errors" in (tmp_path / "leads.errors").read_text()
    else:
        assert "Another process ended without a word" in said
        assert "Run the same command in all processes again" in said
        assert leads.returncode == 2
    # it died while it prepared step 5, and took part in the one before or not
    assert any((tmp_path / "leads" / f"step-0000000{step}").exists() for step in (4, 5))
    leads, follows = pair(dies_at="")
    assert (leads.communicate()[0], leads.returncode, follows.wait()) == ("", 0, 0)
    check_agreement(tmp_path, "leads")
    check_agreement(tmp_path, "follows")
