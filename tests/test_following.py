"""Agreement: a search in two processes finds what one process finds, and only one of them speaks and writes."""

import json
import socket
import subprocess
import sys
from typing import Any

import steady
from conftest import Home
from flax import nnx

from hwnas.data import load_data
from hwnas.network import Network
from hwnas.network_json import from_json, to_json
from hwnas.space import lower
from hwnas.space_toml import load_space
from hwnas.supernet import Supernet
from hwnas.supernet_file import write_supernet

QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
SEARCH = (
    "search --space tiny.toml --supernet supernet.safetensors --budget-ms 1000 --trials 6 --retrain-epochs 1 --json"
)


def test_a_network_comes_back_from_json(home: Home):
    network = lower(load_space(home.space), load_space(home.space).largest)
    found = from_json(json.loads(json.dumps(to_json(network))))
    assert isinstance(found, Network)
    assert found == network


def start(home: Home, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, steady.__file__, *SEARCH.split(), "--trials", "6", *arguments],
        cwd=home.folder,
        env=home.environment | {"XLA_FLAGS": QUICK_COMPILE},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process: "subprocess.Popen[str]") -> dict[str, Any]:
    out, said = process.communicate()
    assert (process.returncode, said) == (0, "")
    return json.loads(out)


def test_a_search_in_two_processes_scores_the_architectures_that_one_process_scores(home: Home):
    space = load_space(home.space)
    classes = load_data("digits", image_size=space.input_size).classes
    facts = {"classes": classes}
    write_supernet(home.folder / "supernet.safetensors", Supernet(space, rngs=nnx.Rngs(0)), facts)
    alone = result(start(home, "--runs", "alone"))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    places = [("--runs", name, "--processes", f"{this}/2@127.0.0.1:{port}") for this, name in enumerate(("led", "no"))]
    leads, follows = (start(home, *place) for place in places)
    together = result(leads)
    assert follows.communicate() == ("", "")
    assert follows.returncode == 0
    assert not (home.folder / "no").exists()
    assert (home.folder / together["run"] / "model.onnx").is_file()
    assert together["scored"] == alone["scored"]
    assert len({candidate["accuracy"] for candidate in together["scored"]}) > 2
