"""The bytes of a network's ONNX file, read off the `Network`: exactly, and without building the model.

The file is what `onnx_model.to_onnx` and, in int8, `quantization.quantized` make. Here their graph is only outlined:
the names of its nodes and tensors, and the sizes of its constants, from which follow the bytes in the encoding of
protocol buffers (protobuf.dev, "Encoding"): a field is a tag of one byte and a number, or a tag, a length and as many
bytes.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

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
    Shape,
    Shuffle,
    Split,
    Tensor,
    shuffle_order,
    sole_readers,
    weight_shapes,
)

_FLOAT, _INT64 = 4, 8
"""Bytes of a value."""

_SAME_AS_ZERO = ("Relu", "Clip")
_ACTIVATIONS = {"relu": "Relu", "sigmoid": "Sigmoid", "relu6": "Clip", "hard_sigmoid": "HardSigmoid"}


def model_bytes(
    network: Network, *, batch: int = 1, precision: str = "fp32", metadata: Mapping[str, str] | None = None
) -> int:
    """The bytes of the ONNX file of a network; takes about a millisecond.

    Args:
        network: any network that `to_onnx` takes.
        batch, precision, metadata: as `to_onnx` takes them.
    """
    outline = _outlined(network)
    if precision == "int8":
        outline = _quantized(outline)
    graph = _text(network.name) + outline.bytes
    graph += _value_info("image", (batch, *network.input.shape))
    graph += sum(_value_info(outline.names[t.name], (batch, *t.shape)) for t in network.outputs)
    facts = sum(_block(_text(key) + _text(value)) for key, value in (metadata or {}).items())
    return 2 + _text("hwnas") + _block(graph) + _block(2 + 2) + facts  # version of the format, and of the operators


@dataclass(frozen=True, slots=True)
class _OnnxNode:
    """A node of the graph; `attributes` is the bytes of all its attributes."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    output: tuple[str, ...]
    attributes: int


@dataclass(slots=True)
class _Outline:
    """A graph without the values of its constants.

    Attributes:
        nodes: in order.
        constants: shape and bytes a value, by name.
        names: of the tensors of the network that have another name in the graph.
    """

    nodes: list[_OnnxNode] = field(default_factory=list)
    constants: dict[str, tuple[Shape, int]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, name: str, inputs: Iterable[str], output: Iterable[str], attributes: int = 0) -> None:
        self.nodes.append(_OnnxNode(kind, name, tuple(inputs), tuple(output), attributes))

    def constant(self, name: str, shape: Shape, value_bytes: int) -> str:
        self.constants[name] = shape, value_bytes
        return name

    @property
    def bytes(self) -> int:
        """Of all nodes and constants in the file."""
        total = 0
        for node in self.nodes:
            words = (*node.inputs, *node.output, node.name, node.kind)
            total += _block(sum(map(_text, words)) + node.attributes)
        for name, (shape, value_bytes) in self.constants.items():
            raw = value_bytes * math.prod(shape)
            total += _block(sum(1 + _varint(size) for size in shape) + 2 + _text(name) + _block(raw))
        return total


# ---- the float graph, as `onnx_model` makes it ---------------------------------------------------------------------


def _outlined(network: Network) -> _Outline:
    single = len(network.outputs) == 1
    outputs = {t.name: "logits" if single else f"logits_{index}" for index, t in enumerate(network.outputs)}
    outline = _Outline(names={network.input.name: "image"} | outputs)
    norms = sole_readers(network, Conv, BatchNorm)
    splits = sole_readers(network, Shuffle, Split)
    absorbed = {node.name for node in (*norms.values(), *splits.values())}
    shared: dict[object, str] = {}
    for node in network.nodes:
        if node.name not in absorbed:
            _outline_node(outline, node, norms.get(node.name), splits.get(node.name), shared)
    return outline


def _outline_node(
    outline: _Outline, node: Node, norm: Node | None, split: Node | None, shared: dict[object, str]
) -> None:
    """Adds what a node becomes, together with the batch norm or the split that it absorbs."""

    def name(tensor: Tensor) -> str:
        return outline.names.get(tensor.name, tensor.name)

    def numbers(what: str, values: tuple[float, ...], shape: Shape, value_bytes: int) -> str:
        if (what, values) not in shared:
            shared[what, values] = outline.constant(f"{what}_{len(shared)}", shape, value_bytes)
        return shared[what, values]

    def weights(*suffixes: str) -> list[str]:
        shapes = weight_shapes(node)
        return [outline.constant(f"{node.name}.{s}", shapes[s], _FLOAT) for s in suffixes if s in shapes]

    def emit(kind: str, further: Iterable[str] = (), attributes: int = 0) -> None:
        outline.add(kind, node.name, [*map(name, node.inputs), *further], map(name, node.outputs), attributes)

    match node.operator:
        case Conv(kernel=kernel, stride=stride, padding=padding, groups=groups):
            inputs = [name(node.inputs[0]), *weights("kernel", "bias")]
            height, width, channels_in, channels = weight_shapes(node)["kernel"]
            outline.constant(inputs[1], (channels, channels_in, height, width), _FLOAT)
            if norm and len(inputs) == 2:
                inputs.append(outline.constant(f"{node.name}.bias", (channels,), _FLOAT))
            attributes = _integer("group", groups) + _window(kernel, stride, padding)
            outline.add("Conv", node.name, inputs, [name((norm or node).outputs[0])], attributes)
        case Linear():
            emit("Gemm", weights("kernel", "bias"))
        case BatchNorm():
            emit("BatchNormalization", weights("scale", "offset", "mean", "variance"), _real("epsilon"))
        case Activation(function="relu6"):
            emit("Clip", [numbers("zero", (0.0,), (), _FLOAT), numbers("six", (6.0,), (), _FLOAT)])
        case Activation(function=function):
            emit(_ACTIVATIONS[function], (), _real("alpha") + _real("beta") if function == "hard_sigmoid" else 0)
        case Pool(reduction=reduction, kernel=kernel, stride=stride, padding=padding):
            window = _window(kernel, stride, padding)
            if reduction == "max":
                emit("MaxPool", (), window)
            else:
                emit("AveragePool", (), window + _integer("count_include_pad", 1))
        case GlobalAveragePool():
            emit("GlobalAveragePool")
        case Flatten():
            emit("Flatten", (), _integer("axis", 1))
        case Add():
            total = name(node.inputs[0])
            for index, tensor in enumerate(node.inputs[1:], 1):
                made = f"{node.name}/{index}"
                output = name(node.outputs[0]) if index == len(node.inputs) - 1 else made
                outline.add("Add", made, [total, name(tensor)], [output])
                total = output
        case Multiply():
            emit("Mul")
        case Concat():
            emit("Concat", (), _integer("axis", 1))
        case Split(sizes=sizes):
            emit("Split", [numbers("sizes", sizes, (len(sizes),), _INT64)], _integer("axis", 1))
        case Shuffle(groups=groups):
            order = shuffle_order(node.inputs[0].shape[0], groups)
            if split is None:
                rows = numbers(f"order_{groups}", order, (len(order) // groups, groups), _INT64)
                made = f"{node.name}/rows"
                outline.add("Gather", made, [name(node.inputs[0]), rows], [made], _integer("axis", 1))
                shape = numbers("shape", (0, *node.outputs[0].shape), (4,), _INT64)
                outline.add("Reshape", node.name, [made, shape], [name(node.outputs[0])])
                return
            first = 0
            for piece in split.outputs:
                count = piece.shape[0]
                channels = numbers(f"order_{groups}", order[first : first + count], (count,), _INT64)
                inputs = [name(node.inputs[0]), channels]
                outline.add("Gather", piece.name, inputs, [name(piece)], _integer("axis", 1))
                first += count


# ---- the 8-bit graph, as `quantization` makes it -------------------------------------------------------------------


def _quantized(plain: _Outline) -> _Outline:
    made = _Outline(names=plain.names)
    readers: dict[str, list[_OnnxNode]] = {}
    for node in plain.nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    cut: set[str] = set()

    def append(kind: str, inputs: list[str], output: str, attributes: int = 0) -> str:
        made.add(kind, f"{output}/{kind}", inputs, [output], attributes)
        return output

    def quantize(name: str) -> None:
        reading = readers.get(name, ())
        if not reading or (len(reading) == 1 and reading[0].kind in _SAME_AS_ZERO):
            return
        cut.add(name)
        factors = [made.constant(f"{name}/scale", (), _FLOAT), made.constant(f"{name}/zero", (), 1)]
        append("QuantizeLinear", [name, *factors], f"{name}/quantized")
        append("DequantizeLinear", [f"{name}/quantized", *factors], f"{name}/dequantized")

    def dequantized(name: str, axis: int, value_bytes: int, channels: int) -> str:
        parts = [
            made.constant(f"{name}/integers", plain.constants[name][0], value_bytes),
            made.constant(f"{name}/scale", (channels,), _FLOAT),
            made.constant(f"{name}/zero", (channels,), value_bytes),
        ]
        return append("DequantizeLinear", parts, f"{name}/dequantized", _integer("axis", axis))

    quantize("image")
    for node in plain.nodes:
        inputs = [f"{name}/dequantized" if name in cut else name for name in node.inputs]
        if node.kind in ("Conv", "Gemm"):
            axis = 0 if node.kind == "Conv" else 1
            channels = plain.constants[node.inputs[1]][0][axis]
            inputs[1:] = [
                dequantized(name, axis if index == 0 else 0, 1 if index == 0 else 4, channels)
                for index, name in enumerate(node.inputs[1:])
            ]
        made.add(node.kind, node.name, inputs, node.output, node.attributes)
        for name in node.inputs:
            if name in plain.constants and name in inputs:
                made.constants[name] = plain.constants[name]
        for name in node.output:
            quantize(name)
    return made


# ---- bytes of fields -----------------------------------------------------------------------------------------------


def _varint(value: int) -> int:
    """Bytes of a number that is not negative: seven bits in each."""
    return max(1, (value.bit_length() + 6) // 7)


def _block(length: int) -> int:
    """A tag, a length, and as many bytes."""
    return 1 + _varint(length) + length


def _text(text: str) -> int:
    return _block(len(text) if text.isascii() else len(text.encode()))


def _attribute(name: str, value: int) -> int:
    return _block(_text(name) + value + 3)  # the kind's tag takes two bytes


def _integer(name: str, value: int) -> int:
    return _attribute(name, 1 + _varint(value))


def _real(name: str) -> int:
    return _attribute(name, 1 + _FLOAT)


def _integers(name: str, values: Iterable[int]) -> int:
    return _attribute(name, sum(1 + _varint(value) for value in values))


def _window(kernel: int, stride: int, padding: int) -> int:
    return (
        _integers("kernel_shape", [kernel] * 2) + _integers("strides", [stride] * 2) + _integers("pads", [padding] * 4)
    )


def _value_info(name: str, shape: Shape) -> int:
    dimensions = sum(_block(1 + _varint(size)) for size in shape)
    return _block(_text(name) + _block(_block(2 + _block(dimensions))))
