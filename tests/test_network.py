"""Golden and property: shapes, counts and keys of a `Network`."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hwnas.errors import HwnasError
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
    NetworkBuilder,
    Pool,
    Shuffle,
    Split,
    Unit,
    is_depthwise,
    macs,
    memory_access,
    node_macs,
    output_shapes,
    parameters,
    shuffle_order,
    sub_network,
    unit_input,
    unit_key,
    weight_shapes,
)
from hwnas.reference import shufflenet_v2

# ---- channel shuffle ---------------------------------------------------------------------------------------------


def test_channel_shuffle_gives_the_published_orders():
    assert shuffle_order(6, 3) == (0, 2, 4, 1, 3, 5)
    assert shuffle_order(8, 2) == (0, 4, 1, 5, 2, 6, 3, 7)


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12))
def test_shuffling_by_g_and_then_by_c_over_g_changes_nothing(groups: int, per_group: int):
    channels = groups * per_group
    first, second = shuffle_order(channels, groups), shuffle_order(channels, per_group)
    assert [first[source] for source in second] == list(range(channels))


@settings(deadline=None)
@given(st.integers(1, 64))
def test_a_shuffle_of_one_group_or_of_as_many_as_channels_changes_nothing(channels: int):
    assert shuffle_order(channels, 1) == shuffle_order(channels, channels) == tuple(range(channels))


# ---- counts ------------------------------------------------------------------------------------------------------


def one_layer(channels: int, side: int, operator: Conv):
    b = NetworkBuilder("one layer", (channels, side, side))
    with b.unit("layer"):
        (x,) = b.add_node(operator, b.input, name="conv")
    return b.build(x)


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_groups_divide_the_macs_and_the_parameters_of_a_convolution(groups: int):
    dense, grouped = (one_layer(24, 7, Conv(48, 3, 1, 1, g)) for g in (1, groups))
    assert macs(dense) == 7 * 7 * 9 * 24 * 48
    assert macs(grouped) * groups == macs(dense)
    assert parameters(grouped) * groups == parameters(dense)


def test_a_depthwise_convolution_has_one_kernel_a_channel():
    (node,) = one_layer(24, 7, Conv(24, 5, 1, 2, 24)).nodes
    assert is_depthwise(node)
    assert weight_shapes(node) == {"kernel": (5, 5, 1, 24)}
    assert node_macs(node) == 7 * 7 * 25 * 24
    assert not is_depthwise(one_layer(24, 7, Conv(48, 3, 1, 1, 24)).nodes[0])
    assert not is_depthwise(one_layer(1, 7, Conv(1, 3, 1, 1, 1)).nodes[0])


@settings(deadline=None)
@given(c1=st.integers(1, 40), c2=st.integers(1, 40), side=st.integers(1, 60))
def test_memory_access_of_a_pointwise_convolution_is_that_of_guideline_1(c1: int, c2: int, side: int):
    assert memory_access(one_layer(c1, side, Conv(c2))) == side * side * (c1 + c2) + c1 * c2


def test_running_statistics_are_weights_but_not_parameters():
    b = NetworkBuilder("normalised", (3, 8, 8))
    with b.unit("stem"):
        x = b.conv_bn(b.input, 5, kernel=3)
    network = b.build(x)
    assert set(weight_shapes(network.nodes[1])) == {"scale", "offset", "mean", "variance"}
    assert parameters(network) == 3 * 3 * 3 * 5 + 2 * 5


def test_linear_layers_and_biases_are_counted():
    b = NetworkBuilder("head", (6, 4, 4))
    with b.unit("head"):
        x = b.classifier(b.input, 10)
    network = b.build(x)
    assert (macs(network), parameters(network)) == (60, 70)
    assert network.outputs[0].shape == (10,)


# ---- shapes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "inputs", "outputs"),
    [
        (Conv(16, 3, 2, 1), [(3, 224, 224)], [(16, 112, 112)]),
        (Conv(16, 3, 2, 1), [(3, 7, 5)], [(16, 4, 3)]),
        (Conv(8), [(3, 9, 9)], [(8, 9, 9)]),
        (Pool("max", 3, 2, 1), [(8, 112, 112)], [(8, 56, 56)]),
        (Pool("average", 7, 1), [(8, 7, 7)], [(8, 1, 1)]),
        (GlobalAveragePool(), [(8, 7, 7)], [(8, 1, 1)]),
        (Flatten(), [(8, 3, 2)], [(48,)]),
        (Linear(10), [(48,)], [(10,)]),
        (Add(), [(8, 3, 3)] * 3, [(8, 3, 3)]),
        (Multiply(), [(8, 3, 3), (8, 1, 1)], [(8, 3, 3)]),
        (Concat(), [(8, 3, 3), (4, 3, 3), (1, 3, 3)], [(13, 3, 3)]),
        (Split((3, 4, 1)), [(8, 3, 3)], [(3, 3, 3), (4, 3, 3), (1, 3, 3)]),
        (Shuffle(4), [(8, 3, 3)], [(8, 3, 3)]),
        (BatchNorm(), [(8, 3, 3)], [(8, 3, 3)]),
        (Activation("relu"), [(8,)], [(8,)]),
    ],
)
def test_an_operator_gives_these_shapes(operator, inputs, outputs):
    assert output_shapes(operator, tuple(inputs)) == tuple(outputs)


@pytest.mark.parametrize(
    ("operator", "inputs", "message"),
    [
        (Conv(24, groups=4), [(58, 7, 7)], "input channels .* 58 channels, 4 groups. The nearest .* is 56."),
        (Conv(58, groups=8), [(16, 7, 7)], "output channels .* 58 channels, 8 groups. The nearest .* is 56."),
        (Conv(16, groups=16), [(3, 7, 7)], "The nearest width that works is 16."),
        (Shuffle(3), [(232, 7, 7)], "3 groups cannot take 232 channels. The nearest .* is 231."),
        (Conv(8, 7), [(3, 5, 5)], "7x7 window does not fit on .*(3, 5, 5)"),
        (Pool("max", 2, 2), [(12,)], "2x2 window does not fit on .*(12,)"),
        (Linear(10), [(8, 1, 1)], "flat tensor; it got (8, 1, 1). Put a Flatten before it."),
        (Add(), [(8, 7, 7), (4, 7, 7)], "equal shape; it got ((8, 7, 7), (4, 7, 7))"),
        (Multiply(), [(8, 7, 7), (4, 1, 1)], "one value a channel; it got ((8, 7, 7), (4, 1, 1))"),
        (Concat(), [(8, 7, 7), (8, 4, 4)], "equal height and width; it got ((8, 7, 7), (8, 4, 4))"),
        (Split((4, 3)), [(8, 7, 7)], "all 8 channels; its sizes are (4, 3)"),
        (Split((8, 0)), [(8, 7, 7)], "all 8 channels; its sizes are (8, 0)"),
    ],
)
def test_shapes_that_cannot_be_are_refused_with_what_was_seen(operator, inputs, message: str):
    pattern = re.escape(message).replace(r"\.\*", ".*")
    with pytest.raises(HwnasError, match=pattern):
        output_shapes(operator, tuple(inputs))


# ---- keys --------------------------------------------------------------------------------------------------------


CONV = Conv(8, 3, 1, 1, 2)


def small_unit(
    *,
    name: str = "a",
    channels: int = 8,
    side: int = 6,
    conv: Conv = CONV,
    activation: str = "relu",
    swapped: bool = False,
) -> Unit:
    """A convolution added to, and concatenated with, its input; `swapped` changes nothing but the wiring."""
    b = NetworkBuilder("small", (channels, side, side))
    with b.unit(name):
        (x,) = b.add_node(conv, b.input, name=f"{name}_conv")
        (y,) = b.add_node(Activation(activation), x, name=f"{name}_activation")
        b.concat(*((b.input, y) if swapped else (y, b.input)), name=f"{name}_concat")
    return b.build().units[0]


def test_a_unit_s_key_ignores_its_names():
    assert unit_key(small_unit(name="a")) == unit_key(small_unit(name="b"))
    assert len(unit_key(small_unit())) == 12


@pytest.mark.parametrize(
    "changed",
    [
        small_unit(conv=Conv(8, 3, 1, 1, 4)),
        small_unit(conv=Conv(8, 5, 1, 2, 2)),
        small_unit(conv=Conv(8, 1, 1, 0, 2)),
        small_unit(conv=Conv(8, 3, 1, 1, 2, bias=True)),
        small_unit(conv=Conv(6, 3, 1, 1, 2)),
        small_unit(channels=10),
        small_unit(side=7),
        small_unit(activation="relu6"),
        small_unit(swapped=True),
    ],
)
def test_a_unit_s_key_sees_operators_shapes_and_wiring(changed: Unit):
    assert unit_key(changed) != unit_key(small_unit())


@pytest.mark.parametrize(
    ("operator", "other"),
    [
        (Conv(8, 3, 1, 1), Conv(8, 3, 1, 1, groups=2)),
        (Conv(8, 3, 1, 1), Conv(8, 3, 1, 1, bias=True)),
        (BatchNorm(), BatchNorm(1e-3)),
        (Activation("sigmoid"), Activation("hard_sigmoid")),
        (Pool("max", 3, 1, 1), Pool("average", 3, 1, 1)),
        (Shuffle(2), Shuffle(4)),
    ],
)
def test_a_unit_s_key_sees_fields_that_leave_the_shapes_as_they_are(operator, other):
    b = NetworkBuilder("pair", (8, 6, 6))
    for name, used in (("one", operator), ("two", other)):
        with b.unit(name):
            (out,) = b.add_node(used, b.input, name="node")
    one, two = b.build().units
    assert out.shape == (8, 6, 6)
    assert unit_key(one) != unit_key(two)


def test_equal_units_of_a_network_share_a_key_and_different_ones_do_not():
    keys = {unit.name: unit_key(unit) for unit in shufflenet_v2("1x").units}
    assert keys["stage3.2"] == keys["stage3.3"] == keys["stage3.8"]
    assert len(set(keys.values())) == 1 + 3 + 3 + 1


# ---- pieces and builds -------------------------------------------------------------------------------------------


def test_a_sub_network_is_a_run_of_units_with_its_own_input_and_output():
    whole = shufflenet_v2("0.5x")
    piece = sub_network(whole, 5, 13)
    assert [unit.name for unit in piece.units] == [f"stage3.{i}" for i in range(1, 9)] + ["stage4.1"]
    assert piece.input.shape == (48, 28, 28)
    assert [tensor.shape for tensor in piece.outputs] == [(192, 7, 7)]
    assert unit_input(piece.units[0]) == piece.input
    pieces = [sub_network(whole, 0, 4), piece, sub_network(whole, 14, 17)]
    assert sum(map(macs, pieces)) == macs(whole)


def test_a_piece_that_takes_two_tensors_is_no_sub_network():
    b = NetworkBuilder("two ways", (4, 8, 8))
    with b.unit("first"):
        x = b.conv(b.input, 4, name="conv")
    with b.unit("second"):
        y = b.add(x, b.input)
    with pytest.raises(ValueError, match="2 tensors from outside"):
        sub_network(b.build(y), 1, 1)


def test_a_cell_of_several_branches_and_outputs_builds():
    b = NetworkBuilder("cells", (16, 28, 28))
    with b.unit("cell1"):
        branches = [b.conv_bn(b.input, 8, name=f"conv{k}", kernel=k, activation="relu") for k in (1, 3, 5)]
        pooled = b.pool(b.input, "max", name="max", kernel=3, stride=1)
        cell1 = b.concat(b.add(branches[0], branches[1]), branches[2], pooled)
    with b.unit("cell2"):  # takes the last two cells, as NASNet-A does
        reduced = b.pool(cell1, "average", name="average")
        old = b.conv_bn(b.input, 8, stride=2)
        cell2 = b.squeeze_excite(b.concat(reduced, old), 4)
    network = b.build(cell1, cell2)
    assert [tensor.shape for tensor in network.outputs] == [(32, 28, 28), (40, 14, 14)]
    assert [unit.name for unit in network.units] == ["cell1", "cell2"]


def test_every_tensor_is_made_before_it_is_taken_and_once_only():
    network = shufflenet_v2("1x")
    known = {network.input}
    for node in network.nodes:
        assert set(node.inputs) <= known
        assert known.isdisjoint(node.outputs)
        known.update(node.outputs)
    assert set(network.outputs) <= known


def test_names_stand_once_and_nodes_stand_in_units():
    b = NetworkBuilder("names", (4, 8, 8))
    with pytest.raises(ValueError, match=r"inside `with builder\.unit"):
        b.shuffle(b.input, 2)
    with b.unit("unit"):
        b.shuffle(b.input, 2)
        with pytest.raises(ValueError, match=r"unit\.shuffle is there already"):
            b.shuffle(b.input, 2)
    with pytest.raises(ValueError, match="unit unit is there already"), b.unit("unit"):
        pass
