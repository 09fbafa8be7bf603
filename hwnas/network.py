"""`Network`: typed operators with static shapes, cut into named units.

This is the only place that walks shapes. MACs, parameters, memory access, the ONNX model, the JAX forward pass and the
keys of the latency table are all read off a `Network`.

A tensor is named after the node that makes it; a node with several outputs adds `.0`, `.1`, ... Shapes are those of
one image, without the batch axis: `(C, H, W)` for feature maps and `(C,)` after `Flatten`.
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from hwnas.errors import HwnasError

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Conv:
    """A convolution without padding modes or dilation; `groups == channels` makes it depthwise."""

    channels: int
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    groups: int = 1
    bias: bool = False


@dataclass(frozen=True, slots=True)
class BatchNorm:
    """Per-channel normalisation: trained scale and offset, running mean and variance (Ioffe & Szegedy 2015)."""

    epsilon: float = 1e-5


@dataclass(frozen=True, slots=True)
class Activation:
    """An element-wise non-linearity: `relu`, `relu6`, `sigmoid` or `hard_sigmoid`."""

    function: str


@dataclass(frozen=True, slots=True)
class Pool:
    """Maximum or average pooling over a square window. Average pooling counts the padding, as the papers' code does."""

    reduction: str
    kernel: int
    stride: int
    padding: int = 0


@dataclass(frozen=True, slots=True)
class GlobalAveragePool:
    """The mean over height and width: `(C, H, W) -> (C, 1, 1)`."""


@dataclass(frozen=True, slots=True)
class Flatten:
    """`(C, H, W) -> (C * H * W,)`, channels first."""


@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix product with a vector: `(C,) -> (features,)`."""

    features: int
    bias: bool = True


@dataclass(frozen=True, slots=True)
class Add:
    """The element-wise sum of two or more tensors of equal shape."""


@dataclass(frozen=True, slots=True)
class Multiply:
    """The element-wise product of two tensors; a `(C, 1, 1)` tensor spreads over height and width."""


@dataclass(frozen=True, slots=True)
class Concat:
    """Joins tensors along the channels."""


@dataclass(frozen=True, slots=True)
class Split:
    """Cuts a tensor along the channels into pieces of the given sizes."""

    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shuffle:
    """Channel shuffle: `out[i * groups + k] = in[k * (C / groups) + i]` (ShuffleNet V1, section 3.1)."""

    groups: int


Operator = (
    Conv
    | BatchNorm
    | Activation
    | Pool
    | GlobalAveragePool
    | Flatten
    | Linear
    | Add
    | Multiply
    | Concat
    | Split
    | Shuffle
)


@dataclass(frozen=True, slots=True)
class Tensor:
    """The name and the shape of an activation, without the batch axis."""

    name: str
    shape: Shape

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Node:
    """One application of an operator."""

    name: str
    operator: Operator
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Unit:
    """A named run of nodes: the stem, one ShuffleNet unit, one cell, the head. Units are what a latency table times."""

    name: str
    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Network:
    """A feed-forward image network. Nodes stand in an order in which they can be run."""

    name: str
    input: Tensor
    units: tuple[Unit, ...]
    outputs: tuple[Tensor, ...]

    @property
    def nodes(self) -> tuple[Node, ...]:
        return tuple(node for unit in self.units for node in unit.nodes)


def shuffle_order(channels: int, groups: int) -> tuple[int, ...]:
    """Where each channel after a shuffle came from: `shuffle_order(6, 3) == (0, 2, 4, 1, 3, 5)`."""
    per_group = channels // groups
    return tuple(k * per_group + i for i in range(per_group) for k in range(groups))


def is_depthwise(node: Node) -> bool:
    """Whether the node is a convolution in which each channel sees only itself."""
    operator = node.operator
    return isinstance(operator, Conv) and operator.groups == operator.channels == node.inputs[0].shape[0] > 1


def output_shapes(operator: Operator, inputs: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """The shapes that an operator makes of its inputs' shapes; `HwnasError` if it cannot take them."""
    shape = inputs[0]
    match operator:
        case Conv():
            for what, channels in (("input", shape[0]), ("output", operator.channels)):
                if channels % operator.groups:
                    raise HwnasError(
                        f"A convolution's {what} channels must divide by its groups: {channels} channels, "
                        f"{operator.groups} groups. The nearest width that works is "
                        f"{nearest_multiple(channels, operator.groups)}."
                    )
            return ((operator.channels, *_window(shape, operator.kernel, operator.stride, operator.padding)),)
        case Pool():
            return ((shape[0], *_window(shape, operator.kernel, operator.stride, operator.padding)),)
        case GlobalAveragePool():
            return ((shape[0], 1, 1),)
        case Flatten():
            return ((math.prod(shape),),)
        case Linear():
            if len(shape) != 1:
                raise HwnasError(f"A linear layer takes a flat tensor; it got {shape}. Put a Flatten before it.")
            return ((operator.features,),)
        case Add():
            if len(set(inputs)) != 1:
                raise HwnasError(f"An addition takes tensors of equal shape; it got {inputs}.")
            return (shape,)
        case Multiply():
            if inputs[1] not in (shape, (shape[0], 1, 1)):
                raise HwnasError(f"A product takes equal shapes or one value a channel; it got {inputs}.")
            return (shape,)
        case Concat():
            if len({other[1:] for other in inputs}) != 1:
                raise HwnasError(f"A concatenation takes tensors of equal height and width; it got {inputs}.")
            return ((sum(other[0] for other in inputs), *shape[1:]),)
        case Split():
            if sum(operator.sizes) != shape[0] or min(operator.sizes) < 1:
                raise HwnasError(f"A split must use up all {shape[0]} channels; its sizes are {operator.sizes}.")
            return tuple((size, *shape[1:]) for size in operator.sizes)
        case Shuffle():
            if shape[0] % operator.groups:
                raise HwnasError(
                    f"A channel shuffle of {operator.groups} groups cannot take {shape[0]} channels. The nearest "
                    f"width that works is {nearest_multiple(shape[0], operator.groups)}."
                )
            return (shape,)
        case BatchNorm() | Activation():
            return (shape,)


def nearest_multiple(value: int, divisor: int) -> int:
    """The multiple of `divisor` nearest to `value`, and at least `divisor`."""
    return max(divisor, round(value / divisor) * divisor)


def _window(shape: Shape, kernel: int, stride: int, padding: int) -> Shape:
    sides = tuple((side + 2 * padding - kernel) // stride + 1 for side in shape[1:])
    if len(shape) != 3 or min(sides) < 1:
        raise HwnasError(f"A {kernel}x{kernel} window does not fit on a tensor of shape {shape}.")
    return sides


def weight_shapes(node: Node) -> dict[str, Shape]:
    """The arrays that a node owns, trained and running alike, by suffix.

    Convolution kernels are `[height, width, in / groups, out]` and linear kernels `[in, out]`, as JAX has them.
    """
    match node.operator:
        case Conv(channels=channels, kernel=kernel, groups=groups, bias=bias):
            shapes: dict[str, Shape] = {"kernel": (kernel, kernel, node.inputs[0].shape[0] // groups, channels)}
            return shapes | ({"bias": (channels,)} if bias else {})
        case Linear(features=features, bias=bias):
            return {"kernel": (node.inputs[0].shape[0], features)} | ({"bias": (features,)} if bias else {})
        case BatchNorm():
            return dict.fromkeys(("scale", "offset", "mean", "variance"), (node.inputs[0].shape[0],))
        case _:
            return {}


TRAINED = ("kernel", "bias", "scale", "offset")


def parameters(network: Network) -> int:
    """The number of trained values: kernels, biases, and the scale and offset of each batch norm."""
    return sum(
        math.prod(shape) for node in network.nodes for suffix, shape in weight_shapes(node).items() if suffix in TRAINED
    )


def macs(network: Network) -> int:
    """Multiply-adds of convolutions and linear layers for one image: what the ShuffleNet papers call FLOPs."""
    return sum(node_macs(node) for node in network.nodes)


def node_macs(node: Node) -> int:
    """Multiply-adds of one node for one image; biases, pooling and element-wise operators count nothing."""
    if not isinstance(node.operator, Conv | Linear):
        return 0
    positions = math.prod(node.outputs[0].shape[1:])
    return positions * math.prod(weight_shapes(node)["kernel"])


def memory_access(network: Network) -> int:
    """Values read and written for one image if no operator is fused: activations in and out, and weights once.

    For a 1x1 convolution this is the paper's `hw(c1 + c2) + c1 c2` (ShuffleNet V2, section 2, G1).
    """
    return sum(node_memory_access(node) for node in network.nodes)


def node_memory_access(node: Node) -> int:
    """Values that one node reads and writes for one image, weights included."""
    activations = sum(tensor.size for tensor in (*node.inputs, *node.outputs))
    return activations + sum(math.prod(shape) for shape in weight_shapes(node).values())


def sub_network(network: Network, first: int, last: int) -> Network:
    """Units `first` to `last` (both included) as a network of their own.

    They must hang together by one tensor in and one tensor out, as the units of a chain do.
    """
    units = network.units[first : last + 1]
    made = {tensor.name for unit in units for node in unit.nodes for tensor in node.outputs}
    taken = {t.name: t for unit in units for node in unit.nodes for t in node.inputs if t.name not in made}
    if len(taken) != 1:
        raise ValueError(f"units {first} to {last} of {network.name} take {len(taken)} tensors from outside")
    (entry,) = taken.values()
    return Network(f"{network.name}[{first}:{last}]", entry, units, units[-1].nodes[-1].outputs)


def unit_input(unit: Unit) -> Tensor:
    """The tensor that a unit of a chain takes from the unit before it."""
    return unit.nodes[0].inputs[0]


def unit_key(unit: Unit) -> str:
    """Twelve hexadecimal digits that two units share exactly when they do the same to the same shapes.

    Names do not count: operators with all their fields, the shapes of the tensors and the wiring do.
    """
    numbers: dict[str, int] = {}
    lines = []
    for node in unit.nodes:
        inputs = [(numbers.setdefault(t.name, len(numbers)), t.shape) for t in node.inputs]
        outputs = [(numbers.setdefault(t.name, len(numbers)), t.shape) for t in node.outputs]
        settings = [(field.name, getattr(node.operator, field.name)) for field in fields(node.operator)]
        lines.append(repr((type(node.operator).__name__, settings, inputs, outputs)))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def sole_readers(network: Network, made_by: type, read_by: type) -> dict[str, Node]:
    """For nodes of type `made_by`, by name: the node of type `read_by` that alone reads what they make."""
    readers: dict[str, list[Node]] = {}
    for node in network.nodes:
        for tensor in node.inputs:
            readers.setdefault(tensor.name, []).append(node)
    outputs = {tensor.name for tensor in network.outputs}
    pairs: dict[str, Node] = {}
    for node in network.nodes:
        made = node.outputs[0].name
        if isinstance(node.operator, made_by) and made not in outputs and len(readers.get(made, ())) == 1:
            (reader,) = readers[made]
            if isinstance(reader.operator, read_by):
                pairs[node.name] = reader
    return pairs


class NetworkBuilder:
    """Makes a `Network` node by node; every method returns the tensor that it made.

    >>> b = NetworkBuilder("one layer", (3, 32, 32))
    >>> with b.unit("stem"):
    ...     x = b.conv_bn(b.input, 16, kernel=3, stride=2)
    >>> b.build(x).units[0].nodes[0].outputs[0].shape
    (16, 16, 16)
    """

    def __init__(self, name: str, input_shape: Shape) -> None:
        self.name = name
        self.input = Tensor("image", input_shape)
        self._units: list[Unit] = []
        self._nodes: list[Node] = []
        self._unit = ""

    @contextmanager
    def unit(self, name: str) -> Iterator[None]:
        """The nodes made inside belong to the unit `name`, which must be new, and are named after it."""
        if any(unit.name == name for unit in self._units):
            raise ValueError(f"unit {name} is there already")
        self._unit, self._nodes = name, []
        yield
        self._units.append(Unit(name, tuple(self._nodes)))
        self._unit = ""

    def add_node(self, operator: Operator, *inputs: Tensor, name: str) -> tuple[Tensor, ...]:
        """Adds a node to the open unit; `name` must be new in that unit."""
        if not self._unit:
            raise ValueError("nodes are made inside `with builder.unit(...)`")
        full_name = f"{self._unit}.{name}"
        if any(node.name == full_name for node in self._nodes):
            raise ValueError(f"{full_name} is there already")
        shapes = output_shapes(operator, tuple(tensor.shape for tensor in inputs))
        names = [full_name] if len(shapes) == 1 else [f"{full_name}.{i}" for i in range(len(shapes))]
        outputs = tuple(Tensor(*pair) for pair in zip(names, shapes, strict=True))
        self._nodes.append(Node(full_name, operator, inputs, outputs))
        return outputs

    def conv(
        self, x: Tensor, channels: int, *, name: str, kernel: int = 1, stride: int = 1, groups: int = 1, bias=False
    ) -> Tensor:
        """A convolution padded by `kernel // 2`."""
        operator = Conv(channels, kernel, stride, kernel // 2, groups, bias)
        return self.add_node(operator, x, name=name)[0]

    def conv_bn(
        self,
        x: Tensor,
        channels: int,
        *,
        name: str = "conv",
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        activation: str | None = None,
    ) -> Tensor:
        """Convolution without bias, batch norm (`name`_bn), and the activation (`name`_relu, ...) if one is named."""
        x = self.conv(x, channels, name=name, kernel=kernel, stride=stride, groups=groups)
        x = self.add_node(BatchNorm(), x, name=f"{name}_bn")[0]
        return self.activation(x, activation, name=f"{name}_{activation}") if activation else x

    def activation(self, x: Tensor, function: str, *, name: str) -> Tensor:
        return self.add_node(Activation(function), x, name=name)[0]

    def pool(self, x: Tensor, reduction: str, *, name: str, kernel: int = 3, stride: int = 2) -> Tensor:
        """A pooling window padded by `kernel // 2`."""
        return self.add_node(Pool(reduction, kernel, stride, kernel // 2), x, name=name)[0]

    def split(self, x: Tensor, sizes: tuple[int, ...], *, name: str = "split") -> tuple[Tensor, ...]:
        return self.add_node(Split(sizes), x, name=name)

    def concat(self, *inputs: Tensor, name: str = "concat") -> Tensor:
        return self.add_node(Concat(), *inputs, name=name)[0]

    def add(self, *inputs: Tensor, name: str = "add") -> Tensor:
        return self.add_node(Add(), *inputs, name=name)[0]

    def shuffle(self, x: Tensor, groups: int, *, name: str = "shuffle") -> Tensor:
        return self.add_node(Shuffle(groups), x, name=name)[0]

    def squeeze_excite(self, x: Tensor, hidden: int, *, name: str = "se") -> Tensor:
        """Squeeze-excite: global mean, two 1x1 convolutions, a sigmoid gate (Hu et al. 2018, section 3)."""
        gate = self.add_node(GlobalAveragePool(), x, name=f"{name}_mean")[0]
        gate = self.conv(gate, hidden, name=f"{name}_reduce", bias=True)
        gate = self.activation(gate, "relu", name=f"{name}_relu")
        gate = self.conv(gate, x.shape[0], name=f"{name}_expand", bias=True)
        gate = self.activation(gate, "sigmoid", name=f"{name}_sigmoid")
        return self.add_node(Multiply(), x, gate, name=f"{name}_scale")[0]

    def classifier(self, x: Tensor, classes: int, *, bias: bool = True) -> Tensor:
        """Global mean, flatten, linear."""
        x = self.add_node(GlobalAveragePool(), x, name="mean")[0]
        x = self.add_node(Flatten(), x, name="flatten")[0]
        return self.add_node(Linear(classes, bias), x, name="linear")[0]

    def build(self, *outputs: Tensor) -> Network:
        return Network(self.name, self.input, tuple(self._units), outputs)
