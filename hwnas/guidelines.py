"""G1 to G4 as numbers of a `Network`: its guideline sheet, for a unit and for the whole (ShuffleNet V2, section 2).

| guideline                                | number                                                   | ideal |
|------------------------------------------|----------------------------------------------------------|-------|
| G1: equal channels in and out            | memory access of the 1x1 convolutions over its bound     | 1     |
| G2: few groups                           | mean groups of the convolutions, weighted by their MACs  | 1     |
| G3: few fragments                        | convolutions and poolings in a unit                      | 1     |
| G4: few element-wise operators           | their share of all memory access                         | 0     |

Batch norms count nowhere: they are folded into convolutions before a network runs. All counts are for one image.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

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
    Node,
    Pool,
    Unit,
    is_depthwise,
    node_macs,
    node_memory_access,
    weight_shapes,
)

GUIDELINES = {
    "G1": "memory access of 1x1 convolutions over its bound",
    "G2": "groups of a convolution, weighted by MACs",
    "G3": "convolutions and poolings in a unit",
    "G4": "element-wise share of memory access",
}
"""What the number of each guideline is."""

LIMITS = {"G1": 1.1, "G2": 1.1, "G3": 6.0, "G4": 0.6}
"""What a network that keeps a guideline stays at or under.

They lie between the networks that the paper names on either side (section 2, discussion; `tests/test_guidelines.py`):
G1 between ShuffleNet V2 (1.01) and V1 (1.14 to 1.20) or MobileNet V2 (1.23 to 1.26); G3 is twice the three fragments of
a ResNet bottleneck; G4 lies between V1 (0.50 to 0.54) and MobileNet V2 (0.62 to 0.64), V2 having 0.3.
"""


@dataclass(frozen=True, slots=True)
class Sheet:
    """What the guidelines look at in a unit, or in all units of a network together.

    Attributes:
        name: of the unit or the network.
        macs, grouped_macs: multiply-adds of the convolutions that are not depthwise, and the same times their groups.
        pointwise_access, pointwise_bound: memory access of the 1x1 convolutions of stride 1 and its lower bound, in
            values.
        fragments: of a unit; the mean over the units of a network.
        element_wise_access, convolution_access, memory_access: values that element-wise operators, all other
            convolutions and linear layers, and all operators together read and write if none is fused.
    """

    name: str
    macs: int
    grouped_macs: int
    pointwise_access: int
    pointwise_bound: float
    fragments: float
    element_wise_access: int
    convolution_access: int
    memory_access: int

    def value(self, guideline: str) -> float:
        """The number of a guideline; a unit without the operators that it is about has the ideal one."""
        match guideline:
            case "G1":
                return self.pointwise_access / self.pointwise_bound if self.pointwise_bound else 1.0
            case "G2":
                return self.grouped_macs / self.macs if self.macs else 1.0
            case "G3":
                return float(self.fragments)
            case "G4":
                return self.element_wise_access / self.memory_access if self.memory_access else 0.0
        raise ValueError(f"the guidelines are {', '.join(GUIDELINES)}, not {guideline}")

    @property
    def excess(self) -> float:
        """The greatest of the four numbers, each over its limit: above 1 where a guideline is broken."""
        return max(self.value(guideline) / limit for guideline, limit in LIMITS.items())


@dataclass(frozen=True, slots=True)
class Finding:
    """What one guideline says about a network; `worst` are up to three units worse than the whole, worst first."""

    guideline: str
    value: float
    worst: tuple[Sheet, ...]

    @property
    def broken(self) -> bool:
        return self.value > LIMITS[self.guideline]

    @property
    def text(self) -> str:
        """Such as `G2 broken: groups of a convolution, weighted by MACs 2.81, limit 1.1; worst: stage2.2 3.00, ...`"""
        word = "broken" if self.broken else "kept"
        text = f"{self.guideline} {word}: {GUIDELINES[self.guideline]} {self.value:.2f}, "
        text += f"limit {LIMITS[self.guideline]:g}"
        worst = ", ".join(f"{sheet.name} {sheet.value(self.guideline):.2f}" for sheet in self.worst)
        return f"{text}; worst: {worst}" if worst else text


@dataclass(frozen=True, slots=True)
class NetworkSheet:
    """The guideline sheet of a network: its units in order, and their sum."""

    whole: Sheet
    units: tuple[Sheet, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """One for each guideline."""
        return tuple(self._finding(guideline) for guideline in GUIDELINES)

    @property
    def broken(self) -> tuple[str, ...]:
        """The guidelines that the network breaks."""
        return tuple(finding.guideline for finding in self.findings if finding.broken)

    @property
    def worst_first(self) -> tuple[Sheet, ...]:
        """The units by how far the worst of their numbers is over its limit."""
        return tuple(sorted(self.units, key=lambda sheet: -sheet.excess))

    def _finding(self, guideline: str) -> Finding:
        value = self.whole.value(guideline)
        worse = [sheet for sheet in self.units if sheet.value(guideline) > 1.001 * value]
        return Finding(guideline, value, tuple(sorted(worse, key=lambda sheet: -sheet.value(guideline))[:3]))


def network_sheet(network: Network) -> NetworkSheet:
    """The guideline sheet of any network."""
    units = tuple(unit_sheet(unit) for unit in network.units)
    counts = [field.name for field in fields(Sheet) if field.name != "name"]
    whole = Sheet(network.name, *(sum(getattr(unit, count) for unit in units) for count in counts))
    return NetworkSheet(replace(whole, fragments=whole.fragments / len(units)), units)


def unit_sheet(unit: Unit) -> Sheet:
    """The guideline sheet of one unit."""
    dense = [node for node in unit.nodes if isinstance(node.operator, Conv) and not is_depthwise(node)]
    pointwise = [node for node in dense if is_pointwise(node)]
    moved = [node for node in unit.nodes if not isinstance(node.operator, BatchNorm | Flatten)]
    return Sheet(
        unit.name,
        macs=sum(map(node_macs, dense)),
        grouped_macs=sum(groups_of(node) * node_macs(node) for node in dense),
        pointwise_access=sum(map(node_memory_access, pointwise)),
        pointwise_bound=sum(map(memory_access_bound, pointwise)),
        fragments=fragments(unit),
        element_wise_access=_access(node for node in moved if is_element_wise(node)),
        convolution_access=_access(dense) + _access(node for node in moved if isinstance(node.operator, Linear)),
        memory_access=_access(moved),
    )


def _access(nodes: Iterable[Node]) -> int:
    return sum(map(node_memory_access, nodes))


def groups_of(node: Node) -> int:
    """The groups of a convolution; 1 for every other operator."""
    return node.operator.groups if isinstance(node.operator, Conv) else 1


def is_pointwise(node: Node) -> bool:
    """Whether the node is a 1x1 convolution that leaves height and width as they are."""
    return isinstance(node.operator, Conv) and node.operator.kernel == node.operator.stride == 1


def is_element_wise(node: Node) -> bool:
    """Activations, sums, products, and depthwise convolutions, which the paper counts here too (section 2, G4)."""
    return isinstance(node.operator, Activation | Add | Multiply) or is_depthwise(node)


def memory_access_bound(node: Node) -> float:
    """The least memory access of 1x1 convolutions of as many MACs `B`, groups `g` and positions `hw` as this one.

    The paper's `2 sqrt(hw B) + B / hw` (section 2, equation 1) where g = 1; its equation 2, `hw (c1 + c2) + B / hw`
    with `c1 c2 = B g / hw`, gives `2 sqrt(hw B g) + B / hw` for more groups. It is reached where c1 = c2, and grows
    with g at fixed B.
    """
    positions = math.prod(node.outputs[0].shape[1:])
    own = node_macs(node)
    others = sum(math.prod(shape) for suffix, shape in weight_shapes(node).items() if suffix != "kernel")
    return 2 * math.sqrt(positions * own * groups_of(node)) + own / positions + others


def fragments(unit: Unit) -> int:
    """How many convolutions and poolings a unit is made of (section 2, G3).

    A depthwise convolution that goes into a pointwise one with at most batch norm between them counts with it as one,
    the separable convolution. So a cell of NASNet-A, which applies five separable convolutions twice and pools three
    times, has the 13 of the paper, and a ResNet unit without projection 2 or 3.
    """
    made_by: dict[str, Node | None] = {}
    count = 0
    for node in unit.nodes:
        source = made_by.get(node.inputs[0].name)
        if isinstance(node.operator, Conv | Pool | GlobalAveragePool):
            count += not (is_pointwise(node) and source is not None and is_depthwise(source))
        made_by |= {out.name: source if isinstance(node.operator, BatchNorm) else node for out in node.outputs}
    return count
