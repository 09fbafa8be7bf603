"""`hwnas breakdown`: what each node counts as, that the parts sum to the whole, and models of all sorts for real."""

import json
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Answer
from hypothesis import given
from hypothesis import strategies as some
from onnx import TensorProto, helper, numpy_helper

from hwnas import node_profile
from hwnas.breakdown import (
    PAPER_PERCENT,
    Breakdown,
    NodeTime,
    apportioned,
    break_down,
    breakdown_facts,
    breakdown_picture,
    breakdown_rows,
    element_wise_words,
    from_profile,
    model_of,
)
from hwnas.calibration import Measurement
from hwnas.devices import Timing
from hwnas.errors import DeviceError, HwnasError
from hwnas.guidelines import network_sheet
from hwnas.network import Network, NetworkBuilder, shuffle_order
from hwnas.node_categories import CATEGORIES, categories, depthwise
from hwnas.onnx_model import random_weights, to_onnx
from hwnas.opening import open_device
from hwnas.reference import reference
from hwnas.show import network_of_model
from hwnas.space import lower
from hwnas.space_toml import load_space
from hwnas.units import UnitChoice, head, shufflenet_v2_unit

Model = onnx.ModelProto


def constant(name: str, values: Any) -> TensorProto:
    return numpy_helper.from_array(np.asarray(values), name)


def graph_of(*nodes: onnx.NodeProto, constants: Sequence[TensorProto] = ()) -> onnx.GraphProto:
    return onnx.GraphProto(name="test", node=nodes, initializer=constants)


def category_of(node: onnx.NodeProto, shape: Sequence[int] = (1, 6, 4, 4), *constants: TensorProto) -> str:
    (category,) = categories(graph_of(node, constants=constants), [shape])
    return category


# ---- what a node is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("category", "operators"),
    {
        "convolution": "Conv FusedConv QLinearConv Gemm QGemm MatMul",
        "data": "ReorderInput ReorderOutput Transpose Concat QLinearConcat Split QuantizeLinear Flatten",
        "element-wise": "Relu Clip Add QLinearAdd Mul Sigmoid HardSigmoid BatchNormalization",
        "other": "MaxPool NhwcMaxPool AveragePool QLinearGlobalAveragePool If Softmax Unheard",
    }.items(),
)
def test_operators_count_as_what_they_do(category: str, operators: str):
    for operator in operators.split():
        assert category_of(helper.make_node(operator, ["x"], ["y"])) == category, operator


@pytest.mark.parametrize(
    ("order", "category"),
    [
        (shuffle_order(6, 3), "shuffle"),
        (shuffle_order(6, 2)[:3], "shuffle"),  # and a split in the same node
        ((2, 3, 4), "data"),  # a slice
        ((0, 0, 1, 1), "data"),  # a repetition
        ((1,), "data"),
        (1, "data"),
    ],
)
def test_a_gather_of_channels_is_a_shuffle_if_no_slice_could_do_it(order: Any, category: str):
    gather = helper.make_node("Gather", ["x", "order"], ["y"], axis=1)
    assert category_of(gather, (1, 6, 4, 4), constant("order", np.array(order, np.int64))) == category


def test_a_gather_of_images_or_by_unknown_numbers_is_no_shuffle():
    order = constant("order", np.array([1, 0, 3, 2]))
    assert category_of(helper.make_node("Gather", ["x", "order"], ["y"]), (4, 6), order) == "data"
    assert category_of(helper.make_node("Gather", ["x", "computed"], ["y"], axis=1), (4, 6), order) == "data"


def reordered(whole: Sequence[int], split: Sequence[int], perm: Sequence[int]) -> list[str]:
    """The categories of a reshape of `whole` to `split`, a transposition, and a reshape back."""
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["a"]),
        helper.make_node("Transpose", ["a"], ["b"], perm=perm),
        helper.make_node("Reshape", ["b", "back"], ["y"]),
    ]
    return categories(graph_of(*nodes), [whole, split, [split[axis] for axis in perm]])


@pytest.mark.parametrize(
    ("whole", "split", "perm"),
    [
        ((2, 6, 5, 4), (2, 3, 2, 5, 4), (0, 2, 1, 3, 4)),  # torchvision's
        ((2, 6, 5, 4), (2, 3, 2, 20), (0, 2, 1, 3)),
        ((1, 6, 5, 4), (3, 2, 20), (1, 0, 2)),  # megvii's, which splits afterwards
        ((4, 6, 5, 4), (12, 2, 20), (1, 0, 2)),  # the same of a batch
        ((2, 5, 4, 6), (2, 5, 4, 3, 2), (0, 1, 2, 4, 3)),  # channels last
        ((2, 4, 5, 4), (2, 2, 2, 5, 4), (0, 2, 1, 3, 4)),  # as many groups as channels in each
    ],
)
def test_reshape_transpose_reshape_that_reorders_channels_is_a_shuffle(whole: Any, split: Any, perm: Any):
    assert reordered(whole, split, perm) == ["shuffle"] * 3


@pytest.mark.parametrize(
    ("whole", "split", "perm"),
    [
        ((1, 8, 8, 6), (1, 2, 4, 2, 4, 6), (0, 1, 3, 2, 4, 5)),  # windows of an image, as in Swin
        ((1, 12, 5, 4), (1, 3, 2, 2, 5, 4), (0, 1, 4, 2, 5, 3)),  # pixel shuffle
        ((2, 7, 12), (2, 7, 3, 4), (0, 2, 1, 3)),  # heads of an attention
        ((1, 6, 5, 4), (1, 6, 20), (0, 2, 1)),  # to channels last
        ((2, 6, 5, 4), (2, 3, 2, 5, 4), (0, 1, 2, 3, 4)),  # nothing
    ],
)
def test_other_transpositions_between_reshapes_are_data(whole: Any, split: Any, perm: Any):
    assert reordered(whole, split, perm) == ["data"] * 3


@pytest.mark.parametrize(
    ("operator", "inputs", "dims", "group", "expected"),
    [
        ("Conv", ["x", "k"], (6, 1, 3, 3), 6, True),
        ("Conv", ["x", "k"], (6, 1, 3, 3), 1, False),  # of an image with one channel
        ("FusedConv", ["x", "k"], (6, 2, 3, 3), 3, False),
        ("QLinearConv", ["x", "s", "z", "k"], (6, 1, 3, 3), 6, True),
        ("MatMul", ["x", "k"], (6, 1, 3), 6, False),
    ],
)
def test_depthwise_convolutions_are_told_from_others(
    operator: str, inputs: list[str], dims: tuple[int, ...], group: int, expected: bool
):
    kernel = constant("k", np.zeros(dims, np.float32))
    assert depthwise(graph_of(helper.make_node(operator, inputs, ["y"], group=group), constants=[kernel])) == [expected]


# ---- from profile to parts ---------------------------------------------------------------------------------------

CHAIN = graph_of(
    helper.make_node("Conv", ["x", "k"], ["a"], group=4),
    helper.make_node("Relu", ["a"], ["b"]),
    helper.make_node("MaxPool", ["b"], ["y"]),
    constants=[constant("k", np.zeros((4, 1, 1, 1), np.float32))],
)


def profile(conv_ms: float, relu_ms: float, pool_ms: float, samples_ms: Sequence[float]) -> dict[str, Any]:
    times = {"Conv": conv_ms, "Relu": relu_ms, "MaxPool": pool_ms}
    nodes = [[operator, f"{operator}_0", [1, 4, 8, 8], ms] for operator, ms in times.items()]
    return {"samples_ms": list(samples_ms), "nodes_ms": [sum(times.values())] * len(samples_ms), "nodes": nodes}


def test_what_the_nodes_do_not_take_is_other():
    found = from_profile(profile(5, 2, 1, [10, 10, 11]), CHAIN, cost_ms=0)
    assert found.category_ms == pytest.approx(
        {"convolution": 5, "data": 0, "element-wise": 2, "shuffle": 0, "other": 3}
    )
    assert found.depthwise_ms == pytest.approx(5)
    assert found.between_ms == pytest.approx(2)


def test_nodes_that_take_longer_with_the_profile_than_the_whole_without_are_scaled_down():
    found = from_profile(profile(10, 4, 6, [10, 10, 10]), CHAIN, cost_ms=0)
    assert [node.latency_ms for node in found.nodes] == pytest.approx([5, 2, 3])
    assert found.between_ms == pytest.approx(0)


def test_every_node_is_given_back_what_the_profile_costs_and_none_becomes_negative():
    found = from_profile(profile(6, 3, 0.5, [20]), CHAIN, cost_ms=1)
    assert [node.latency_ms for node in found.nodes] == pytest.approx([5, 2, 0])


def test_a_profile_of_another_graph_is_refused():
    answer = profile(1, 1, 1, [4])
    answer["nodes"].pop()
    with pytest.raises(HwnasError, match="of 2 nodes, must name the 3 nodes"):
        from_profile(answer, CHAIN, cost_ms=0)


def test_a_model_without_nodes_is_all_other():
    found = from_profile({"samples_ms": [0.5], "nodes_ms": [0.0], "nodes": []}, graph_of(), cost_ms=0.01)
    assert found.category_ms["other"] == 0.5


amounts = some.lists(some.floats(0, 1e3), min_size=5, max_size=5).filter(lambda parts: sum(parts) > 1e-3)


@given(amounts)
def test_rounded_parts_sum_to_the_whole_and_each_is_off_by_less_than_a_unit(parts: list[float]):
    rounded = apportioned(parts, 100, 1)
    assert sum(round(10 * part) for part in rounded) == 1000
    assert all(abs(r - 100 * p / sum(parts)) < 0.1 + 1e-9 for r, p in zip(rounded, parts, strict=True))


def test_the_largest_remainders_get_what_rounding_down_left():
    assert apportioned((1, 1, 1), 100, 1) == (33.4, 33.3, 33.3)
    assert apportioned((2, 2, 3), 1, 0) == (0, 0, 1)


@given(amounts, some.lists(some.floats(1e-3, 1e3), min_size=1, max_size=5))
def test_what_is_printed_sums_to_100_percent_and_to_the_median(parts: list[float], samples_ms: list[float]):
    found = from_profile(profile(*parts[:3], samples_ms=samples_ms), CHAIN, cost_ms=parts[3] / 1e3)
    facts = breakdown_facts(found)
    _, *rows, bottom = breakdown_rows(facts)
    shown = [row for row in rows if row[0] in CATEGORIES]
    for column, digits in ((1, 4), (2, 1)):
        units = [round(float(row[column]) * 10**digits) for row in shown]
        assert sum(units) == round(float(bottom[column]) * 10**digits)
    assert bottom[1] == f"{Measurement(tuple(samples_ms)).median_ms:.4f}"
    assert bottom[2] == "100.0"


def test_the_papers_shares_sum_to_100_and_stand_beside_ours():
    assert all(sum(shares) == pytest.approx(100) for shares in PAPER_PERCENT.values())
    rows = breakdown_rows(breakdown_facts(from_profile(profile(5, 2, 1, [10]), CHAIN, cost_ms=0)))
    assert rows[1] == ("convolution", "5.0000", "50.0", "50", "54", "87", "89")
    assert rows[2][:3] == ("  of it depthwise", "5.0000", "50.0")
    assert rows[5] == ("shuffle", "0.0000", "0.0", "5", "0", "0", "0")


def test_the_picture_has_a_bar_for_the_model_and_for_each_of_the_papers_as_wide_as_each_other():
    facts = breakdown_facts(from_profile(profile(5, 2, 1, [10]), CHAIN, cost_ms=0))
    root = ElementTree.fromstring(breakdown_picture(facts, "mine & yours"))
    bars: dict[str, float] = {}
    for part in root.iter("{http://www.w3.org/2000/svg}rect"):
        if part.get("height") == "20":
            bars[part.get("y", "")] = bars.get(part.get("y", ""), 0) + float(part.get("width", 0))
    assert len(bars) == 1 + len(PAPER_PERCENT)
    assert all(width == pytest.approx(448, abs=0.1) for width in bars.values())
    assert "mine & yours: 10 ms" in [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]


# ---- what runs on the board --------------------------------------------------------------------------------------


def event(operator: str, ts: int, dur: int, shape: Sequence[int] | None = (1, 2)) -> dict[str, Any]:
    shapes = [] if shape is None else [{"float": list(shape)}]
    args = {"op_name": operator, "input_type_shape": shapes}
    return {"cat": "Node", "name": f"{operator}_0_kernel_time", "ts": ts, "dur": dur, "args": args}


def test_what_control_flow_holds_is_part_of_it():
    end = {"cat": "Session", "name": "model_run", "ts": 0, "dur": 30}
    inside = [event("Relu", 12, 3), event("Neg", 16, 2)]
    (run,) = node_profile.node_runs([event("Conv", 1, 8), *inside, event("If", 10, 20, None), event("Abs", 31, 1), end])
    assert run == [
        ["Conv", "Conv_0", [1, 2], 0.008], ["If", "If_0", [], 0.02], ["Abs", "Abs_0", [1, 2], 0.001]
    ]  # fmt: skip


def test_of_each_round_the_quickest_run_counts_but_never_the_first_and_of_rounds_the_quicker_half():
    def run(ms: float) -> list[list[Any]]:
        return [["Conv", "a", [], ms]]

    rounds = [[run(1), run(5), run(4)], [run(1), run(9), run(8)], [run(1), run(7), run(6)]]
    nodes_ms, nodes = node_profile.kept_runs([one for group in rounds for one in group], 3)
    assert nodes_ms == [4, 8, 6]
    assert nodes == [["Conv", "a", [], 5]]
    with pytest.raises(ValueError, match="holds 8 runs and not 3 equal rounds"):
        node_profile.kept_runs([run(1)] * 8, 3)


# ---- through the real runtime ------------------------------------------------------------------------------------


def small_shufflenet() -> Network:
    b = NetworkBuilder("small", (3, 96, 96))  # so large that its convolutions take longer than any noise
    with b.unit("stem"):
        x = b.conv_bn(b.input, 16, kernel=3, activation="relu")
    for index in range(3):
        with b.unit(f"unit{index}"):
            x = shufflenet_v2_unit(b, x, 16, 1, UnitChoice())
    return b.build(head(b, x, None, 10))


def foreign_shufflenet(batch: str | int = "batch") -> Model:
    """Two units as PyTorch writes them: split, convolution, concat, reshape, transpose, reshape; no node has a name."""
    shapes = {"apart": [0, 2, 8, 16, 16], "whole": [0, 16, 16, 16], "halves": [8, 8]}
    constants = [constant(name, np.array(values, np.int64)) for name, values in shapes.items()]
    nodes, x = [], "x"
    for i in range(2):
        constants.append(constant(f"dw{i}", np.ones((8, 1, 3, 3), np.float32)))
        nodes += [
            helper.make_node("Split", [x, "halves"], [f"l{i}", f"r{i}"], axis=1),
            helper.make_node("Conv", [f"r{i}", f"dw{i}"], [f"c{i}"], group=8, pads=[1] * 4),
            helper.make_node("Concat", [f"l{i}", f"c{i}"], [f"h{i}"], axis=1),
            helper.make_node("Reshape", [f"h{i}", "apart"], [f"s{i}"]),
            helper.make_node("Transpose", [f"s{i}"], [f"t{i}"], perm=[0, 2, 1, 3, 4]),
            helper.make_node("Reshape", [f"t{i}", "whole"], [f"x{i}"]),
        ]
        x = f"x{i}"
    return model_with(nodes, constants, [batch, 16, 16, 16], x)


def model_with(
    nodes: Sequence[onnx.NodeProto], constants: Sequence[TensorProto], shape: Sequence[Any], output: str,
    kind: int = TensorProto.FLOAT,
) -> Model:  # fmt: skip
    ends = [helper.make_tensor_value_info(name, kind, size) for name, size in (("x", shape), (output, None))]
    graph = helper.make_graph(nodes, "foreign", ends[:1], ends[1:], constants)
    return helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 18)])


@pytest.fixture(scope="module")
def cpu():
    with open_device("cpu") as opened:
        yield opened


@pytest.fixture
def few_rounds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hwnas.breakdown.ROUNDS", 3)


def counts(found: Breakdown, category: str) -> Counter[str]:
    return Counter(node.operator for node in found.nodes if node.category == category)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.usefixtures("few_rounds")
def test_our_exports_show_their_shuffles_and_depthwise_convolutions(cpu, precision: str):
    network = small_shufflenet()
    model = to_onnx(network, random_weights(network, 0), precision=precision)
    found = break_down(model.SerializeToString(), cpu)
    gathers = sum(node.op_type == "Gather" for node in model.graph.node)
    assert counts(found, "shuffle") == {"Gather": gathers}
    assert sum(node.depthwise for node in found.nodes) == 3
    assert counts(found, "convolution").total() == 1 + 3 * 3 + 1
    assert sum(found.category_ms.values()) == pytest.approx(found.total.median_ms)
    assert found.category_ms["convolution"] > 0


@pytest.mark.usefixtures("few_rounds")
def test_a_foreign_shuffle_is_recognised_with_open_sizes_and_nodes_without_names(cpu, tmp_path: Path):
    onnx.save_model(foreign_shufflenet(), str(tmp_path / "foreign.onnx"))
    found = break_down(tmp_path / "foreign.onnx", cpu)
    assert counts(found, "shuffle") == {"Reshape": 4, "Transpose": 2}
    assert sum(node.depthwise for node in found.nodes) == 2
    assert counts(found, "data").keys() >= {"Split", "Concat"}


@pytest.mark.usefixtures("few_rounds")
def test_a_model_with_control_flow_is_measured(cpu):
    def branch(operator: str) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(operator, TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(operator, ["x"], [operator])], operator, [], [output])

    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Greater", ["most", "zero"], ["any"]),
        helper.make_node("If", ["any"], ["z"], then_branch=branch("Relu"), else_branch=branch("Neg")),
        helper.make_node("Exp", ["z"], ["y"]),
    ]
    model = model_with(nodes, [constant("zero", np.float32(0))], [1, 8], "y")
    found = break_down(model.SerializeToString(), cpu)
    assert [node.operator for node in found.nodes] == ["ReduceMax", "Greater", "If", "Exp"]


@pytest.mark.usefixtures("few_rounds")
def test_a_model_that_does_not_load_or_run_is_one_error_and_the_device_goes_on(cpu, tmp_path: Path):
    good = foreign_shufflenet(1).SerializeToString()
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(good[:200])
    with pytest.raises(DeviceError, match=r"broken\.onnx does not run on cpu: .*Export it anew"):
        break_down(broken, cpu)
    integers = model_with([helper.make_node("Identity", ["x"], ["y"])], [], [2], "y", TensorProto.INT64)
    with pytest.raises(DeviceError, match=r"input x is a tensor\(int64\); it can be tensor\(float\)"):
        break_down(integers.SerializeToString(), cpu)
    assert break_down(good, cpu).total.median_ms > 0


def test_a_model_that_never_ends_is_stopped(cpu):
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Abs", ["v"], ["w"])],
        "body",
        [helper.make_tensor_value_info(n, k, []) for n, k in (("i", TensorProto.INT64), ("go", TensorProto.BOOL))]
        + [helper.make_tensor_value_info("v", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, []), helper.make_tensor_value_info("w", 1, None)],
    )
    loop = helper.make_node("Loop", ["", "true", "x"], ["y"], body=body)
    model = model_with([loop], [constant("true", np.array(True))], [1, 8], "y").SerializeToString()
    with pytest.raises(DeviceError, match=r"has not answered for 1 s"):
        cpu.profile(model, Timing(timeout_s=1))


# ---- the command -------------------------------------------------------------------------------------------------


def test_a_model_is_a_name_of_the_literature_or_a_file(tmp_path: Path):
    model = onnx.load_model_from_string(model_of("shufflenet-v2-0.5x", 0))  # pyright: ignore[reportArgumentType]
    assert model.graph.name == reference("shufflenet-v2-0.5x").name
    (tmp_path / "model.onnx").write_bytes(b"anything")
    assert model_of(str(tmp_path / "model.onnx"), 0) == tmp_path / "model.onnx"
    with pytest.raises(HwnasError, match=r"no model 'shufflenet-v3'.*ONNX file.*shufflenet-v2-1x"):
        model_of("shufflenet-v3", 0)


@pytest.mark.usefixtures("few_rounds")
def test_breakdown_prints_one_json_object_and_draws(hwnas: Callable[..., Answer], tmp_path: Path):
    plot = tmp_path / "new/plot.svg"
    answer = hwnas("breakdown", "shufflenet-v2-0.5x", "--device", "cpu", "--json", "--plot", plot)
    assert answer.status == 0, answer.err
    facts = json.loads(answer.out)
    assert facts["model"] == "shufflenet-v2-0.5x"
    assert round(sum(facts["percent"].values()), 6) == 100
    assert round(sum(facts["ms"].values()), 6) == facts["total_ms"]
    assert facts["percent"]["convolution"] > facts["depthwise_percent"] > 0
    assert "shuffle" in {node["category"] for node in facts["nodes"]}
    assert sum(operator["count"] for operator in facts["operators"]) == len(facts["nodes"])
    assert "shufflenet-v2-0.5x: " in plot.read_text()


@pytest.mark.usefixtures("few_rounds")
def test_breakdown_shows_a_table_for_a_file(hwnas: Callable[..., Answer], tmp_path: Path):
    onnx.save_model(foreign_shufflenet(), str(tmp_path / "foreign.onnx"))
    answer = hwnas("breakdown", tmp_path / "foreign.onnx")
    assert answer.status == 0, answer.err
    assert all(f"\n{category} " in answer.out for category in CATEGORIES)
    assert re.search(r"G4: .* take \d+(\.\d)? % of the time$", answer.out.strip())


@pytest.mark.usefixtures("few_rounds")
def test_breakdown_of_a_model_that_hwnas_made_tells_g4_in_time_and_in_memory_access(
    hwnas: Callable[..., Answer], tmp_path: Path
):
    space = load_space("shufflenet-tiny")
    architecture = space.smallest
    network = lower(space, architecture)
    facts = {"space": space.name, "architecture": architecture.to_json(), "classes": json.dumps(list("0123456789"))}
    model = to_onnx(network, random_weights(network, 0))
    helper.set_model_props(model, facts)
    onnx.save_model(model, str(tmp_path / "ours.onnx"))
    assert network_of_model(str(tmp_path / "ours.onnx")) == network
    answer = hwnas("breakdown", tmp_path / "ours.onnx")
    share = network_sheet(network).whole.value("G4")
    assert f"% of the time and {share:.0%} of memory access" in answer.out, answer.err


def test_element_wise_time_is_that_of_element_wise_operators_and_depthwise_convolutions():
    nodes = (NodeTime("Conv", "a", "convolution", True, 0.2), NodeTime("Relu", "b", "element-wise", False, 0.3))
    facts = breakdown_facts(Breakdown(Measurement((1.0, 1.0, 1.0)), nodes))
    assert facts["element_wise_percent"] == 50
    network = reference("resnet-50")
    assert element_wise_words(facts, network).endswith(
        f"take 50 % of the time and {network_sheet(network).whole.value('G4'):.0%} of memory access"
    )


def test_mistakes_are_one_line_and_exit_status_2(hwnas: Callable[..., Answer], tmp_path: Path):
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    for arguments, words in (
        ([tmp_path / "broken.onnx"], "broken.onnx does not run on cpu"),
        (["nothing"], "no model 'nothing'"),
        (["resnet-50", "--plot", "plot.png"], "Give --plot plot.svg"),
        (["resnet-50", "--threads", 1000], "1000 threads"),
        (["resnet-50", "--device", "toaster"], "'toaster'"),
    ):
        answer = hwnas("breakdown", *arguments)
        assert answer.status == 2
        last = answer.err.rstrip("\n").splitlines()[-1]
        assert last.startswith("Error: ")
        assert words in last
