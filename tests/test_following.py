"""Agreement: two processes find what one process finds, and only one of them speaks and writes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY
from test_lookup import random_table

from hwnas.candidate_scoring import scorer_of
from hwnas.errors import HwnasError
from hwnas.following import _same_job
from hwnas.network import Network
from hwnas.network_json import from_json, to_json
from hwnas.space import lower
from hwnas.space_toml import parse_space
from hwnas.stages import make_job, settings_of, trained_supernet

QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
SEARCH = """
import json, sys
from flax import nnx
from hwnas.following import gathered
from hwnas.latency import Prediction
from hwnas.network import macs
from hwnas.candidate_scoring import SharedScorer
from hwnas.search import search
from hwnas.space import lower
from hwnas.stages import make_job
from hwnas.supernet import Supernet

def latency(architecture):
    ms = macs(lower(job.space, architecture)) / 1e6
    return Prediction(ms, ms)

where, folder = sys.argv[1:]
with gathered(where or None):
    job = make_job("tiny.toml", "noise.npz")
    supernet = Supernet(job.space, rngs=nnx.Rngs(1))
    kernel = supernet.head["linear.kernel"]
    kernel[...] = kernel[...] - kernel[...].mean(0)  # else all images are of one class
    score = SharedScorer(supernet, job.data)
    result = search(job.space, lambda a: score(job.space.encode(a)), latency, budget_ms=1e3, device="cpu", trials=6,
                    storage=f"{folder}.db", name="study")
print(json.dumps([[one.architecture.to_json(), one.accuracy, one.number] for one in result.scored]))
"""
FEW = """
name = "few"
input_size = 8
classes = 4
stem = { channels = 8, stride = 1, max_pool = false }
head = { channels = 16 }
[unit]
split_ratio = ["1/2"]
kernel = [3]
squeeze_excite = [false]
residual = [false]
groups = [1]
extra_depthwise = [false]
[[stage]]
depth = [1]
width = [8, 16, 24, 32]
"""
"""Four architectures."""
HWNAS = "import sys; from hwnas.cli import main; sys.argv[0] = 'hwnas'; main()"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A space, coloured noise to classify, and an architecture."""
    rng, labels = np.random.default_rng(0), np.arange(500) % 4
    colours, noise = rng.integers(0, 192, (500, 1, 1, 3)), rng.integers(0, 64, (500, 16, 16, 3))
    np.savez(tmp_path / "noise.npz", images=(colours + noise).astype(np.uint8), labels=labels)
    (tmp_path / "tiny.toml").write_text(TINY)
    (tmp_path / "architecture.json").write_text(parse_space(TINY).largest.to_json())
    return tmp_path


def start(folder: Path, code: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=os.environ | {"XLA_FLAGS": QUICK_COMPILE, "HWNAS_CACHE": str(folder / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def places() -> list[str]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return [f"{this}/2@127.0.0.1:{port}" for this in range(2)]


def test_a_network_comes_back_from_json():
    space = parse_space(TINY)
    network = lower(space, space.largest)
    found = from_json(json.loads(json.dumps(to_json(network))))
    assert isinstance(found, Network)
    assert found == network


def test_a_search_in_two_processes_scores_the_architectures_that_one_process_scores(folder: Path):
    searches = [start(folder, SEARCH, where, name) for where, name in zip(["", *places()], "abc", strict=True)]
    (alone, _), leads, follows = (search.communicate() for search in searches)
    assert [search.returncode for search in searches] == [0, 0, 0]
    assert follows == ("", "")
    assert not (folder / "c.db").exists()
    assert leads == (alone, "")
    assert len({accuracy for _, accuracy, _ in json.loads(alone)}) > 2


def test_of_two_processes_that_train_one_network_only_the_first_speaks_and_writes(folder: Path):
    retrain = ["retrain", "architecture.json", "--space", "tiny.toml", "--data", "noise.npz", "--epochs", "1", "--json"]
    both = [
        start(folder, HWNAS, *retrain, "--run", f"run{n}", "--processes", where) for n, where in enumerate(places())
    ]
    (out, said), follows = (process.communicate() for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert (said, follows) == ("", ("", ""))
    assert json.loads(out)["run"] == "run0"
    assert (folder / "run0" / "run.json").is_file()
    assert not (folder / "run1").exists()


@pytest.mark.usefixtures("quick_compile")
def test_two_processes_judge_a_supernet_by_the_scores_that_one_process_finds(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HWNAS_CACHE", str(folder / "cache"))
    (folder / "few.toml").write_text(FEW)
    job = make_job(str(folder / "few.toml"), str(folder / "noise.npz"), runs=folder / "runs", epochs=1, batch_size=32)
    path, supernet = trained_supernet(job)
    random_table(job.space).save(folder / "table.json")
    judge = ["--table", "table.json", "--architectures", "4", "--epochs", "1", "--trials", "3", "--budget-ms", "100"]
    leads, follows = (
        start(folder, HWNAS, "trust", str(runs / path.name), *judge, "--json", "--processes", place)
        for runs, place in zip((path.parent, folder / "nowhere"), places(), strict=True)
    )
    scorer = scorer_of(supernet, job.data)
    (out, _), said = leads.communicate(), follows.communicate()
    assert [leads.returncode, follows.returncode] == [0, 0]
    assert said == ("", "")
    assert not (folder / "nowhere").exists()
    report = json.loads(out)
    assert Path(report["report"], "trust.json").is_file()
    everyone = [*report["judged"], *report["winners"].values()]
    assert len({json.dumps(one["architecture"]) for one in everyone}) == len(report["judged"]) == 4
    for one in everyone:
        code = job.space.encode(job.space.from_json(json.dumps(one["architecture"])))
        assert one["inherited"] == scorer.accuracy(job.data.validation, code)
        assert 0 <= one["from_scratch"][0] <= 1
    assert len({one["inherited"] for one in everyone}) > 1


def test_a_process_that_sees_other_images_refuses(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HWNAS_CACHE", str(folder / "cache"))
    job = make_job(str(folder / "tiny.toml"), str(folder / "noise.npz"))
    order = {"settings": settings_of(job), "space_digest": job.space.digest, "data_fingerprint": "other"}
    with pytest.raises(HwnasError, match="work on the same images"):
        _same_job(order)
