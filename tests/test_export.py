"""Agreement: an exported model gives the numbers that JAX gives on real images, and a wrong one is seen."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from flax import nnx

from hwnas.data import DataSet, TrainSplit, load_data, normalize
from hwnas.errors import HwnasError
from hwnas.export import (
    PROOF_IMAGES,
    agreement,
    file_digest,
    measure_models,
    network_weights,
    onnx_bytes,
    operator_counts,
    opset,
)
from hwnas.jax_network import FixedNetwork
from hwnas.network import Network, NetworkBuilder, weight_shapes
from hwnas.opening import open_device
from hwnas.scoring import Scorer
from hwnas.training import Recipe, train
from hwnas.units import UnitChoice, head, shufflenet_v2_unit, stem


@dataclass
class Trained:
    """A small trained network and all that its proof takes."""

    network: Network
    data: DataSet
    scorer: Scorer
    statistics: Any
    weights: dict[str, np.ndarray]

    def model(self, changes: Mapping[str, np.ndarray] | None = None, batch: int = 1, **metadata: str) -> bytes:
        return onnx_bytes(
            self.network, self.weights | dict(changes or {}), batch=batch, precision="fp32", metadata=metadata
        )

    def proof(self, model: bytes, batch: int = 1) -> tuple[int, float, float]:
        return agreement(model, self.scorer, self.statistics, self.data, batch=batch)


def small_network() -> Network:
    b = NetworkBuilder("small", (3, 8, 8))
    x = stem(b, b.input, 8, 1, max_pool=False)
    for index, choice in enumerate((UnitChoice(), UnitChoice(squeeze_excite=True, groups=2)), 1):
        with b.unit(f"stage2.{index}"):
            x = shufflenet_v2_unit(b, x, 16, 2 if index == 1 else 1, choice)
    return b.build(head(b, x, 16, 10))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    data, network = load_data("digits", image_size=8), small_network()
    recipe = Recipe(epochs=2, batch_size=64)
    model = train(FixedNetwork(network, rngs=nnx.Rngs(0)), data, recipe, tmp_path_factory.mktemp("trained"))
    scorer = Scorer(model, data)
    statistics = scorer.statistics()
    return Trained(network, data, scorer, statistics, network_weights(model, statistics))


# ---- the proof ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 48])
def test_an_exported_model_agrees_with_jax_on_a_thousand_real_images(trained: Trained, batch: int):
    images, share, largest = trained.proof(trained.model(batch=batch), batch)  # 48 does not divide the 64 of the scorer
    assert images >= PROOF_IMAGES >= 1000
    assert share == 1.0
    assert largest < 1e-4


def test_one_wrong_weight_shows_in_the_largest_difference(trained: Trained):
    kernel = trained.weights["head.linear.kernel"].copy()
    kernel[3, 4] += 1
    _, share, largest = trained.proof(trained.model({"head.linear.kernel": kernel}))
    assert 0 < share <= 1
    assert largest > 0.1


def test_wrong_statistics_show_in_the_share_that_agrees(trained: Trained):
    name = "stage2.2.pw2_bn.mean"
    _, share, largest = trained.proof(trained.model({name: trained.weights[name] + 3}))
    assert share < 0.99
    assert largest > 0.1


def test_a_model_that_gives_no_numbers_does_not_pass_as_one_without_difference(trained: Trained):
    bias = np.full(10, np.nan, np.float32)
    assert np.isnan(trained.proof(trained.model({"head.linear.bias": bias}))[2])


def test_the_proof_refuses_too_few_images_with_both_numbers(trained: Trained):
    split = trained.data.train
    few = replace(trained.data, train=TrainSplit(split.images[:1000], split.labels[:1000]))
    with pytest.raises(HwnasError, match=r"compares 1024 real images; .* digits has 1000\. Give a larger data set"):
        agreement(trained.model(), trained.scorer, trained.statistics, few, batch=1)


def test_the_proof_reads_training_images_only(trained: Trained):
    untouched = replace(trained.data, validation=None, test=None)
    assert agreement(trained.model(), trained.scorer, trained.statistics, untouched, batch=1)[1] == 1.0


# ---- what is in the file -----------------------------------------------------------------------------------------


def test_the_weights_of_a_trained_network_are_all_that_its_nodes_own(trained: Trained):
    expected = {
        f"{n.name}.{suffix}": shape for n in trained.network.nodes for suffix, shape in weight_shapes(n).items()
    }
    assert {name: values.shape for name, values in trained.weights.items()} == expected


def test_norms_are_folded_and_nothing_but_plain_operators_is_left(trained: Trained):
    counts = operator_counts(trained.model())
    assert "BatchNormalization" not in counts
    assert counts["Conv"] == 1 + 5 + 5 + 1  # stem, side and main branch, main branch with squeeze-excite, head
    assert counts["Gemm"] == 1
    assert list(counts.values()) == sorted(counts.values(), reverse=True)
    model = onnx.load_from_string(trained.model())
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset(trained.model()))]
    assert opset(trained.model()) >= 17


def test_the_metadata_stands_in_the_model_as_onnx_runtime_reads_it(trained: Trained):
    session = onnxruntime.InferenceSession(trained.model(space="made up", predicted_ms="1.5"))
    assert session.get_modelmeta().custom_metadata_map == {"space": "made up", "predicted_ms": "1.5"}


def test_input_and_output_have_the_batch_that_was_asked_for_and_run_on_normalised_images(trained: Trained):
    session = onnxruntime.InferenceSession(trained.model(batch=4))
    assert [(value.name, value.shape) for value in session.get_inputs()] == [("image", [4, 3, 8, 8])]
    assert [(value.name, value.shape) for value in session.get_outputs()] == [("logits", [4, 10])]
    images = trained.data.train.images[:4]
    inputs = np.asarray(normalize(images, trained.data.mean, trained.data.std)).transpose(0, 3, 1, 2)
    (found,) = session.run(None, {"image": inputs})
    np.testing.assert_allclose(found, trained.scorer.logits(images, trained.statistics), atol=1e-4)


def test_a_weight_that_is_missing_or_misshapen_makes_no_model(trained: Trained):
    weights = {name: values for name, values in trained.weights.items() if name != "head.conv.kernel"}
    with pytest.raises(KeyError, match=r"head\.conv\.kernel"):
        onnx_bytes(trained.network, weights, batch=1, precision="fp32", metadata={})
    with pytest.raises(onnx.shape_inference.InferenceError, match=r"head\.linear.* 17 and 16"):
        trained.model({"head.linear.kernel": np.zeros((17, 10), np.float32)})


def test_models_are_measured_in_the_order_in_which_they_were_given(trained: Trained):
    models = [trained.model(), trained.model(batch=256)]  # so much more work that no noise is as long
    with open_device("cpu") as cpu:
        small, large = measure_models(cpu, models, threads=1)
    assert min(len(small.samples_ms), len(large.samples_ms)) >= 3
    assert 0 < small.median_ms < large.median_ms


def test_the_digest_of_a_file_is_its_sha256(tmp_path: Path):
    (tmp_path / "model.onnx").write_bytes(b"bytes")
    assert file_digest(tmp_path / "model.onnx") == hashlib.sha256(b"bytes").hexdigest()
