"""Where the run time of a network goes: convolution, data, element-wise operators, shuffle, other.

The decomposition of ShuffleNet V2 (Ma et al. 2018, section 2, Figure 2) for any ONNX model on a device, read off the
graph that the runtime really ran, after its own optimisations; `node_categories.py` says what counts as what. The
runtime's time between the nodes is `other`.

A runtime that keeps a profile is slower, by about the same few microseconds at each node, which would make networks of
many small nodes look like little but data. So a chain of nodes that do nothing shows what the profile costs, each
node is given that back, and the sum is scaled down to the time without the profile if it still exceeds it.
"""

import base64
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import GraphProto, ModelProto, TensorProto, helper, load_model_from_string

from hwnas.calibration import Measurement
from hwnas.devices import Device, Timing
from hwnas.drawing import WIDTH, box, label, picture
from hwnas.errors import HwnasError
from hwnas.guidelines import network_sheet
from hwnas.network import Network
from hwnas.node_categories import CATEGORIES, categories, depthwise
from hwnas.onnx_model import IR_VERSION, OPSET, random_weights, to_onnx
from hwnas.reference import REFERENCE, reference

PAPER_PERCENT: dict[str, tuple[float, ...]] = {
    "ShuffleNet V1, GPU": (50, 20, 15, 5, 10),
    "MobileNet V2, GPU": (54, 22, 23, 0, 1),
    "ShuffleNet V1, ARM": (87, 1, 4, 0, 8),
    "MobileNet V2, ARM": (89, 0.3, 10.5, 0, 0.2),
}
"""Shares read off Figure 2 of Ma et al. 2018 (V1 1x with 3 groups, V2 1x), in the order of `CATEGORIES`."""

ROUNDS = 30
PERCENT_PLACES, MS_PLACES = 1, 4
"""Decimal places of what is told: tenths of a percent, tenths of a microsecond."""

_PROBE_NODES = 50


@dataclass(frozen=True, slots=True)
class NodeTime:
    """A node that ran.

    Attributes:
        operator, name: as the runtime calls it.
        category: one of `CATEGORIES`.
        depthwise: whether it is a convolution in which each channel sees only itself.
        latency_ms: its part of the time without the profile.
    """

    operator: str
    name: str
    category: str
    depthwise: bool
    latency_ms: float


@dataclass(frozen=True, slots=True)
class Breakdown:
    """The run time of a model and of its nodes.

    Attributes:
        total: samples of the whole model without the profile.
        nodes: in the order in which they ran; together at most as long as the median of `total`.
    """

    total: Measurement
    nodes: tuple[NodeTime, ...]

    @property
    def between_ms(self) -> float:
        """What the runtime needs between the nodes; it counts as `other`."""
        return max(0.0, self.total.median_ms - sum(node.latency_ms for node in self.nodes))

    @property
    def depthwise_ms(self) -> float:
        return sum(node.latency_ms for node in self.nodes if node.depthwise)

    @property
    def category_ms(self) -> dict[str, float]:
        """Milliseconds by category, in the order of `CATEGORIES`; their sum is the median of `total`."""
        sums = dict.fromkeys(CATEGORIES, 0.0) | {"other": self.between_ms}
        for node in self.nodes:
            sums[node.category] += node.latency_ms
        return sums


def break_down(
    model: bytes | Path,
    device: Device,
    *,
    threads: int = 1,
    seed: int = 0,
    on_progress: Callable[[int, int, str], None] = lambda done, total, words: None,
) -> Breakdown:
    """Measures a model on a device, node by node.

    Args:
        model: serialised, or a file.
        threads: threads inside an operator.
        seed: of the inputs.
        on_progress: called with done, total and a few words.

    Raises:
        DeviceError: the model does not load or run there, or hangs.
    """
    timing = Timing(threads=threads, rounds=ROUNDS, seed=seed)
    cost_ms = _profile_cost_ms(device.profile(_probe().SerializeToString(), timing))
    answer = device.profile(model, timing, lambda number: on_progress(number, ROUNDS, "rounds"))
    graph = load_model_from_string(base64.b64decode(answer["graph"])).graph
    return from_profile(answer, graph, cost_ms)


def from_profile(answer: Mapping[str, Any], graph: GraphProto, cost_ms: float) -> Breakdown:
    """The breakdown from what a device answered.

    Args:
        answer: of `measure.profile_model`.
        graph: the one that ran.
        cost_ms: what the profile adds to each node.
    """
    operators, names, shapes, times = zip(*answer["nodes"], strict=True) if answer["nodes"] else ((),) * 4
    if list(operators) != [node.op_type for node in graph.node]:
        raise HwnasError(
            f"The profile, of {len(operators)} nodes, must name the {len(graph.node)} nodes of the graph in their "
            "order, and it does not. Run the command again."
        )
    net_ms = [max(0.0, time_ms - cost_ms) for time_ms in times]
    gross_ms = sum(times)
    busy = statistics.median(
        nodes_ms / total_ms for nodes_ms, total_ms in zip(answer["nodes_ms"], answer["samples_ms"], strict=True)
    )
    net_share = busy * sum(net_ms) / gross_ms if gross_ms else 0.0
    total = Measurement(tuple(answer["samples_ms"]))
    factor = total.median_ms * min(1.0, net_share) / sum(net_ms) if net_share else 0.0
    kinds = zip(operators, names, categories(graph, shapes), depthwise(graph), net_ms, strict=True)
    nodes = (NodeTime(operator, name, kind, apart, ms * factor) for operator, name, kind, apart, ms in kinds)
    return Breakdown(total, tuple(nodes))


def _probe() -> ModelProto:
    """A chain of nodes that do next to nothing."""
    nodes = [helper.make_node("Neg", [f"x{i}"], [f"x{i + 1}"]) for i in range(_PROBE_NODES)]
    ends = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, [1, 8]) for i in (0, _PROBE_NODES)]
    graph = helper.make_graph(nodes, "probe", ends[:1], ends[1:])
    return helper.make_model(graph, ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", OPSET)])


def _profile_cost_ms(answer: Mapping[str, Any]) -> float:
    """What a profile adds to the time of each node, from the profile of `_probe()`."""
    added_ms = statistics.median(answer["nodes_ms"]) - statistics.median(answer["samples_ms"])
    return max(0.0, added_ms / _PROBE_NODES)


# ---- what is told ------------------------------------------------------------------------------------------------


def model_of(what: str, seed: int) -> bytes | Path:
    """The model that a user means: a network of the literature by name, with random weights, or an ONNX file."""
    if what in REFERENCE:
        network = reference(what)
        return to_onnx(network, random_weights(network, seed)).SerializeToString()
    path = Path(what)
    if not path.is_file():
        raise HwnasError(
            f"There is no model '{what}'. Give an ONNX file, or a network of the literature: {', '.join(REFERENCE)}."
        )
    return path


def apportioned(parts: Sequence[float], total: float, places: int) -> tuple[float, ...]:
    """`parts` scaled to `total` and rounded to decimal places so that the rounded ones sum to the rounded total.

    What is left after rounding down goes to the largest remainders (Hamilton's method).
    """
    units = round(total * 10**places)
    exact = [part / sum(parts) * units for part in parts]
    counts = [math.floor(value) for value in exact]
    most_cut = sorted(range(len(parts)), key=lambda i: counts[i] - exact[i])
    for index in most_cut[: units - sum(counts)]:
        counts[index] += 1
    return tuple(count / 10**places for count in counts)


def breakdown_facts(breakdown: Breakdown) -> dict[str, Any]:
    """Facts for a program; milliseconds sum to `total_ms` and shares to 100 as they are written."""
    sums = tuple(breakdown.category_ms.values())
    total_ms = round(breakdown.total.median_ms, MS_PLACES)
    percent = apportioned(sums, 100, PERCENT_PLACES)
    depthwise_percent = round(100 * breakdown.depthwise_ms / breakdown.total.median_ms, PERCENT_PLACES)
    return {
        "total_ms": total_ms,
        "spread_ms": round(breakdown.total.spread_ms, MS_PLACES),
        "rounds": len(breakdown.total.samples_ms),
        "ms": dict(zip(CATEGORIES, apportioned(sums, total_ms, MS_PLACES), strict=True)),
        "percent": dict(zip(CATEGORIES, percent, strict=True)),
        "depthwise_ms": round(breakdown.depthwise_ms, MS_PLACES),
        "depthwise_percent": depthwise_percent,
        "element_wise_percent": round(percent[CATEGORIES.index("element-wise")] + depthwise_percent, PERCENT_PLACES),
        "between_nodes_ms": round(breakdown.between_ms, MS_PLACES),
        "operators": _operator_facts(breakdown.nodes),
        "nodes": [
            {"operator": n.operator, "name": n.name, "category": n.category, "ms": round(n.latency_ms, MS_PLACES)}
            for n in breakdown.nodes
        ],
        "paper_percent": {name: dict(zip(CATEGORIES, shares, strict=True)) for name, shares in PAPER_PERCENT.items()},
    }


def _operator_facts(nodes: Sequence[NodeTime]) -> list[dict[str, Any]]:
    """One entry for each operator and category, the longest first."""
    counts = Counter((node.operator, node.category, node.depthwise) for node in nodes)
    sums = dict.fromkeys(counts, 0.0)
    for node in nodes:
        sums[node.operator, node.category, node.depthwise] += node.latency_ms
    longest = sorted(sums, key=lambda key: -sums[key])
    return [
        {
            "operator": key[0],
            "category": key[1],
            "depthwise": key[2],
            "count": counts[key],
            "ms": round(sums[key], MS_PLACES),
        }
        for key in longest
    ]


def element_wise_words(facts: Mapping[str, Any], network: Network | None) -> str:
    """G4 of a model in time, and in memory access too where its `Network` is known.

    Depthwise convolutions count as element-wise, as in `guidelines` and in the paper (section 2, G4).
    """
    words = (
        f"G4: element-wise operators and depthwise convolutions take {facts['element_wise_percent']:g} % of the time"
    )
    return f"{words} and {network_sheet(network).whole.value('G4'):.0%} of memory access" if network else words


def breakdown_rows(facts: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A table for a person from `breakdown_facts`, its header first: own time and shares beside the paper's."""
    rows = [("", "ms", "%", *(f"{name}, %" for name in PAPER_PERCENT))]
    for index, category in enumerate(CATEGORIES):
        paper = [f"{shares[index]:g}" for shares in PAPER_PERCENT.values()]
        rows.append((category, *_amounts(facts["ms"][category], facts["percent"][category]), *paper))
        if category == "convolution":
            apart = _amounts(facts["depthwise_ms"], facts["depthwise_percent"])
            rows.append(("  of it depthwise", *apart, *[""] * len(PAPER_PERCENT)))
    return [*rows, ("sum", *_amounts(facts["total_ms"], 100.0), *["100"] * len(PAPER_PERCENT))]


def _amounts(ms: float, percent: float) -> tuple[str, str]:
    return f"{ms:.{MS_PLACES}f}", f"{percent:.{PERCENT_PLACES}f}"


def breakdown_picture(facts: Mapping[str, Any], name: str) -> str:
    """The shares as a stacked bar over those of the paper's four, as SVG."""
    colours = ("main", "half", "good", "bad", "soft")
    bars = {f"{name}: {facts['total_ms']:.4g} ms": tuple(facts["percent"].values())} | PAPER_PERCENT
    parts = []
    for index, (category, colour) in enumerate(zip(CATEGORIES, colours, strict=True)):
        parts.append(box(16 + 92 * index, 12, 11, 11, f"f-{colour}", 2))
        parts.append(label(31 + 92 * index, 22, category, size=12.5))
    for index, (title, shares) in enumerate(bars.items()):
        x, y = 16.0, 54 + 48 * index
        parts.append(label(x, y, title, size=12.5, bold=index == 0))
        for share, colour in zip(shares, colours, strict=True):
            width = share / 100 * (WIDTH - 32)
            parts.append(box(x, y + 7, width, 20, f"f-{colour}"))
            if width > 30:
                parts.append(label(x + width / 2, y + 21.5, f"{share:g}", colour="on", size=11.5, anchor="middle"))
            x += width
    height = 54 + 48 * len(bars) + 2
    parts.append(label(16, height - 14, "% of the run time; below: Figure 2 of Ma et al. 2018", colour="soft", size=12))
    return picture(height, f"Run time of {name} by category", "".join(parts))
