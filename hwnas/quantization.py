"""A float ONNX graph -> its 8-bit form in QDQ style, which ONNX Runtime fuses into integer operators.

Weights become int8 of 7 bits, symmetric, with one scale an output channel; activations uint8 with one scale and zero
point a tensor (Jacob et al. 2018, section 2.1; the scheme of ONNX Runtime's own static quantiser):

| tensor                                                  | range                                        |
|---------------------------------------------------------|----------------------------------------------|
| read by nothing but a Relu or a Clip                    | none: it is fused away                       |
| read by nothing: an output of the graph                 | none: it stays float                         |
| made by Gather, Reshape, Split, MaxPool or Flatten      | that of the input: the bytes only move       |
| made by a sigmoid                                       | 0 to 1                                       |
| any other                                               | as given, else `DEFAULT_RANGE`               |

A range always holds 0, which has to be exact: padding is 0. The eighth bit of the weights would cost more than it
gives: x86 processors without VNNI add two products of uint8 and int8 in 16 bits, and saturate above 64 * 255 * 2.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

Ranges = Mapping[str, tuple[float, float]]
"""Least and greatest value of each activation, by the tensor's name in the ONNX graph."""

DEFAULT_RANGE = (-4.0, 4.0)
"""Serves for timing, where only the operators count and not what comes out; from 0 where nothing can be negative."""

LARGEST_WEIGHT = 64
"""Of the integers that stand for weights."""

_SAME_RANGE = ("Gather", "Reshape", "Split", "MaxPool", "Flatten")
_NOT_NEGATIVE = ("Relu", "Clip")
_UP_TO_ONE = ("Sigmoid", "HardSigmoid")
_WITH_KERNEL = ("Conv", "Gemm")
_TYPES = {
    "float32": TensorProto.FLOAT,
    "int32": TensorProto.INT32,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
}


def quantized(graph: GraphProto, ranges: Ranges | None = None) -> GraphProto:
    """The 8-bit form of a graph made by `to_onnx`; its inputs and outputs stay float.

    Args:
        graph: the float graph.
        ranges: of activations, as `activation_ranges` gives them; `None` for a model that is only timed.
    """
    return _Quantizer(graph, ranges).run()


def activation_ranges(model: ModelProto, images: np.ndarray) -> dict[str, tuple[float, float]]:
    """The least and the greatest value that each tensor of a float model takes on images.

    Args:
        model: what `to_onnx` made.
        images: as the model takes them, `[N, C, H, W]`; N is cut down to a multiple of the model's batch.
    """
    import onnxruntime

    watched = ModelProto()
    watched.CopyFrom(model)
    del watched.graph.output[:]
    for name in (name for node in model.graph.node for name in node.output):
        watched.graph.output.add(name=name)
    session: Any = onnxruntime.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    (image,) = session.get_inputs()
    batch = image.shape[0]
    names = [output.name for output in session.get_outputs()]
    ranges = {image.name: (float(images.min()), float(images.max()))}
    for first in range(0, len(images) - batch + 1, batch):
        for name, values in zip(names, session.run(names, {image.name: images[first : first + batch]}), strict=True):
            low, high = ranges.get(name, (np.inf, -np.inf))
            ranges[name] = (min(low, float(values.min())), max(high, float(values.max())))
    return ranges


class _Quantizer:
    """One pass over a graph."""

    def __init__(self, graph: GraphProto, ranges: Ranges | None) -> None:
        self.graph, self.ranges = graph, ranges
        self.made = GraphProto(name=graph.name, input=graph.input, output=graph.output)
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.makers = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.scales: dict[str, np.float32] = {}
        """Of each tensor that is quantised, in the order of the graph."""

    def run(self) -> GraphProto:
        for tensor in self.graph.input:
            self.quantize(tensor.name)
        for node in self.graph.node:
            self.add(node)
            for name in node.output:
                self.quantize(name)
        used = {name for node in self.made.node for name in node.input}
        self.made.initializer.extend(tensor for name, tensor in self.initializers.items() if name in used)
        return self.made

    def add(self, node: NodeProto) -> None:
        """The node itself, reading what was quantised from its dequantised form."""
        copy = NodeProto()
        copy.CopyFrom(node)
        inputs = [f"{name}/dequantized" if name in self.scales else name for name in node.input]
        if node.op_type in _WITH_KERNEL:
            inputs[1:] = self.quantized_weights(node)
        copy.input[:] = inputs
        self.made.node.append(copy)

    def quantized_weights(self, node: NodeProto) -> list[str]:
        """Kernel and, if there is one, bias of a convolution or a matrix product, one scale an output channel."""
        axis = 0 if node.op_type == "Conv" else 1
        kernel = self.values(node.input[1])
        others = tuple(i for i in range(kernel.ndim) if i != axis)
        largest = np.abs(kernel).max(axis=others, keepdims=True)
        scale = np.where(largest > 0, largest, 1).astype(np.float32) / np.float32(LARGEST_WEIGHT)
        integers = np.rint(kernel / scale).astype(np.int8)
        scale = scale.reshape(-1)
        names = [self.dequantized(node.input[1], integers, scale, axis)]
        if len(node.input) > 2:
            bias_scale = scale * self.scales[node.input[0]]
            bias = np.clip(np.rint(self.values(node.input[2]) / bias_scale), -(2**31) + 128, 2**31 - 128)
            names.append(self.dequantized(node.input[2], bias.astype(np.int32), bias_scale, 0))
        return names

    def dequantized(self, name: str, integers: np.ndarray, scale: np.ndarray, axis: int) -> str:
        inputs = [
            self.initializer(f"{name}/integers", integers),
            self.initializer(f"{name}/scale", scale),
            self.initializer(f"{name}/zero", np.zeros(scale.shape, integers.dtype)),
        ]
        self.append("DequantizeLinear", inputs, f"{name}/dequantized").attribute.add(name="axis", type="INT", i=axis)
        return f"{name}/dequantized"

    def quantize(self, name: str) -> None:
        """Adds the pair that quantises a tensor, unless it is to stay as it is."""
        readers = self.readers.get(name, ())
        fused = len(readers) == 1 and readers[0].op_type in _NOT_NEGATIVE
        if not readers or fused:
            return
        low, high = self.range_of(name)
        scale = np.float32((high - low) / 255 or 1)
        self.scales[name] = scale
        zero = np.array(np.rint(-low / scale), np.uint8)
        parameters = [self.initializer(f"{name}/scale", np.array(scale)), self.initializer(f"{name}/zero", zero)]
        self.append("QuantizeLinear", [name, *parameters], f"{name}/quantized")
        self.append("DequantizeLinear", [f"{name}/quantized", *parameters], f"{name}/dequantized")

    def range_of(self, name: str) -> tuple[float, float]:
        maker = self.makers.get(name)
        while maker is not None and maker.op_type in _SAME_RANGE:
            name = maker.input[0]
            maker = self.makers.get(name)
        kind = maker.op_type if maker is not None else ""
        if kind in _UP_TO_ONE:
            return 0.0, 1.0
        low, high = DEFAULT_RANGE if self.ranges is None else self.ranges[name]
        return (0.0 if kind in _NOT_NEGATIVE else min(low, 0.0)), max(high, 0.0)

    # ---- parts of the graph --------------------------------------------------------------------------------------

    def append(self, kind: str, inputs: list[str], output: str) -> NodeProto:
        return self.made.node.add(op_type=kind, name=f"{output}/{kind}", input=inputs, output=[output])

    def values(self, name: str) -> np.ndarray:
        tensor = self.initializers[name]
        return np.frombuffer(tensor.raw_data, np.float32).reshape(tuple(tensor.dims))

    def initializer(self, name: str, values: np.ndarray) -> str:
        kind = _TYPES[values.dtype.name]
        raw = values.tobytes()
        self.initializers[name] = TensorProto(name=name, data_type=kind, dims=values.shape, raw_data=raw)
        return name
