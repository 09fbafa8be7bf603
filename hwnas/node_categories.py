"""What each node of an ONNX graph is to the run time: convolution, data, element-wise operator, shuffle, or other.

The categories of ShuffleNet V2 (Ma et al. 2018, section 2, Figure 2), for a graph as a runtime optimised it:

| category       | what counts                                                                                      |
|----------------|--------------------------------------------------------------------------------------------------|
| `convolution`  | convolutions and matrix products with all that the runtime fused into them; depthwise ones apart |
| `data`         | copies, concatenation, splits, changes of layout, shape and type, also to and from 8 bits        |
| `element-wise` | activations, sums and products that were not fused, batch norms that were not folded             |
| `shuffle`      | `Gather` of channels in new order, with or without a split; reshape, transpose, reshape          |
| `other`        | pooling, control flow and the rest                                                               |
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

CATEGORIES = ("convolution", "data", "element-wise", "shuffle", "other")

_KERNEL_INPUT = {
    **dict.fromkeys(("Conv", "FusedConv", "NhwcConv", "NhwcFusedConv", "ConvInteger", "ConvTranspose"), 1),
    "QLinearConv": 3,
}
"""Convolutions, and which of their inputs is the kernel `[out, in / groups, ...]` (`ConvTranspose`: in and out change
places)."""

_OPERATORS = {
    "convolution": """
        Conv FusedConv NhwcConv NhwcFusedConv ConvInteger ConvTranspose QLinearConv DeformConv Gemm FusedGemm QGemm
        MatMul FusedMatMul QLinearMatMul MatMulInteger MatMulIntegerToFloat DynamicQuantizeMatMul MatMulNBits Einsum
    """,
    "data": """
        ReorderInput ReorderOutput Transpose Concat QLinearConcat Split Slice Gather GatherElements GatherND
        ScatterElements ScatterND Identity Reshape Flatten Squeeze Unsqueeze Pad Expand Tile DepthToSpace SpaceToDepth
        Cast Shape ConstantOfShape QuantizeLinear DequantizeLinear DynamicQuantizeLinear
    """,
    "element-wise": """
        Relu Clip Sigmoid HardSigmoid HardSwish LeakyRelu PRelu Elu Selu Celu ThresholdedRelu Softplus Softsign Mish
        Gelu FastGelu QuickGelu BiasGelu Tanh Add Sub Mul Div Sum Mean Min Max Pow Mod Neg Abs Exp Log Sqrt Reciprocal
        Erf Floor Ceil Round Sign Sin Cos Where Equal Not Greater GreaterOrEqual Less LessOrEqual And Or
        BatchNormalization QLinearAdd QLinearMul QLinearSigmoid QLinearLeakyRelu
    """,
}
_CATEGORY_OF = {operator: category for category, names in _OPERATORS.items() for operator in names.split()}


def categories(graph: GraphProto, shapes: Sequence[Sequence[int]]) -> list[str]:
    """The category of each node.

    Args:
        graph: as the runtime optimised it.
        shapes: of the first input of each node, as they were in a run.
    """
    shuffles = {*_gathered_shuffles(graph), *_transposed_shuffles(graph, shapes)}
    return [
        "shuffle" if index in shuffles else _CATEGORY_OF.get(node.op_type, "other")
        for index, node in enumerate(graph.node)
    ]


def depthwise(graph: GraphProto) -> list[bool]:
    """Of each node, whether it is a convolution of many groups with one input channel each."""
    kernels = {constant.name: constant.dims for constant in graph.initializer}

    def is_depthwise(node: NodeProto) -> bool:
        place = _KERNEL_INPUT.get(node.op_type, len(node.input))
        dims = kernels.get(node.input[place], ()) if place < len(node.input) else ()
        return len(dims) > 2 and dims[1] == 1 and _attribute(node, "group", 1) > 1

    return [is_depthwise(node) for node in graph.node]


def _gathered_shuffles(graph: GraphProto) -> Iterator[int]:
    """Nodes that gather several channels by constant numbers which no slice could give."""
    constants = {constant.name: constant for constant in graph.initializer}
    for index, node in enumerate(graph.node):
        if node.op_type == "Gather" and _attribute(node, "axis", 0) != 0:
            order = constants.get(node.input[1])
            if order is not None and order.data_location != TensorProto.EXTERNAL and _is_shuffled(order):
                yield index


def _is_shuffled(order: TensorProto) -> bool:
    numbers = numpy_helper.to_array(order).reshape(-1)
    return len(set(numbers.tolist())) == len(numbers) and bool((np.diff(numbers) != 1).any())


def _transposed_shuffles(graph: GraphProto, shapes: Sequence[Sequence[int]]) -> Iterator[int]:
    """Nodes of every reshape, transpose, reshape that reorders channels (Zhang et al. 2018, section 3.1)."""
    maker = {name: index for index, node in enumerate(graph.node) for name in node.output}
    for index, node in enumerate(graph.node):
        if node.op_type != "Transpose":
            continue
        before = maker.get(node.input[0], index)
        after = [i for i, reader in enumerate(graph.node) if node.output[0] in reader.input]
        around = [before, *after]
        if len(around) > 1 and all(graph.node[i].op_type == "Reshape" for i in around):
            order = _attribute(node, "perm", range(len(shapes[index]))[::-1])
            if _swaps_channels(shapes[before], shapes[index], order):
                yield from (*around, index)


def _swaps_channels(whole: Sequence[int], split: Sequence[int], order: Sequence[int]) -> bool:
    """Whether a transposition turns channels `[groups, each]` of a feature map into `[each, groups]`.

    Args:
        whole: the shape before channels were split, `[N, C, ...]` or `[N, ..., C]`.
        split: the shape after.
        order: of the axes of `split`, as the transposition has it.
    """
    axes = [axis for axis in order if split[axis] != 1]  # an axis of one value does not matter
    while axes and axes[0] == min(axes):
        del axes[0]
    inner = 1
    while axes and axes[-1] == max(axes):
        inner *= split[axes.pop()]
    turn = axes.index(min(axes)) if axes else 0
    if len(whole) < 3 or not turn or axes[turn:] + axes[:turn] != sorted(axes):
        return False
    exchanged = math.prod(split[axis] for axis in axes)
    return inner == math.prod(whole[2:]) or (inner == 1 and exchanged == whole[-1])


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)
