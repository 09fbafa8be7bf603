"""A board of another architecture without the hardware: aarch64 under QEMU, behind a real sshd on the loopback.

The user land is made by `python benchmarks/arm64_userland.py`; where it is not, these tests are skipped.
"""

import shutil
from collections.abc import Iterator

import numpy as np
import pytest

from benchmarks.arm64_userland import default_folder, python_of
from benchmarks.loopback import NoServerError, running_sshd
from hwnas.devices import Device, Timing, facts_of, line_to
from hwnas.errors import HwnasError
from hwnas.latency import check_origin
from hwnas.onnx_model import random_weights, to_onnx
from hwnas.opening import open_device
from hwnas.registry import Entry
from hwnas.space import lower
from hwnas.space_toml import load_space

ONCE = Timing(rounds=1, patience_s=0.0, agreeing=1, sample_ms=0.0, least_runs=1, warm_up_runs=1, warm_up_ms=0.0)


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Entry]:
    if not (default_folder() / "done").exists() or not shutil.which("qemu-aarch64-static"):
        pytest.skip("no arm64 user land: apt-get install qemu-user-static; python benchmarks/arm64_userland.py")
    try:
        with running_sshd(tmp_path_factory.mktemp("sshd")) as board:
            yield board.entry("arm-emulated", python=python_of(default_folder() / "root"))
    except NoServerError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def board(entry: Entry) -> Iterator[Device]:
    with Device(entry.name, line_to(entry)) as opened:
        yield opened


def models(precision: str) -> list[bytes]:
    space = load_space("shufflenet-tiny")
    networks = [lower(space, architecture) for architecture in (space.smallest, space.largest)]
    return [to_onnx(n, random_weights(n, 0), precision=precision).SerializeToString() for n in networks]


def test_it_says_that_it_is_emulated_and_is_refused_where_a_real_one_is_asked_for(entry: Entry, board: Device):
    facts = facts_of(entry)
    assert facts["emulated"]
    assert facts["system"].endswith("aarch64")
    conditions = board.conditions()
    assert (conditions.origin, conditions.runtime, conditions.chip) == (
        "emulated", "ONNX Runtime CPU", "aarch64 in QEMU"
    )  # fmt: skip
    with pytest.raises(HwnasError, match="arm-emulated is emulated"):
        check_origin(conditions)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_what_networks_compute_there_agrees_with_this_machine(board: Device, precision: str):
    with open_device("cpu") as cpu:
        for model in models(precision):
            (there,), (here,) = board.outputs(model), cpu.outputs(model)
            limit = 1e-4 if precision == "fp32" else 0.05
            assert np.abs(there - here).max() <= limit * np.abs(here).max()


def test_networks_are_timed_there(board: Device):
    content = models("fp32")
    found = dict(board.measure(content, ONCE))
    assert found.keys() == {0, 1}
    assert found[1].minimum_ms > found[0].minimum_ms > 0
