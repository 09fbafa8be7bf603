"""Contract: a supernet as a file is found again as it was, up to 16 bit, and what is wrong with a file is said."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import TINY, Answer, Home
from flax import nnx
from safetensors.numpy import load_file, save_file

from hwnas.data import load_data, stratified_subset
from hwnas.errors import HwnasError
from hwnas.jax_network import FixedNetwork
from hwnas.pipeline import Plan, find
from hwnas.scoring import Scorer
from hwnas.space import lower
from hwnas.space_toml import load_space, parse_space
from hwnas.stages import Listener, make_job
from hwnas.supernet import Supernet, slice_weights
from hwnas.supernet_file import (
    file_facts,
    read_supernet,
    shipped_supernets,
    stated_digest,
    supernet_path,
    write_supernet,
)

SPACE = parse_space(TINY)
CLASSES = ("cat", "dog")
CIFAR10 = Path(__file__).parents[2] / "shared" / "data" / "cifar10"


def leaves(supernet: Supernet) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.split(supernet, nnx.Param)[1])]


@pytest.fixture
def supernet() -> Supernet:
    return Supernet(SPACE, rngs=nnx.Rngs(4))


@pytest.fixture
def file(tmp_path: Path, supernet: Supernet) -> Path:
    write_supernet(tmp_path / "supernet.safetensors", supernet, {"data": "pets", "classes": CLASSES})
    return tmp_path / "supernet.safetensors"


def test_weights_come_back_in_sixteen_bit(file: Path, supernet: Supernet):
    found = leaves(read_supernet(file, SPACE, CLASSES))
    assert [leaf.dtype for leaf in found] == [np.float32] * len(found)
    for ours, theirs in zip(found, leaves(supernet), strict=True):
        np.testing.assert_array_equal(ours, theirs.astype(np.float16).astype(np.float32))
    assert file.stat().st_size < 2 * sum(leaf.size for leaf in found) + 8192


def test_what_a_file_states_of_itself_tells_it_from_others_and_is_known_without_its_weights(file: Path, tmp_path: Path):
    others = [tmp_path / "other.safetensors", tmp_path / "other facts.safetensors"]
    write_supernet(others[0], Supernet(SPACE, rngs=nnx.Rngs(5)), {"data": "pets", "classes": CLASSES})
    write_supernet(others[1], Supernet(SPACE, rngs=nnx.Rngs(4)), {"data": "dogs", "classes": CLASSES})
    assert len({stated_digest(path) for path in (file, *others)}) == 3
    broken = bytearray(file.read_bytes())
    broken[-1] ^= 1
    others[0].write_bytes(broken)
    assert stated_digest(others[0]) == stated_digest(file)
    with pytest.raises(HwnasError, match="is damaged"):
        read_supernet(others[0], SPACE, CLASSES)


def test_another_space_and_other_classes_are_refused(file: Path):
    with pytest.raises(HwnasError, match="differs from this tiny"):
        read_supernet(file, replace(SPACE, head_channels=16), CLASSES)
    with pytest.raises(HwnasError, match="tells the classes cat, dog apart, and the data has cat, cow"):
        read_supernet(file, SPACE, ("cat", "cow"))


def test_every_damage_is_told(file: Path, tmp_path: Path):
    whole = file.read_bytes()
    for position in np.random.default_rng(0).integers(0, len(whole), 40):
        broken = bytearray(whole)
        broken[position] ^= 1 << int(position) % 8
        file.write_bytes(broken)
        with pytest.raises(HwnasError, match="supernet"):
            read_supernet(file, SPACE, CLASSES)
    for size in (0, 7, 200, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(HwnasError, match="is not a supernet"):
            read_supernet(file, SPACE, CLASSES)
    file.write_bytes(whole)
    save_file(load_file(file), tmp_path / "foreign.safetensors")
    with pytest.raises(HwnasError, match="is not a supernet: its format is 'None'"):
        read_supernet(tmp_path / "foreign.safetensors", SPACE, CLASSES)


def test_weights_that_sixteen_bit_cannot_hold_are_not_written(tmp_path: Path, supernet: Supernet):
    graph, state = nnx.split(supernet, nnx.Param)
    large = nnx.merge(graph, jax.tree.map(lambda leaf: leaf + 1e5, state))
    with pytest.raises(HwnasError, match="finite numbers up to 65,504"):
        write_supernet(tmp_path / "supernet.safetensors", large, {"classes": CLASSES})
    assert not list(tmp_path.iterdir())


def test_a_search_takes_a_supernet_from_a_file_and_trains_none(
    hwnas: Callable[..., Answer], here: Home, found: dict[str, Any], tmp_path: Path
):
    (file,) = (here.folder / "runs").glob("supernet-*/supernet.safetensors")
    facts = json.loads(hwnas("show", file, "--json").out)
    assert facts["method"] == "single-path"
    stages: list[str] = []
    job = make_job(
        here.space, "digits", listener=Listener(stages.append), runs=tmp_path / "runs", retrain_epochs=1,
        supernet=str(file),
    )  # fmt: skip
    folder, result = find(job, Plan(1000, trials=4))
    assert not [stage for stage in stages if stage.startswith("Training the supernet")]
    theirs = {json.dumps(one["architecture"]): one["accuracy"] for one in found["scored"]}
    ours = {json.dumps(one.architecture): one.accuracy for one in result.scored}
    assert len(ours) == 4
    for architecture in ours.keys() & theirs.keys():
        assert ours[architecture] == pytest.approx(theirs[architecture], abs=0.05)
    assert json.loads((folder / "run.json").read_text())["supernet"] == str(file.resolve())
    answer = hwnas("search", "--budget-ms", 1, "--space", here.space, "--supernet", tmp_path / "none")
    assert answer.status == 2
    assert "There is no supernet '" in answer.err


def test_a_training_that_starts_from_a_supernet_s_file_goes_on_from_its_weights(
    hwnas: Callable[..., Answer], here: Home, found: dict[str, Any], tmp_path: Path
):
    (file,) = (here.folder / "runs").glob("supernet-*/supernet.safetensors")
    still = "--space", here.space, "--epochs", 1, "--batch-size", 64, "--learning-rate", 1e-9, "--runs", tmp_path
    folders = [json.loads(hwnas("train", *still, "--json", *more).out)["supernet"] for more in ((), ("--from", file))]
    assert folders[0] != folders[1]
    facts = file_facts(Path(folders[1]) / "supernet.safetensors")
    assert facts["start"]["sha256"] == stated_digest(file)
    assert facts["start"]["recipe"] == file_facts(file)["recipe"]
    theirs, *ours = (load_file(path) for path in (file, *(Path(one) / "supernet.safetensors" for one in folders)))
    new, gone_on = (sum(float(abs(one[name] - theirs[name]).max()) for name in theirs) for one in ours)
    assert gone_on < 1e-3 < 1 < new
    answer = hwnas("train", "--space", here.space, "--from", tmp_path / "none")
    assert answer.status == 2
    assert "There is no supernet '" in answer.err


def test_what_cannot_be_searched_is_refused_before_anything_is_measured(here: Home, found: dict[str, Any]):
    (file,) = (here.folder / "runs").glob("supernet-*/supernet.safetensors")
    stages: list[str] = []
    job = make_job("shufflenet-tiny", "digits", listener=Listener(stages.append), supernet=str(file))
    with pytest.raises(HwnasError, match="differs from this shufflenet-tiny"):
        find(job, Plan(1000))
    assert not stages
    with pytest.raises(HwnasError, match="--retrain-epochs 0 leaves them so"):
        find(replace(job, retrain_epochs=0), Plan(1000, from_scratch=True))
    assert not stages
    with pytest.raises(HwnasError, match="Train with single-path"):
        make_job("shufflenet-tiny", "digits", method="fair", within_ms=1.0)


@pytest.fixture(params=shipped_supernets())
def shipped(request: pytest.FixtureRequest) -> tuple[Path, Supernet]:
    """The file of a supernet that comes with hwnas, and what is read from it for the space that it names."""
    path = supernet_path(request.param)
    facts = file_facts(path)
    space = replace(load_space(facts["space"]), classes=len(facts["classes"]))
    return path, read_supernet(path, space, facts["classes"])


def test_a_supernet_that_comes_with_hwnas_is_whole_small_and_has_its_model_card(shipped: tuple[Path, Supernet]):
    path, supernet = shipped
    assert path.stat().st_size <= 12_000_000
    assert f"`{supernet.space.name}`" in path.with_suffix(".md").read_text()


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="the Parquet files of CIFAR-10 are not beside the checkout")
def test_the_supernet_of_cifar10_tells_images_that_it_did_not_see_apart(shipped: tuple[Path, Supernet]):
    _, supernet = shipped
    data = load_data(CIFAR10, image_size=32)
    smallest = supernet.space.smallest
    network = lower(supernet.space, smallest)
    model = FixedNetwork(network, rngs=nnx.Rngs(0), weights=slice_weights(supernet, smallest))
    accuracy = Scorer(model, data, calibration_images=512).accuracy(stratified_subset(data.validation, 1000, 0))
    assert 0.62 < accuracy < 0.70  # the model card says 66.0 % on all of them


def test_a_supernet_that_is_neither_a_name_nor_a_file_is_refused_with_the_names_that_there_are():
    with pytest.raises(HwnasError, match=r"no supernet 'cifar11'.* one of cifar10\."):
        supernet_path("cifar11")
