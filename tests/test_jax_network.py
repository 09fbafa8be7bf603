"""Agreement: one network in JAX, in ONNX Runtime and in plain numpy gives the same numbers."""

from collections.abc import Callable

import jax
import numpy as np
import onnxruntime
import pytest
from conftest import QUICK_COMPILE
from flax import nnx
from numpy_network import run_in_numpy

from hwnas.jax_network import ACTIVATIONS, FixedNetwork
from hwnas.network import (
    TRAINED,
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
    Operator,
    Pool,
    Tensor,
    parameters,
)
from hwnas.onnx_model import random_weights, to_onnx
from hwnas.reference import mobilenet_v2, resnet50, shufflenet_v1, shufflenet_v2

TOLERANCE = 1e-4


def some_images(network: Network, count: int = 2) -> np.ndarray:
    channels, height, width = network.input.shape
    return np.random.default_rng(0).standard_normal((count, height, width, channels), np.float32)


def statistics_of(weights: dict[str, np.ndarray]) -> dict[str, tuple]:
    """The running means and variances among the weights, as the JAX form takes them."""
    names = [name.removesuffix(".mean") for name in weights if name.endswith(".mean")]
    return {name: (weights[f"{name}.mean"], weights[f"{name}.variance"]) for name in names}


def run_in_jax(network: Network, weights: dict[str, np.ndarray], images: np.ndarray) -> list[np.ndarray]:
    graph, state = nnx.split(FixedNetwork(network, rngs=nnx.Rngs(0), weights=weights), nnx.Param)
    call = jax.jit(lambda *inputs: nnx.merge(graph, inputs[0])(*inputs[1:]), compiler_options=QUICK_COMPILE)
    outputs, _ = call(state, images, statistics_of(weights))
    return [np.asarray(output) for output in (outputs if isinstance(outputs, tuple) else (outputs,))]


def run_in_onnx_runtime(network: Network, weights: dict[str, np.ndarray], images: np.ndarray) -> list[np.ndarray]:
    model = to_onnx(network, weights, batch=len(images)).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    inputs = {"image": np.ascontiguousarray(images.transpose(0, 3, 1, 2))}
    return [output.transpose(0, 2, 3, 1) if output.ndim == 4 else output for output in session.run(None, inputs)]


def close(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


def agrees(network: Network) -> None:
    """JAX, ONNX Runtime and numpy agree on random weights, statistics and images."""
    weights, images = random_weights(network, seed=1), some_images(network)
    expected = list(run_in_numpy(network, weights, images, statistics_of(weights))[0])
    close(run_in_jax(network, weights, images), expected)
    close(run_in_onnx_runtime(network, weights, images), expected)


# ---- families ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "network",
    [
        shufflenet_v1(3, input_size=64, classes=7),
        shufflenet_v2("0.5x", input_size=64, classes=7),
        shufflenet_v2("0.5x", dialect="torchvision", input_size=64, classes=7),
        mobilenet_v2(0.35, input_size=64, classes=7),
        resnet50(input_size=64, classes=7),
    ],
    ids=["shufflenet-v1-g3", "shufflenet-v2", "shufflenet-v2-torchvision", "mobilenet-v2", "resnet-50"],
)
def test_a_network_of_the_literature_runs_alike_in_jax_onnx_runtime_and_numpy(network: Network):
    agrees(network)


# ---- operators ---------------------------------------------------------------------------------------------------


Piece = Callable[[NetworkBuilder, Tensor], tuple[Tensor, ...]]


def one_unit(piece: Piece, shape: tuple[int, ...] = (6, 5, 7)) -> Network:
    b = NetworkBuilder("one unit", shape)
    with b.unit("unit"):
        outputs = piece(b, b.input)
    return b.build(*outputs)


def squeezed(b: NetworkBuilder, x: Tensor) -> tuple[Tensor, ...]:
    return (b.squeeze_excite(x, 4),)


def classified(b: NetworkBuilder, x: Tensor) -> tuple[Tensor, ...]:
    flat = b.add_node(Flatten(), x, name="flatten")[0]
    return flat, b.add_node(Linear(5), flat, name="linear")[0], b.add_node(Linear(3, bias=False), flat, name="plain")[0]


def branched(b: NetworkBuilder, x: Tensor) -> tuple[Tensor, ...]:
    first, second, third = b.split(x, (1, 3, 2))
    joined = b.concat(third, first, second)
    return second, b.shuffle(joined, 3, name="by_3"), b.shuffle(joined, 2, name="by_2"), b.add(x, joined, joined)


def multiplied(b: NetworkBuilder, x: Tensor) -> tuple[Tensor, ...]:
    mean = b.add_node(GlobalAveragePool(), x, name="mean")[0]
    return tuple(b.add_node(Multiply(), x, other, name=name)[0] for name, other in (("same", x), ("spread", mean)))


def normed(b: NetworkBuilder, x: Tensor) -> tuple[Tensor, ...]:
    """Batch norms that no convolution takes in, one with an epsilon of its own."""
    return tuple(b.add_node(BatchNorm(epsilon), x, name=f"bn_{epsilon}")[0] for epsilon in (1e-5, 0.5))


def folded(b: NetworkBuilder, x: Tensor) -> tuple[Tensor, ...]:
    """A batch norm that ONNX folds into a convolution with bias."""
    return b.add_node(BatchNorm(0.5), b.conv(x, 4, name="conv", kernel=3, bias=True), name="bn")


OPERATORS: tuple[Operator, ...] = (
    *(Activation(function) for function in ACTIVATIONS),
    *(Pool(reduction, *window) for reduction in ("max", "average") for window in ((3, 2, 1), (3, 1, 1), (2, 2, 0))),
    Conv(4, 3, 2, 1, bias=True),
    Conv(12, groups=3),
    Conv(4, 3, 1, 1, groups=2),
    Conv(6, 5, 1, 2, groups=6),
    Conv(6, 3, 2, 1, groups=6, bias=True),
    Conv(12, 3, 1, 1, groups=6),
    Conv(4, 1, 2),
)
PIECES = (squeezed, classified, branched, multiplied, normed, folded)


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_an_operator_runs_alike_in_jax_onnx_runtime_and_numpy(operator: Operator):
    agrees(one_unit(lambda b, x: b.add_node(operator, x, name="it")))


@pytest.mark.parametrize("piece", PIECES, ids=lambda piece: piece.__name__)
def test_several_operators_and_outputs_run_alike_in_jax_onnx_runtime_and_numpy(piece: Piece):
    agrees(one_unit(piece))


def test_relu6_and_hard_sigmoid_meet_values_beyond_both_of_their_ends():
    network = one_unit(lambda b, x: tuple(b.activation(x, f, name=f) for f in ("relu6", "hard_sigmoid")))
    images = some_images(network) * 10
    relu6, hard_sigmoid = run_in_jax(network, {}, images)
    assert (relu6.min(), relu6.max()) == (0, 6)
    assert (hard_sigmoid.min(), hard_sigmoid.max()) == (0, 1)
    close(run_in_onnx_runtime(network, {}, images), [relu6, hard_sigmoid])


def test_flatten_puts_channels_first_and_a_shuffle_counts_as_the_paper_does():
    network = one_unit(lambda b, x: (b.add_node(Flatten(), x, name="flatten")[0], b.shuffle(x, 3)), shape=(6, 1, 2))
    images = np.arange(12, dtype=np.float32).reshape(1, 1, 2, 6)  # channel c of column w is 6 w + c
    flat, shuffled = run_in_jax(network, {}, images)
    assert flat[0].tolist() == [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]
    assert shuffled[0, 0, 0].tolist() == [0, 2, 4, 1, 3, 5]


# ---- weights and statistics --------------------------------------------------------------------------------------


def small_network() -> Network:
    b = NetworkBuilder("small", (3, 8, 8))
    with b.unit("body"):
        x = b.conv_bn(b.input, 200, kernel=3, stride=2, activation="relu")
        x = b.conv_bn(x, 100, name="pw", activation="relu")
    with b.unit("head"):
        x = b.classifier(x, 4)
    return b.build(x)


def test_without_statistics_each_batch_is_normalised_by_itself_and_they_are_returned():
    network = small_network()
    model, images = FixedNetwork(network, rngs=nnx.Rngs(0)), some_images(network, 8)
    weights = {name: value[...] for name, value in model.weights.items()}
    logits, statistics = model(images)
    (expected,), used = run_in_numpy(network, weights, images)
    close([np.asarray(logits)], [expected])
    assert set(statistics) == set(used) == {"body.conv_bn", "body.pw_bn"}
    for name, pair in used.items():
        close([np.asarray(values) for values in statistics[name]], list(pair))


def test_a_new_network_has_every_trained_array_he_normal_kernels_and_neutral_norms():
    network = small_network()
    weights = {name: np.asarray(value[...]) for name, value in FixedNetwork(network, rngs=nnx.Rngs(0)).weights.items()}
    assert sum(values.size for values in weights.values()) == parameters(network)
    assert {name.rsplit(".", 1)[1] for name in weights} == set(TRAINED)
    assert weights["body.conv.kernel"].std() == pytest.approx((2 / 27) ** 0.5, rel=0.05)
    assert weights["body.pw.kernel"].std() == pytest.approx((2 / 200) ** 0.5, rel=0.05)
    assert (weights["body.pw_bn.scale"] == 1).all()
    assert (weights["body.pw_bn.offset"] == 0).all()
    again = FixedNetwork(network, rngs=nnx.Rngs(0)).weights["body.pw.kernel"][...]
    np.testing.assert_array_equal(weights["body.pw.kernel"], again)


def test_an_addition_of_three_and_more_tensors_adds_all_of_them():
    network = one_unit(lambda b, x: (b.add_node(Add(), x, x, x, x, name="sum")[0],))
    images = some_images(network)
    close(run_in_jax(network, {}, images), [4 * images])
