"""`to_onnx` in ONNX Runtime against a reference in numpy that shares no code with it."""

import random

import numpy as np
import onnx
import onnxruntime
import pytest

from hwnas.network import (
    Activation,
    Add,
    BatchNorm,
    Conv,
    Flatten,
    GlobalAveragePool,
    Linear,
    Multiply,
    Network,
    NetworkBuilder,
    Pool,
)
from hwnas.onnx_model import random_weights, to_onnx
from hwnas.space import lower
from hwnas.space_toml import load_space


def windows(x, kernel, stride, padding, fill):
    """All windows of `[N, C, H, W]` as `[N, C, H', W', kernel, kernel]`."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)), constant_values=fill)
    return np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), axis=(2, 3))[:, :, ::stride, ::stride]


def convolve(x, operator, kernel):
    groups = []
    out = operator.channels // operator.groups
    for index, piece in enumerate(np.split(x, operator.groups, axis=1)):
        seen = windows(piece, operator.kernel, operator.stride, operator.padding, 0.0)
        groups.append(np.einsum("nchwij,ijco->nohw", seen, kernel[..., index * out : (index + 1) * out]))
    return np.concatenate(groups, axis=1)


def column(values):
    return values[:, None, None]


def run_reference(network: Network, weights, image):
    """All tensors of a network by name, in double precision."""
    tensors = {network.input.name: image.astype(np.float64)}
    for node in network.nodes:
        own = {name.rpartition(".")[2]: w for name, w in weights.items() if name.rpartition(".")[0] == node.name}
        inputs = [tensors[tensor.name] for tensor in node.inputs]
        x = inputs[0]
        match node.operator:
            case Conv() as operator:
                made = convolve(x, operator, own["kernel"])
                results = [made + column(own["bias"]) if operator.bias else made]
            case BatchNorm(epsilon=epsilon):
                normal = (x - column(own["mean"])) / np.sqrt(column(own["variance"]) + epsilon)
                results = [normal * column(own["scale"]) + column(own["offset"])]
            case Activation(function=function):
                functions = {
                    "relu": lambda v: np.maximum(v, 0),
                    "relu6": lambda v: np.clip(v, 0, 6),
                    "sigmoid": lambda v: (1 + np.tanh(v / 2)) / 2,
                    "hard_sigmoid": lambda v: np.clip(v / 6 + 0.5, 0, 1),
                }
                results = [functions[function](x)]
            case Pool(reduction="max") as pool:
                results = [windows(x, pool.kernel, pool.stride, pool.padding, -np.inf).max(axis=(4, 5))]
            case Pool() as pool:
                results = [windows(x, pool.kernel, pool.stride, pool.padding, 0.0).mean(axis=(4, 5))]
            case GlobalAveragePool():
                results = [x.mean(axis=(2, 3), keepdims=True)]
            case Flatten():
                results = [x.reshape(len(x), -1)]
            case Linear(bias=bias):
                results = [x @ own["kernel"] + (own["bias"] if bias else 0)]
            case Add():
                results = [sum(inputs)]
            case Multiply():
                results = [x * inputs[1]]
            case operator if hasattr(operator, "sizes"):
                results = np.split(x, np.cumsum(operator.sizes)[:-1], axis=1)
            case operator if hasattr(operator, "groups"):
                per_group = x.shape[1] // operator.groups
                order = [(c % operator.groups) * per_group + c // operator.groups for c in range(x.shape[1])]
                results = [x[:, order]]
            case _:
                results = [np.concatenate(inputs, axis=1)]
        tensors |= dict(zip((tensor.name for tensor in node.outputs), results, strict=True))
    return tensors


def agree(network: Network, batch=1, tolerance=1e-4):
    """Asserts that ONNX Runtime and the reference give the same outputs; returns the model."""
    weights = random_weights(network, seed=3)
    model = to_onnx(network, weights, batch=batch)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    image = np.random.default_rng(4).standard_normal((batch, *network.input.shape)).astype(np.float32)
    tensors = run_reference(network, weights, image)
    for found, tensor in zip(session.run(None, {"image": image}), network.outputs, strict=True):
        expected = tensors[tensor.name]
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= tolerance * max(1.0, np.abs(expected).max())
    return model


def one_unit(make, shape=(8, 9, 9)):
    b = NetworkBuilder("test", shape)
    with b.unit("u"):
        outputs = make(b, b.input)
    return b.build(*(outputs if isinstance(outputs, tuple) else (outputs,)))


def kinds(model):
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize(
    ("kernel", "stride", "groups", "channels"),
    [(1, 1, 1, 12), (1, 1, 4, 12), (3, 2, 1, 6), (5, 1, 8, 8), (7, 2, 8, 8), (3, 1, 8, 16)],
)
def test_dense_grouped_and_depthwise_convolutions_agree_with_the_reference(kernel, stride, groups, channels):
    agree(one_unit(lambda b, x: b.conv(x, channels, name="c", kernel=kernel, stride=stride, groups=groups, bias=True)))


@pytest.mark.parametrize("bias", [False, True])
def test_a_batch_norm_after_a_convolution_is_folded_into_it(bias):
    def make(b, x):
        x = b.conv(x, 6, name="c", kernel=3, groups=2, bias=bias)
        return b.add_node(BatchNorm(0.3), x, name="bn")[0]

    assert kinds(agree(one_unit(make))) == ["Conv"]


def test_a_batch_norm_without_a_convolution_of_its_own_stays():
    def alone(b, x):
        return b.add_node(BatchNorm(), b.activation(x, "relu", name="r"), name="bn")[0]

    def shared(b, x):
        x = b.conv(x, 6, name="c")
        return b.concat(x, b.add_node(BatchNorm(), x, name="bn")[0])

    def read_out(b, x):
        x = b.conv(x, 6, name="c")
        return x, b.add_node(BatchNorm(), x, name="bn")[0]

    for make in (alone, shared, read_out):
        assert "BatchNormalization" in kinds(agree(one_unit(make)))


@pytest.mark.parametrize("function", ["relu", "relu6", "sigmoid", "hard_sigmoid"])
def test_activations_agree_with_the_reference(function):
    agree(one_unit(lambda b, x: b.activation(b.conv(x, 40, name="c", kernel=5), function, name="a")))


@pytest.mark.parametrize("reduction", ["max", "average"])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (3, 1), (2, 2)])
def test_padded_pools_agree_with_the_reference(reduction, kernel, stride):
    agree(one_unit(lambda b, x: b.pool(x, reduction, name="p", kernel=kernel, stride=stride)))


def test_split_shuffle_concat_add_and_squeeze_excite_agree_with_the_reference():
    def make(b, x):
        first, second, third = b.split(b.shuffle(x, 4), (3, 2, 3))
        summed = b.add(first, third, b.activation(first, "relu", name="r"))
        return b.squeeze_excite(b.shuffle(b.concat(summed, second, name="cat"), 5, name="s2"), 3)

    agree(one_unit(make), batch=3)


def test_a_split_after_a_shuffle_becomes_gathers_unless_others_read_the_shuffle_too():
    def alone(b, x):
        return b.concat(*reversed(b.split(b.shuffle(x, 2), (3, 5))))

    def shared(b, x):
        shuffled = b.shuffle(x, 2)
        return b.concat(*b.split(shuffled, (3, 5)), shuffled)

    assert kinds(agree(one_unit(alone), batch=2)) == ["Gather", "Gather", "Concat"]
    assert kinds(agree(one_unit(shared), batch=2)) == ["Gather", "Reshape", "Split", "Concat"]


def test_a_product_of_equal_shapes_and_several_outputs_agree_with_the_reference():
    def make(b, x):
        product = b.add_node(Multiply(), x, b.activation(x, "sigmoid", name="s"), name="m")[0]
        return product, b.classifier(product, 5, bias=False)

    model = agree(one_unit(make))
    assert [output.name for output in model.graph.output] == ["logits_0", "logits_1"]


def test_random_networks_of_the_tiny_space_agree_with_the_reference():
    space = load_space("shufflenet-tiny")
    rng = random.Random(1)
    for architecture in (space.smallest, *(space.sample(rng) for _ in range(4))):
        model = agree(lower(space, architecture), batch=2)
        assert "BatchNormalization" not in kinds(model)


def test_the_bytes_depend_on_the_arguments_only_and_carry_the_metadata():
    space = load_space("shufflenet-tiny")
    network = lower(space, space.smallest)
    first, second = (
        to_onnx(network, random_weights(network, 1), metadata={"b": "2", "a": "1"}).SerializeToString()
        for _ in range(2)
    )
    assert first == second
    session = onnxruntime.InferenceSession(first, providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map == {"a": "1", "b": "2"}
    (image,) = session.get_inputs()
    assert (image.name, image.shape, session.get_outputs()[0].name) == ("image", [1, 3, 32, 32], "logits")
