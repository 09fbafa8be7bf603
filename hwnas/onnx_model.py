"""`Network` + weights -> ONNX: NCHW, plain operators, each batch norm folded into the convolution before it.

The same function makes the pieces that a latency table times and the model that ships. In the precision `int8` it is
the same graph after the pass of `quantization.py`.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

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
    Tensor,
    shuffle_order,
    sole_readers,
    weight_shapes,
)
from hwnas.quantization import Ranges, quantized

OPSET = 18
IR_VERSION = 9
"""The newest that ONNX Runtime 1.20 reads together with the operators used here, so that older boards can run it."""

Weights = Mapping[str, Any]
"""`{node name}.{suffix}` -> array, with the suffixes and shapes of `network.weight_shapes`."""


def random_weights(network: Network, seed: int) -> dict[str, np.ndarray]:
    """Weights for timing: kernels scaled as by He et al. 2015 (section 2.2), variances around 1.2.

    The values are cut, at random places, from one strip of normal values: to draw each anew would take longer than to
    time the model.
    """
    rng = np.random.default_rng(seed)
    strip = rng.standard_normal(1 << 16, dtype=np.float32)
    weights: dict[str, np.ndarray] = {}
    for node in network.nodes:
        for suffix, shape in weight_shapes(node).items():
            values = np.resize(strip[rng.integers(1 << 15) :], shape)
            if suffix == "kernel":
                values *= np.float32(math.sqrt(2 / math.prod(shape[:-1])))
            elif suffix == "variance":
                values = np.abs(values) / 2 + np.float32(0.8)
            elif suffix == "scale":
                values = values / 10 + 1
            else:
                values /= 10
            weights[f"{node.name}.{suffix}"] = values
    return weights


def to_onnx(
    network: Network,
    weights: Weights,
    *,
    batch: int = 1,
    precision: str = "fp32",
    ranges: Ranges | None = None,
    metadata: Mapping[str, str] | None = None,
) -> ModelProto:
    """The network as ONNX, with input `image` `[batch, C, H, W]` and output `logits` (`logits_0`, ... for several).

    Input and output are float in every precision. The bytes of two calls with equal arguments are equal.

    Args:
        network: any network whose input is a feature map.
        weights: arrays by name; kernels `[height, width, in / groups, out]`, as `network.weight_shapes` says.
        batch: images a run.
        precision: `fp32`, or `int8` for 8-bit weights and activations.
        ranges: of the activations, for `int8`: what `quantization.activation_ranges` finds with the `fp32` model on
            real images. Without them the model runs as fast and means nothing.
        metadata: facts for the model's metadata.
    """
    if precision not in ("fp32", "int8"):
        raise ValueError(f"a precision is fp32 or int8, and not {precision}")
    graph = _Exporter(network, weights, batch).export()
    if precision == "int8":
        graph = quantized(graph, ranges)
    model = ModelProto(ir_version=IR_VERSION, producer_name="hwnas", graph=graph)
    model.opset_import.add(domain="", version=OPSET)
    for key in sorted(metadata or {}):
        model.metadata_props.add(key=key, value=(metadata or {})[key])
    return model


def statistics_onnx(network: Network, weights: Weights, *, batch: int) -> ModelProto:
    """The network as it is in training: each batch norm normalises a feature map by the statistics of the map itself.

    Args:
        network, batch: as for `to_onnx`.
        weights: arrays by name; means and variances are not needed.

    Returns:
        ONNX whose outputs are `{node name}.mean` and `{node name}.variance`, `[C]` each, of every batch norm.
    """
    model = ModelProto(ir_version=IR_VERSION, producer_name="hwnas", graph=_Estimator(network, weights, batch).export())
    model.opset_import.add(domain="", version=OPSET)
    return model


class _Exporter:
    """One export: the graph so far, and the names that tensors have in it."""

    def __init__(self, network: Network, weights: Weights, batch: int) -> None:
        self.network, self.weights, self.batch = network, weights, batch
        self.graph = GraphProto(name=network.name)
        self.names = {network.input.name: "image"}
        names = ["logits"] if len(network.outputs) == 1 else [f"logits_{i}" for i in range(len(network.outputs))]
        self.names |= {tensor.name: name for tensor, name in zip(network.outputs, names, strict=True)}
        self.constants: dict[tuple[str, bytes], str] = {}
        self.norms = sole_readers(network, Conv, BatchNorm)
        self.splits = sole_readers(network, Shuffle, Split)
        self.absorbed = {node.name for node in (*self.norms.values(), *self.splits.values())}

    def export(self) -> GraphProto:
        for node in self.network.nodes:
            if node.name not in self.absorbed:
                self.add(node)
        self.graph.input.append(self.value_info(self.network.input))
        self.graph.output.extend(self.value_info(tensor) for tensor in self.network.outputs)
        return self.graph

    def add(self, node: Node) -> None:
        """Adds what a node becomes, together with the batch norm or the split that it absorbs."""
        match node.operator:
            case Conv() as operator:
                self.add_conv(node, operator, self.norms.get(node.name))
            case Linear(bias=bias):
                inputs = [self.initializer(f"{node.name}.kernel", self.weight(node, "kernel"))]
                if bias:
                    inputs.append(self.initializer(f"{node.name}.bias", self.weight(node, "bias")))
                self.emit("Gemm", node, inputs)
            case BatchNorm(epsilon=epsilon):
                suffixes = ("scale", "offset", "mean", "variance")
                inputs = [self.initializer(f"{node.name}.{s}", self.weight(node, s)) for s in suffixes]
                self.emit("BatchNormalization", node, inputs, epsilon=epsilon)
            case Activation(function=function):
                self.add_activation(node, function)
            case Pool(reduction=reduction, kernel=kernel, stride=stride, padding=padding):
                window: dict[str, Any] = _window(kernel, stride, padding)
                if reduction == "average":
                    window["count_include_pad"] = 1
                self.emit("MaxPool" if reduction == "max" else "AveragePool", node, **window)
            case GlobalAveragePool():
                self.emit("GlobalAveragePool", node)
            case Flatten():
                self.emit("Flatten", node, axis=1)
            case Add():
                self.add_sum(node)
            case Multiply():
                self.emit("Mul", node)
            case Concat():
                self.emit("Concat", node, axis=1)
            case Split(sizes=sizes):
                self.emit("Split", node, [self.numbers("sizes", sizes)], axis=1)
            case Shuffle(groups=groups):
                self.add_shuffle(node, groups)

    def add_conv(self, node: Node, operator: Conv, norm: Node | None) -> None:
        kernel = np.transpose(self.weight(node, "kernel"), (3, 2, 0, 1))
        bias = self.weight(node, "bias") if operator.bias else None
        if norm is not None:
            kernel, bias = self.fold(kernel, bias, norm)
        inputs = [self.initializer(f"{node.name}.kernel", kernel)]
        if bias is not None:
            inputs.append(self.initializer(f"{node.name}.bias", bias))
        window = _window(operator.kernel, operator.stride, operator.padding)
        outputs = (norm or node).outputs
        self.emit("Conv", node, inputs, outputs=[self.name(outputs[0])], group=operator.groups, **window)

    def fold(self, kernel: np.ndarray, bias: np.ndarray | None, norm: Node) -> tuple[np.ndarray, np.ndarray]:
        """Kernel `[out, in, height, width]` and bias `[out]` that do what convolution and batch norm did together."""
        assert isinstance(norm.operator, BatchNorm)
        scale, offset, mean, variance = (
            self.weight(norm, s).astype(np.float64) for s in ("scale", "offset", "mean", "variance")
        )
        factor = scale / np.sqrt(variance + norm.operator.epsilon)
        shift = -mean if bias is None else bias - mean
        return kernel * factor[:, None, None, None].astype(np.float32), (offset + shift * factor).astype(np.float32)

    def add_activation(self, node: Node, function: str) -> None:
        match function:
            case "relu":
                self.emit("Relu", node)
            case "sigmoid":
                self.emit("Sigmoid", node)
            case "relu6":
                self.emit("Clip", node, [self.scalar("zero", 0.0), self.scalar("six", 6.0)])
            case "hard_sigmoid":
                self.emit("HardSigmoid", node, alpha=1 / 6, beta=0.5)

    def add_sum(self, node: Node) -> None:
        """A chain of additions of two: `Sum` is not fused into convolutions by every runtime, `Add` is."""
        total = self.name(node.inputs[0])
        for index, tensor in enumerate(node.inputs[1:], 1):
            last = index == len(node.inputs) - 1
            output = self.name(node.outputs[0]) if last else f"{node.name}/{index}"
            self.append("Add", f"{node.name}/{index}", [total, self.name(tensor)], [output])
            total = output

    def add_shuffle(self, node: Node, groups: int) -> None:
        """A gather of channels, or, where a split follows, one for each piece.

        That copies each channel once; reshape, transpose, reshape and then a split copy it twice, which costs 3 to 6 %
        of ShuffleNet V2 1x in ONNX Runtime. A whole shuffle gathers by a matrix of channels and is flattened, which
        costs nothing: from a plain permutation OpenVINO 2026.4 makes another order of the next convolution's weights,
        and takes the inverse of the right one.
        """
        order = shuffle_order(node.inputs[0].shape[0], groups)
        split = self.splits.get(node.name)
        if split is None:
            rows = self.constant(f"order_{groups}", np.array(order, dtype=np.int64).reshape(-1, groups))
            self.append("Gather", f"{node.name}/rows", [self.name(node.inputs[0]), rows], [f"{node.name}/rows"], axis=1)
            shape = self.numbers("shape", (0, *node.outputs[0].shape))
            self.append("Reshape", node.name, [f"{node.name}/rows", shape], [self.name(node.outputs[0])])
            return
        first = 0
        for piece in split.outputs:
            channels = self.numbers(f"order_{groups}", order[first : first + piece.shape[0]])
            self.append("Gather", piece.name, [self.name(node.inputs[0]), channels], [self.name(piece)], axis=1)
            first += piece.shape[0]

    # ---- parts of the graph --------------------------------------------------------------------------------------

    def emit(
        self,
        kind: str,
        node: Node,
        extra_inputs: list[str] | None = None,
        outputs: list[str] | None = None,
        **attributes: Any,
    ) -> None:
        inputs = [self.name(tensor) for tensor in node.inputs] + (extra_inputs or [])
        self.append(kind, node.name, inputs, outputs or [self.name(t) for t in node.outputs], **attributes)

    def append(self, kind: str, name: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        proto = NodeProto(op_type=kind, name=name, input=inputs, output=outputs)
        for key, value in attributes.items():
            proto.attribute.append(_attribute(key, value))
        self.graph.node.append(proto)

    def name(self, tensor: Tensor) -> str:
        return self.names.get(tensor.name, tensor.name)

    def weight(self, node: Node, suffix: str) -> np.ndarray:
        return np.asarray(self.weights[f"{node.name}.{suffix}"], dtype=np.float32)

    def initializer(self, name: str, values: np.ndarray) -> str:
        kind = TensorProto.INT64 if values.dtype == np.int64 else TensorProto.FLOAT
        raw = np.ascontiguousarray(values).tobytes()
        self.graph.initializer.append(TensorProto(name=name, data_type=kind, dims=values.shape, raw_data=raw))
        return name

    def numbers(self, what: str, values: tuple[int, ...]) -> str:
        """The name of an initializer with these integers, shared by all who need the same."""
        return self.constant(what, np.array(values, dtype=np.int64))

    def scalar(self, name: str, value: float) -> str:
        return self.constant(name, np.array(value, dtype=np.float32))

    def constant(self, what: str, values: np.ndarray) -> str:
        key = (what, values.tobytes())
        if key not in self.constants:
            self.constants[key] = self.initializer(f"{what}_{len(self.constants)}", values)
        return self.constants[key]

    def value_info(self, tensor: Tensor) -> ValueInfoProto:
        return _float_info(self.name(tensor), (self.batch, *tensor.shape))


class _Estimator(_Exporter):
    """An export whose batch norms take the statistics of their own input, and tell them."""

    def __init__(self, network: Network, weights: Weights, batch: int) -> None:
        super().__init__(network, weights, batch)
        self.norms = {}
        self.absorbed = {node.name for node in self.splits.values()}
        self.told: list[ValueInfoProto] = []

    def export(self) -> GraphProto:
        graph = super().export()
        del graph.output[:]
        graph.output.extend(self.told)
        return graph

    def add(self, node: Node) -> None:
        match node.operator:
            case BatchNorm(epsilon=epsilon):
                self.add_estimate(node, epsilon)
            case _:
                super().add(node)

    def add_estimate(self, node: Node, epsilon: float) -> None:
        name, x, axes = node.name, self.name(node.inputs[0]), self.numbers("axes", (0, 2, 3))
        centre, away, square = (f"{name}/{what}" for what in ("centre", "away", "square"))
        self.append("ReduceMean", centre, [x, axes], [centre], keepdims=1)
        self.append("ReduceMean", f"{name}.mean", [x, axes], [f"{name}.mean"], keepdims=0)
        self.append("Sub", away, [x, centre], [away])
        self.append("Mul", square, [away, away], [square])
        self.append("ReduceMean", f"{name}.variance", [square, axes], [f"{name}.variance"], keepdims=0)
        inputs = [self.initializer(f"{name}.{suffix}", self.weight(node, suffix)) for suffix in ("scale", "offset")]
        inputs += [f"{name}.mean", f"{name}.variance"]
        self.emit("BatchNormalization", node, inputs, epsilon=epsilon)
        for which in inputs[2:]:
            self.told.append(_float_info(which, node.inputs[0].shape[:1]))


def _float_info(name: str, shape: tuple[int, ...]) -> ValueInfoProto:
    info = ValueInfoProto(name=name)
    info.type.tensor_type.elem_type = TensorProto.FLOAT
    for size in shape:
        info.type.tensor_type.shape.dim.add(dim_value=size)
    return info


def _window(kernel: int, stride: int, padding: int) -> dict[str, list[int]]:
    return {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [padding] * 4}


def _attribute(name: str, value: int | float | list[int]) -> AttributeProto:
    if isinstance(value, list):
        return AttributeProto(name=name, type=AttributeProto.INTS, ints=value)
    if isinstance(value, float):
        return AttributeProto(name=name, type=AttributeProto.FLOAT, f=value)
    return AttributeProto(name=name, type=AttributeProto.INT, i=value)
