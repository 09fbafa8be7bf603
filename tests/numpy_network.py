"""A second opinion on what a `Network` computes: plain numpy in double precision, one operator after the other.

It shares no code with the JAX and ONNX forms, compiles nothing, and is quick on the small inputs of tests.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hwnas.network import (
    Activation,
    Add,
    BatchNorm,
    Concat,
    Conv,
    Flatten,
    GlobalAveragePool,
    Linear,
    Multiply,
    Network,
    Node,
    Pool,
    Shuffle,
    Split,
)

Array = np.ndarray

ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "hard_sigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1),
}


def run_in_numpy(
    network: Network,
    weights: Mapping[str, Any],
    images: Array,
    statistics: Mapping[str, tuple[Any, Any]] | None = None,
) -> tuple[tuple[Array, ...], dict[str, tuple[Array, Array]]]:
    """The outputs for images `[N, H, W, 3]`, and mean and variance of each batch norm: the given or the batch's own."""
    tensors = {network.input.name: np.moveaxis(np.asarray(images, np.float64), -1, 1)}
    used: dict[str, tuple[Array, Array]] = {}
    for node in network.nodes:
        inputs = [tensors[tensor.name] for tensor in node.inputs]
        own = {
            name.rsplit(".", 1)[1]: np.asarray(value, np.float64)
            for name, value in weights.items()
            if name.rsplit(".", 1)[0] == node.name
        }
        if isinstance(node.operator, BatchNorm):
            x = inputs[0]
            found = statistics[node.name] if statistics else (x.mean((0, 2, 3)), x.var((0, 2, 3)))
            mean, variance = used[node.name] = tuple(np.asarray(value, np.float64) for value in found)
            factor = own["scale"] / np.sqrt(variance + node.operator.epsilon)
            results = [x * _by_channel(factor) + _by_channel(own["offset"] - mean * factor)]
        else:
            results = _run(node, inputs, own)
        tensors |= {tensor.name: result for tensor, result in zip(node.outputs, results, strict=True)}
    return tuple(_channels_last(tensors[tensor.name]) for tensor in network.outputs), used


def _by_channel(values: Array) -> Array:
    return values[:, None, None]


def _channels_last(x: Array) -> Array:
    return np.moveaxis(x, 1, -1)


def _windows(x: Array, side: int, stride: int, padding: int, fill: float) -> Array:
    """`[N, C, H', W', side, side]`"""
    padded = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)), constant_values=fill)
    return np.lib.stride_tricks.sliding_window_view(padded, (side, side), (2, 3))[:, :, ::stride, ::stride]


def _run(node: Node, inputs: list[Array], own: dict[str, Array]) -> list[Array]:
    """One operator on feature maps `[N, C, H, W]` or vectors `[N, C]`."""
    x = inputs[0]
    match node.operator:
        case Conv(kernel=side, stride=stride, padding=padding, groups=groups):
            windows = _windows(x, side, stride, padding, 0)
            pairs = zip(np.split(windows, groups, 1), np.split(own["kernel"], groups, 3), strict=True)
            parts = [np.tensordot(part, kernel, ((4, 5, 1), (0, 1, 2))) for part, kernel in pairs]
            return [np.moveaxis(np.concatenate(parts, -1) + own.get("bias", 0), -1, 1)]
        case Linear():
            return [x @ own["kernel"] + own.get("bias", 0)]
        case Activation(function=function):
            return [ACTIVATIONS[function](x)]
        case Pool(reduction=reduction, kernel=side, stride=stride, padding=padding):
            windows = _windows(x, side, stride, padding, -np.inf if reduction == "max" else 0)
            return [windows.max((-1, -2)) if reduction == "max" else windows.mean((-1, -2))]
        case GlobalAveragePool():
            return [x.mean((2, 3), keepdims=True)]
        case Flatten():
            return [x.reshape(len(x), -1)]
        case Add():
            return [np.sum(inputs, axis=0)]
        case Multiply():
            return [x * inputs[1]]
        case Concat():
            return [np.concatenate(inputs, axis=1)]
        case Split(sizes=sizes):
            return np.split(x, np.cumsum(sizes)[:-1], axis=1)
        case Shuffle(groups=groups):
            channels = x.shape[1]
            places = np.arange(channels)
            return [x[:, (places % groups) * (channels // groups) + places // groups]]
        case _:
            raise TypeError(f"{node.operator} is not known here")
