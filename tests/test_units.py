"""Golden and property: the ShuffleNet units, and what an output of them can see of the input."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from hwnas.errors import HwnasError
from hwnas.network import (
    Concat,
    Conv,
    Network,
    NetworkBuilder,
    Pool,
    Shuffle,
    Split,
    is_depthwise,
    macs,
    node_macs,
    shuffle_order,
)
from hwnas.reference import shufflenet_v2
from hwnas.reference.shufflenet import REPEATS, V2_WIDTHS
from hwnas.units import UnitChoice, head, shufflenet_v1_unit, shufflenet_v2_unit, stem


def v1_unit(channels: int, stride: int, groups: int, *, inputs: int | None = None, side: int = 8) -> Network:
    b = NetworkBuilder("V1 unit", (inputs or channels, side, side))
    with b.unit("unit"):
        x = shufflenet_v1_unit(b, b.input, channels, stride, groups)
    return b.build(x)


def v2_unit(channels: int, stride: int, choice: UnitChoice, *, inputs: int | None = None, side: int = 8) -> Network:
    b = NetworkBuilder("V2 unit", (inputs or channels, side, side))
    with b.unit("unit"):
        x = shufflenet_v2_unit(b, b.input, channels, stride, choice)
    return b.build(x)


def reachable(network: Network, *, shuffled: bool = True) -> np.ndarray:
    """Which input channels each output channel depends on, `[output channel, input channel]`.

    `shuffled=False` takes each shuffle for the identity: the same network with its shuffles removed.
    """
    seen = {network.input.name: np.eye(network.input.shape[0], dtype=bool)}
    for node in network.nodes:
        inputs = [seen[tensor.name] for tensor in node.inputs]
        match node.operator:
            case Conv(channels=channels, groups=groups):
                groups_seen = np.stack([part.any(axis=0) for part in np.split(inputs[0], groups)])
                outputs = [np.repeat(groups_seen, channels // groups, axis=0)]
            case Concat():
                outputs = [np.concatenate(inputs)]
            case Split(sizes=sizes):
                outputs = np.split(inputs[0], np.cumsum(sizes)[:-1])
            case Shuffle(groups=groups):
                outputs = [inputs[0][list(shuffle_order(len(inputs[0]), groups))] if shuffled else inputs[0]]
            case _:  # element-wise, or a window over one channel
                outputs = [np.logical_or.reduce(inputs)]
        seen |= {tensor.name: value for tensor, value in zip(node.outputs, outputs, strict=True)}
    return seen[network.outputs[0].name]


def receptive_field(network: Network) -> int:
    """Side of the window of the input that one position of the output depends on."""
    field, step = {network.input.name: 1}, {network.input.name: 1}
    for node in network.nodes:
        widest, stride = max((field[tensor.name], step[tensor.name]) for tensor in node.inputs)
        if isinstance(node.operator, Conv | Pool):
            widest, stride = widest + (node.operator.kernel - 1) * stride, stride * node.operator.stride
        for tensor in node.outputs:
            field[tensor.name], step[tensor.name] = widest, stride
    return field[network.outputs[0].name]


def node_names(network: Network) -> list[str]:
    return [node.name.removeprefix("unit.") for node in network.nodes]


# ---- ShuffleNet V1 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "groups"), [(144, 1), (200, 2), (240, 3), (272, 4), (384, 8)])
def test_a_v1_unit_costs_hw_times_2cm_over_g_plus_9m(channels: int, groups: int):
    middle = channels // 4
    expected = 28 * 28 * (2 * channels * middle // groups + 9 * middle)
    assert macs(v1_unit(channels, 1, groups, side=28)) == expected


@pytest.mark.parametrize(("channels", "groups"), [(200, 2), (240, 3), (272, 4), (384, 8)])
def test_without_shuffle_an_output_of_a_v1_unit_sees_only_its_group_of_the_inputs(channels: int, groups: int):
    unit = v1_unit(channels, 1, groups)
    assert reachable(unit).all()
    alone = reachable(unit, shuffled=False)
    assert (alone.sum(axis=1) == channels // groups).all()
    assert np.array_equal(alone, np.kron(np.eye(groups, dtype=bool), np.ones([channels // groups] * 2, dtype=bool)))


def test_a_v1_unit_of_stride_2_joins_the_pooled_input_to_what_is_missing():
    unit = v1_unit(240, 2, 3, inputs=24, side=56)
    concat = next(node for node in unit.nodes if isinstance(node.operator, Concat))
    assert [tensor.name for tensor in concat.inputs] == ["unit.side_pool", "unit.pw2_bn"]
    assert [tensor.shape for tensor in concat.inputs] == [(24, 28, 28), (216, 28, 28)]
    assert next(node for node in unit.nodes if is_depthwise(node)).inputs[0].shape == (60, 56, 56)
    assert unit.outputs[0].shape == (240, 28, 28)


def test_a_v1_unit_shuffles_between_its_pointwise_convolutions_and_adds_before_the_last_relu():
    expected = ["pw1", "pw1_bn", "pw1_relu", "shuffle", "dw", "dw_bn", "pw2", "pw2_bn", "add", "add_relu"]
    assert node_names(v1_unit(240, 1, 3)) == expected
    assert node_names(v1_unit(144, 1, 1)) == [name for name in expected if name != "shuffle"]


@pytest.mark.parametrize(("channels", "groups", "nearest"), [(100, 2, 96), (244, 3, 240), (50, 1, 48), (10, 8, 32)])
def test_a_v1_unit_whose_bottleneck_does_not_divide_is_refused_with_the_nearest(channels, groups, nearest):
    with pytest.raises(HwnasError, match=rf"{groups} groups .* not {channels}\. The nearest that works is {nearest}\."):
        v1_unit(channels, 1, groups)


# ---- ShuffleNet V2 -----------------------------------------------------------------------------------------------

EVERY_CHOICE = [
    UnitChoice(*values)
    for values in product(
        (Fraction(1, 4), Fraction(1, 2), Fraction(3, 4)),
        (3, 5, 7),
        (False, True),
        (False, True),
        (1, 2, 4),
        (False, True),
    )
]


@pytest.mark.parametrize("stride", [1, 2])
def test_a_v2_unit_has_the_right_shapes_with_every_choice(stride: int):
    for choice in EVERY_CHOICE:
        unit = v2_unit(32, stride, choice, inputs=32 if stride == 1 else 16)
        shapes = {tensor.name: tensor.shape for node in unit.nodes for tensor in node.outputs}
        side = 8 // stride
        assert unit.outputs[0].shape == (32, side, side)
        assert shapes["unit.pw2_bn"] == (32 * choice.split_ratio, side, side)
        main = {node.name: node.operator for node in unit.nodes}
        assert main["unit.dw"] == Conv(
            int(32 * choice.split_ratio), choice.kernel, stride, choice.kernel // 2, int(32 * choice.split_ratio)
        )
        assert main["unit.pw1"].groups == main["unit.pw2"].groups == choice.groups
        assert ("unit.se_scale" in shapes) == choice.squeeze_excite
        assert ("unit.add" in shapes) == (choice.residual and stride == 1)
        assert ("unit.group_shuffle" in shapes) == (choice.groups > 1)
        assert ("unit.extra_dw" in shapes) == choice.extra_depthwise


@pytest.mark.parametrize("ratio", [Fraction(1, 4), Fraction(1, 2), Fraction(3, 4)])
def test_the_identity_part_of_a_v2_unit_of_stride_1_passes_untouched(ratio: Fraction):
    unit = v2_unit(32, 1, UnitChoice(ratio, groups=2, squeeze_excite=True, residual=True, extra_depthwise=True))
    takers = [node for node in unit.nodes if any(tensor.name == "unit.split.0" for tensor in node.inputs)]
    assert [type(node.operator) for node in takers] == [Concat]
    kept = 32 - int(32 * ratio)
    before_shuffle = reachable(unit, shuffled=False)
    assert np.array_equal(before_shuffle[:kept], np.eye(32, dtype=bool)[:kept])
    assert not before_shuffle[kept:, :kept].any()


def test_the_closing_shuffle_of_a_v2_unit_lets_the_next_unit_convolve_half_of_what_this_one_kept():
    b = NetworkBuilder("two units", (8, 8, 8))
    x = b.input
    for name in ("first", "second"):
        with b.unit(name):
            x = shufflenet_v2_unit(b, x, 8, 1, UnitChoice())
    network = b.build(x)
    taken = {node.name: node for node in network.nodes}["second.pw1"].inputs[0]
    second_input = reachable(Network("first", network.input, network.units[:1], network.units[0].nodes[-1].outputs))
    assert taken.shape == (4, 8, 8)
    # of the four channels that enter the main branch, two were kept by the first unit and two convolved by it
    assert sorted(second_input[4:].sum(axis=1)) == [1, 1, 4, 4]


def test_squeeze_excite_stands_before_the_addition_of_a_residual_and_after_relu_without_one():
    both = node_names(v2_unit(32, 1, UnitChoice(squeeze_excite=True, residual=True)))
    gate = ["se_mean", "se_reduce", "se_relu", "se_expand", "se_sigmoid", "se_scale"]
    assert both[-12:] == ["pw2", "pw2_bn", *gate, "add", "add_relu", "concat", "shuffle"]
    gated = node_names(v2_unit(32, 1, UnitChoice(squeeze_excite=True)))
    assert gated[-11:] == ["pw2", "pw2_bn", "pw2_relu", *gate, "concat", "shuffle"]


def test_a_residual_adds_the_input_of_the_main_branch():
    unit = v2_unit(32, 1, UnitChoice(Fraction(1, 4), residual=True))
    add = next(node for node in unit.nodes if node.name == "unit.add")
    assert [tensor.name for tensor in add.inputs] == ["unit.pw2_bn", "unit.split.1"]


def test_the_hidden_layer_of_squeeze_excite_has_a_quarter_of_the_main_branch():
    unit = v2_unit(32, 1, UnitChoice(Fraction(3, 4), squeeze_excite=True))
    gate = {node.name: node.operator for node in unit.nodes}
    assert gate["unit.se_reduce"] == Conv(6, bias=True)
    assert gate["unit.se_expand"] == Conv(24, bias=True)


# ---- V2* ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stride", "channels_in", "convolved"), [(1, 32, 16), (2, 16, 16)])
def test_v2_star_adds_exactly_one_depthwise_convolution_before_the_first_pointwise(stride, channels_in, convolved):
    plain = v2_unit(32, stride, UnitChoice(), inputs=channels_in)
    star = v2_unit(32, stride, UnitChoice(extra_depthwise=True), inputs=channels_in)
    more = [node for node in star.nodes if node.name not in {other.name for other in plain.nodes}]
    assert [node.name for node in more] == ["unit.extra_dw", "unit.extra_dw_bn"]
    assert is_depthwise(more[0])
    assert macs(star) - macs(plain) == node_macs(more[0]) == 9 * convolved * 8 * 8
    pw1 = next(node for node in star.nodes if node.name == "unit.pw1")
    assert pw1.inputs == more[1].outputs


def test_v2_star_widens_the_receptive_field_of_a_unit_from_3_to_5():
    assert receptive_field(v2_unit(32, 1, UnitChoice())) == 3
    assert receptive_field(v2_unit(32, 1, UnitChoice(extra_depthwise=True))) == 5
    assert receptive_field(v2_unit(32, 1, UnitChoice(kernel=7, extra_depthwise=True))) == 9


@pytest.mark.parametrize(("width", "extra"), [("0.5x", 2.41), ("1x", 4.87), ("1.5x", 7.04), ("2x", 9.50)])
def test_v2_star_networks_cost_what_their_extra_convolutions_do(width: str, extra: float):
    *stages, last = V2_WIDTHS[width]
    b = NetworkBuilder("V2*", (3, 224, 224))
    x = stem(b, b.input, 24, 2, max_pool=True)
    for number, (channels, repeats) in enumerate(zip(stages, REPEATS, strict=True), 2):
        for index in range(repeats):
            with b.unit(f"stage{number}.{index + 1}"):
                x = shufflenet_v2_unit(b, x, channels, 1 if index else 2, UnitChoice(extra_depthwise=True))
    star = b.build(head(b, x, last, 1000))
    assert macs(star) - macs(shufflenet_v2(width, dialect="torchvision")) == pytest.approx(extra * 1e6, abs=5e3)


def test_a_choice_is_written_short_enough_for_a_column():
    assert UnitChoice().text == "1/2 k3 g1"
    assert UnitChoice(Fraction(3, 4), 7, True, True, 4, True).text == "3/4 k7 g4 se res dw"
