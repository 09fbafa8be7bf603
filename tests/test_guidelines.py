"""The guideline sheet: memory access and its bound, fragments, and what it finds in networks of the literature."""

import itertools
import math

import pytest

from hwnas.guidelines import GUIDELINES, LIMITS, fragments, memory_access_bound, network_sheet, unit_sheet
from hwnas.network import Network, NetworkBuilder, Node, Tensor, node_macs, node_memory_access
from hwnas.reference import REFERENCE, reference
from hwnas.space import lower
from hwnas.space_toml import load_space


def pointwise(channels_in: int, channels: int, groups: int = 1, side: int = 14) -> Node:
    b = NetworkBuilder("pointwise", (channels_in, side, side))
    with b.unit("one"):
        b.conv(b.input, channels, name="pw", groups=groups)
    return b.build().units[0].nodes[0]


# ---- G1 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("c1", "c2"), [(8, 512), (16, 256), (32, 128), (64, 64), (256, 16)])
def test_the_bound_is_the_papers_and_is_reached_only_where_the_channels_are_equal(c1: int, c2: int):
    node, hw = pointwise(c1, c2), 14 * 14
    b = hw * c1 * c2  # the paper's B
    assert node_macs(node) == b
    assert memory_access_bound(node) == pytest.approx(2 * math.sqrt(hw * b) + b / hw)
    assert node_memory_access(node) == hw * (c1 + c2) + c1 * c2
    if c1 == c2:
        assert node_memory_access(node) == pytest.approx(memory_access_bound(node))
    else:
        assert node_memory_access(node) > 1.01 * memory_access_bound(node)


def test_at_fixed_macs_memory_access_and_its_bound_grow_with_the_groups():
    nodes = [pointwise(c, c, groups) for c, groups in ((64, 1), (128, 4), (256, 16))]
    assert len({node_macs(node) for node in nodes}) == 1
    for fewer, more in itertools.pairwise(nodes):
        assert node_memory_access(more) > 1.5 * node_memory_access(fewer)
        assert memory_access_bound(more) == pytest.approx(node_memory_access(more))


def test_one_to_twelve_costs_the_memory_access_that_the_paper_counts():
    # table 1, GPU: 1 / 1.053 / 1.413 / 1.811 of the balanced pair
    pairs = [(128, 128), (90, 180), (52, 312), (36, 432)]
    found = [node_memory_access(pointwise(c1, c2, side=56)) for c1, c2 in pairs]
    assert [access / found[0] for access in found] == pytest.approx([1, 1.053, 1.413, 1.811], abs=0.001)


def test_biases_count_on_both_sides():
    b = NetworkBuilder("biased", (8, 4, 4))
    with b.unit("one"):
        b.conv(b.input, 8, name="pw", bias=True)
    assert unit_sheet(b.build().units[0]).value("G1") == pytest.approx(1)


# ---- G3 ------------------------------------------------------------------------------------------------------------


def separable_twice(b: NetworkBuilder, x: Tensor, kernel: int, name: str) -> Tensor:
    """As NASNet applies it: ReLU, depthwise, pointwise, batch norm, two times over."""
    for time in "12":
        x = b.activation(x, "relu", name=f"{name}_relu{time}")
        x = b.conv(x, x.shape[0], name=f"{name}_dw{time}", kernel=kernel, groups=x.shape[0])
        x = b.conv_bn(x, x.shape[0], name=f"{name}_pw{time}")
    return x


def nasnet_normal_cell() -> Network:
    """The normal cell of NASNet-A (arXiv 1707.07012, figure 4), its inputs already of equal width."""
    b = NetworkBuilder("cell", (44, 14, 14))
    with b.unit("cell"):
        now, before = b.activation(b.input, "relu", name="now"), b.input

        def average(x: Tensor, name: str) -> Tensor:
            return b.pool(x, "average", name=name, stride=1)

        blocks = [
            b.add(separable_twice(b, now, 3, "sep1"), now, name="add1"),
            b.add(separable_twice(b, before, 3, "sep2"), separable_twice(b, now, 5, "sep3"), name="add2"),
            b.add(average(now, "average1"), before, name="add3"),
            b.add(average(before, "average2"), average(before, "average3"), name="add4"),
            b.add(separable_twice(b, before, 5, "sep4"), separable_twice(b, before, 3, "sep5"), name="add5"),
        ]
        x = b.concat(before, *blocks)
    return b.build(x)


def test_a_cell_of_nasnet_has_13_fragments_and_breaks_g3():
    sheet = network_sheet(nasnet_normal_cell())
    assert sheet.whole.fragments == 13
    assert "G3" in sheet.broken


def test_units_of_resnet_have_three_fragments_and_those_with_a_projection_four():
    units = reference("resnet-50").units
    assert [fragments(unit) for unit in units[1:5]] == [4, 3, 3, 4]


def test_an_activation_between_depthwise_and_pointwise_makes_two_fragments_of_them():
    (with_relu,) = {fragments(unit) for unit in reference("mobilenet-v2-1.0").units if unit.name == "stage2.2"}
    assert with_relu == 3
    (without,) = {fragments(unit) for unit in reference("shufflenet-v2-1x").units if unit.name == "stage2.2"}
    assert without == 2


# ---- G2, G4 and the whole ------------------------------------------------------------------------------------------


def test_groups_are_weighted_by_macs_and_depthwise_convolutions_are_no_groups():
    b = NetworkBuilder("groups", (8, 4, 4))
    with b.unit("one"):
        x = b.conv(b.input, 8, name="dense")
        x = b.conv(x, 8, name="dw", kernel=3, groups=8)
        x = b.conv(x, 8, name="grouped", groups=2)
    assert unit_sheet(b.build(x).units[0]).value("G2") == pytest.approx((1 * 64 + 2 * 32) / (64 + 32))


def test_relu_addition_and_depthwise_are_element_wise_and_batch_norm_is_nothing():
    b = NetworkBuilder("element-wise", (8, 4, 4))
    with b.unit("one"):
        x = b.conv_bn(b.input, 8, name="pw", activation="relu")
        x = b.conv_bn(x, 8, name="dw", kernel=3, groups=8)
        x = b.add(x, b.input)
    sheet = unit_sheet(b.build(x).units[0])
    tensor = 8 * 4 * 4
    assert sheet.element_wise_access == 2 * tensor + (2 * tensor + 9 * 8) + 3 * tensor
    assert sheet.convolution_access == 2 * tensor + 64
    assert sheet.memory_access == sheet.element_wise_access + sheet.convolution_access
    assert sheet.value("G4") == pytest.approx(sheet.element_wise_access / sheet.memory_access)


@pytest.mark.parametrize("name", REFERENCE)
def test_the_checker_finds_in_each_network_what_the_paper_says_of_it(name: str):
    # section 2, discussion: V1 breaks G1 by its bottlenecks and G2 by its groups, MobileNet V2 G1 and G4
    broken = network_sheet(reference(name)).broken
    if name.startswith("shufflenet-v2"):
        assert broken == ()
    elif name.startswith("shufflenet-v1"):
        assert broken == (("G1",) if "g1" in name else ("G1", "G2"))
    elif name.startswith("mobilenet-v2"):
        assert broken == ("G1", "G4")
    else:
        assert broken == ("G1",)  # ResNet's bottlenecks


def test_the_sums_of_the_units_are_those_of_the_network_and_the_worst_come_first():
    space = load_space("shufflenet-tiny")
    sheet = network_sheet(lower(space, space.largest))
    assert sheet.whole.memory_access == sum(unit.memory_access for unit in sheet.units)
    assert sorted(unit.name for unit in sheet.worst_first) == sorted(unit.name for unit in sheet.units)
    excess = [max(unit.value(g) / LIMITS[g] for g in GUIDELINES) for unit in sheet.worst_first]
    assert excess == sorted(excess, reverse=True)
    for finding in sheet.findings:
        values = sorted((unit.value(finding.guideline) for unit in sheet.units), reverse=True)
        worst = [unit.value(finding.guideline) for unit in finding.worst]
        assert worst == values[: len(worst)]
        assert len(worst) == {"G1": 1, "G2": 0, "G3": 3, "G4": 3}[finding.guideline]  # all others are no worse


def test_a_finding_is_a_sentence_with_the_number_the_limit_and_the_worst_units():
    first = network_sheet(reference("mobilenet-v2-1.0")).findings[0]
    assert first.text.startswith("G1 broken: memory access of 1x1 convolutions over its bound 1.25, limit 1.1; worst: ")
    worst = first.worst[0]
    assert f"worst: {worst.name} {worst.value('G1'):.2f}, " in first.text
