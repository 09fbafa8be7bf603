"""Golden: multiply-adds and parameters of the reference networks, as published or counted from the definitions."""

import pytest

from hwnas.errors import HwnasError
from hwnas.network import macs, parameters
from hwnas.reference import REFERENCE, mobilenet_v2, reference, shufflenet_v1, shufflenet_v2

COUNTS = {
    "shufflenet-v2-0.5x": (40_476_448, 1_365_792),
    "shufflenet-v2-1x": (145_814_296, 2_278_760),
    "shufflenet-v2-1.5x": (298_970_656, 3_506_720),
    "shufflenet-v2-2x": (590_783_000, 7_402_600),
    "shufflenet-v2-0.5x-torchvision": (40_476_448, 1_366_792),
    "shufflenet-v2-1x-torchvision": (144_907_992, 2_278_604),
    "shufflenet-v2-1.5x-torchvision": (295_759_392, 3_503_624),
    "shufflenet-v2-2x-torchvision": (583_253_464, 7_393_996),
    # V1, table 1: 143, 140, 137, 133, 137 M in print; what the definition gives is 143.08, 140.84, 137.46, ... M
    "shufflenet-v1-1x-g1": (143_078_976, 1_531_936),
    "shufflenet-v1-1x-g2": (140_836_512, 1_733_848),
    "shufflenet-v1-1x-g3": (137_460_672, 1_865_728),
    "shufflenet-v1-1x-g4": (134_339_776, 1_968_344),
    "shufflenet-v1-1x-g8": (138_365_952, 2_434_768),
    "shufflenet-v1-0.5x-g3-megvii": (37_589_856, 717_324),
    "shufflenet-v1-1x-g3-megvii": (137_460_672, 1_864_728),
    "shufflenet-v1-1.5x-g3-megvii": (292_443_552, 3_441_168),
    "shufflenet-v1-2x-g3-megvii": (524_045_184, 5_449_776),
    "shufflenet-v1-0.5x-g8-megvii": (40_469_760, 1_010_448),
    "shufflenet-v1-1x-g8-megvii": (138_365_952, 2_433_768),
    "shufflenet-v1-1.5x-g8-megvii": (290_188_800, 4_268_952),
    "shufflenet-v1-2x-g8-megvii": (521_942_016, 6_521_232),
    "mobilenet-v2-1.0": (300_774_272, 3_504_872),
    "mobilenet-v2-1.4": (582_195_824, 6_108_776),
    "resnet-50": (4_089_184_256, 25_557_032),
    "resnet-50-stride-1x1": (3_857_973_248, 25_557_032),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_a_reference_network_has_exactly_the_published_counts(name: str):
    network = reference(name)
    assert network.name == name
    assert (macs(network), parameters(network)) == COUNTS[name]
    assert network.outputs[0].shape == (1000,)


@pytest.mark.parametrize(
    ("width", "input_size", "counts"),
    [
        (0.75, 224, (209_069_792, 2_636_424)),
        (0.6, 224, (150_958_928, 2_217_000)),
        (0.15, 224, (30_567_888, 1_415_496)),
        (0.75, 192, (153_941_888, 2_636_424)),
        (0.4, 160, (41_798_000, 1_770_728)),
    ],
)
def test_mobilenet_v2_rounds_its_widths_as_torchvision(width: float, input_size: int, counts: tuple[int, int]):
    network = mobilenet_v2(width, input_size=input_size)
    assert (macs(network), parameters(network)) == counts


def test_shufflenet_v2_takes_small_images_without_shrinking_them_in_the_stem():
    network = shufflenet_v2("0.5x", input_size=32, classes=10, stem_stride=1, max_pool=False)
    ends = {unit.name: unit.nodes[-1].outputs[0].shape for unit in network.units}
    assert ends["stem"] == (24, 32, 32)
    assert ends["stage2.1"] == (48, 16, 16)
    assert ends["stage4.4"] == (192, 4, 4)
    assert ends["head"] == (10,)


def test_the_two_dialects_of_shufflenet_v2_differ_only_in_the_first_unit_of_stage_2_and_in_the_classifier():
    paper, torchvision = shufflenet_v2("1x"), shufflenet_v2("1x", dialect="torchvision")
    pairs = zip(paper.units, torchvision.units, strict=True)
    assert [one.name for one, other in pairs if one != other] == ["stage2.1", "head"]
    assert shape_of(paper, "stage2.1.side_pw_relu") == (24, 28, 28)
    assert shape_of(paper, "stage2.1.dw_bn") == shape_of(torchvision, "stage2.1.dw_bn") == (58, 28, 28)
    assert shape_of(paper, "stage2.1.pw2_relu") == (92, 28, 28)
    assert shape_of(torchvision, "stage2.1.side_pw_relu") == shape_of(torchvision, "stage2.1.pw2_relu") == (58, 28, 28)


def test_the_first_pointwise_convolution_of_shufflenet_v1_is_dense_and_the_others_grouped():
    network = shufflenet_v1(3)
    groups = {node.name: node.operator.groups for node in network.nodes if node.name.endswith(("pw1", "pw2"))}
    assert groups.pop("stage2.1.pw1") == 1
    assert set(groups.values()) == {3}


@pytest.mark.parametrize(
    ("groups", "width", "seen", "nearest"), [(2, "0.5x", 100, 96), (4, "0.5x", 136, 128), (4, "1.5x", 408, 416)]
)
def test_a_width_that_the_groups_do_not_divide_is_refused_with_the_nearest(groups, width, seen, nearest):
    with pytest.raises(HwnasError, match=rf"{groups} groups .* not {seen}\. The nearest that works is {nearest}\."):
        shufflenet_v1(groups, width)


def test_an_unknown_name_is_refused_with_the_names_that_there_are():
    with pytest.raises(HwnasError, match=r"'shufflenet-v3'.*shufflenet-v2-1x, .*resnet-50"):
        reference("shufflenet-v3")
    with pytest.raises(HwnasError, match=r"0\.75x .*0\.5x, 1x, 1\.5x, 2x"):
        shufflenet_v2("0.75x")


def shape_of(network, name: str):
    return next(tensor.shape for node in network.nodes for tensor in node.outputs if tensor.name == name)
