"""The 8-bit form of a model: close to the float one, and integer inside ONNX Runtime."""

import random
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest

from hwnas.network import BatchNorm, Multiply, NetworkBuilder
from hwnas.onnx_model import random_weights, to_onnx
from hwnas.quantization import activation_ranges
from hwnas.reference import reference
from hwnas.space import lower
from hwnas.space_toml import load_space


def images(network, count, seed=0):
    """Smooth images, since noise looks the same to every random network."""
    rng = np.random.default_rng(seed)
    side = network.input.shape[1]
    coarse = rng.standard_normal((count, 3, 4, 4)).astype(np.float32)
    return np.repeat(np.repeat(coarse, side // 4, axis=2), side // 4, axis=3)


def session(model, optimised=None):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if optimised:
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def logits(model, inputs):
    run = session(model).run
    return np.concatenate([np.asarray(run(None, {"image": image[None]})[0]) for image in inputs])


def both_precisions(network, inputs):
    """The float model and the 8-bit one with ranges from `inputs`; the latter checked."""
    weights = random_weights(network, seed=1)
    exact = to_onnx(network, weights)
    rounded = to_onnx(network, weights, precision="int8", ranges=activation_ranges(exact, inputs))
    onnx.checker.check_model(rounded, full_check=True)
    return exact, rounded


def test_a_random_network_of_the_tiny_space_says_nearly_the_same_in_8_bits():
    space, rng = load_space("shufflenet-tiny"), random.Random(2)
    for _ in range(3):
        network = lower(space, space.sample(rng))
        exact, rounded = both_precisions(network, images(network, 64))
        inputs = images(network, 100, seed=1)
        expected, found = logits(exact, inputs), logits(rounded, inputs)
        error = np.sqrt(np.mean((found - expected) ** 2) / np.mean((expected - expected.mean(0)) ** 2))
        assert 0 < error < 0.2
        assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.85


def test_wrong_ranges_are_seen_in_what_comes_out():
    space = load_space("shufflenet-tiny")
    network = lower(space, space.smallest)
    exact, rounded = both_precisions(network, images(network, 4) / 50)
    inputs = images(network, 4)
    assert np.abs(logits(exact, inputs) - logits(rounded, inputs)).max() > np.abs(logits(exact, inputs)).max() / 2


@pytest.mark.parametrize("ranges", [True, False])
def test_onnx_runtime_computes_every_convolution_and_product_in_integers(tmp_path, ranges):
    space, rng = load_space("shufflenet-tiny"), random.Random(3)
    for architecture in (space.largest, space.sample(rng)):
        network = lower(space, architecture)
        weights = random_weights(network, 0)
        found = activation_ranges(to_onnx(network, weights), images(network, 2)) if ranges else None
        session(to_onnx(network, weights, precision="int8", ranges=found), tmp_path / "optimised.onnx")
        kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
        assert kinds.keys() >= {"QLinearConv", "QGemm", "QLinearConcat", "QLinearMul"}
        assert kinds["QuantizeLinear"] == 1  # the image
        float_kinds = {"Conv", "FusedConv", "Gemm", "Relu", "Add", "Mul", "Concat", "Sigmoid", "GlobalAveragePool"}
        assert not kinds.keys() & (float_kinds | {"DequantizeLinear"})


@pytest.mark.parametrize("name", ["shufflenet-v1-0.5x-g3-megvii", "mobilenet-v2-1.0"])
def test_reference_networks_keep_their_meaning_in_8_bits(name):
    network = reference(name)
    exact, rounded = both_precisions(network, images(network, 2))
    inputs = images(network, 2)
    assert np.corrcoef(logits(exact, inputs).ravel(), logits(rounded, inputs).ravel())[0, 1] > 0.99


def test_tensors_that_are_read_out_and_read_on_and_lone_batch_norms_are_allowed():
    b = NetworkBuilder("test", (3, 8, 8))
    with b.unit("u"):
        x = b.conv(b.input, 16, name="c", kernel=3)
        y = b.add_node(BatchNorm(), b.activation(x, "relu6", name="r"), name="bn")[0]
        z = b.conv(y, 16, name="d", bias=True)
        product = b.add_node(Multiply(), z, b.activation(z, "hard_sigmoid", name="h"), name="m")[0]
    network = b.build(x, product)
    exact, rounded = both_precisions(network, images(network, 4))
    for expected, found in zip(
        *(session(m).run(None, {"image": images(network, 1)}) for m in (exact, rounded)), strict=True
    ):
        assert np.abs(expected - found).max() < 0.1 * np.abs(expected).max()


def test_a_kernel_of_zeros_stays_zero():
    space = load_space("shufflenet-tiny")
    network = lower(space, space.smallest)
    weights = random_weights(network, 0)
    weights["head.linear.kernel"] = np.zeros_like(weights["head.linear.kernel"])
    found = logits(to_onnx(network, weights, precision="int8"), images(network, 1))
    assert np.abs(found - weights["head.linear.bias"]).max() < 0.01


def test_the_bytes_depend_on_the_arguments_only_and_another_precision_is_refused():
    space = load_space("shufflenet-tiny")
    network = lower(space, space.smallest)
    weights = random_weights(network, 1)
    first, second = (to_onnx(network, weights, precision="int8").SerializeToString() for _ in range(2))
    assert first == second
    with pytest.raises(ValueError, match="fp16"):
        to_onnx(network, weights, precision="fp16")
