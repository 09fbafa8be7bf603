"""The predicted size of the ONNX file against real exports: equal to the byte."""

import random

import pytest

from hwnas.model_size import model_bytes
from hwnas.network import NetworkBuilder
from hwnas.onnx_model import random_weights, to_onnx
from hwnas.reference import REFERENCE, reference
from hwnas.space import lower
from hwnas.space_toml import load_space


def exported_bytes(network, **settings) -> int:
    return len(to_onnx(network, random_weights(network, 0), **settings).SerializeToString())


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["shufflenet-tiny", "shufflenet-32", "shufflenet-224"])
def test_the_size_of_networks_of_a_space_is_exact(name, precision):
    space, rng = load_space(name), random.Random(7)
    for architecture in (space.smallest, *(space.sample(rng) for _ in range(3))):
        network = lower(space, architecture)
        assert model_bytes(network, precision=precision) == exported_bytes(network, precision=precision)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", REFERENCE)
def test_the_size_of_networks_of_the_literature_is_exact(name, precision):
    network = reference(name)
    if precision == "int8" and model_bytes(network) > 60e6:
        pytest.skip("to quantise it takes seconds, and it has no operator that the others have not")
    assert model_bytes(network, precision=precision) == exported_bytes(network, precision=precision)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_every_operator_batch_and_metadata_are_counted(precision):
    b = NetworkBuilder("größer", (8, 300, 300))
    with b.unit("only"):
        x = b.conv_bn(b.input, 8, kernel=3, stride=2, groups=2, activation="relu6")
        y = b.activation(b.conv(x, 8, name="biased", bias=True), "hard_sigmoid", name="gate")
        x = b.add(b.squeeze_excite(x, 2), y, x)
        x = b.add(x, b.activation(x, "relu", name="read_twice"), name="twice")
        left, right = b.split(b.shuffle(x, 4, name="first_shuffle"), (2, 6))
        pooled = b.pool(right, "average", name="mean_pool"), b.pool(left, "max", name="max_pool")
        x = b.shuffle(b.concat(*pooled), 2)
        first, second = b.split(x, (4, 4), name="again")
        flat = b.classifier(b.concat(first, second, name="joined"), 200, bias=False)
    network = b.build(flat, x)
    settings = {"batch": 130, "precision": precision, "metadata": {"a": "x" * 300, "é": "ü"}}
    assert model_bytes(network, **settings) == exported_bytes(network, **settings)
