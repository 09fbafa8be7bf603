"""ShuffleNet V1 (arXiv 1707.01083, table 1) and V2 (arXiv 1807.11164, table 5)."""

import math
from typing import Literal, TypeVar

from hwnas.errors import HwnasError
from hwnas.network import Network, NetworkBuilder
from hwnas.units import UnitChoice, head, shufflenet_v1_unit, shufflenet_v2_unit, stem

K = TypeVar("K")
V = TypeVar("V")

REPEATS = (4, 8, 4)
"""Units of stages 2 to 4, the first of each with stride 2."""

V2_WIDTHS = {
    "0.5x": (48, 96, 192, 1024),
    "1x": (116, 232, 464, 1024),
    "1.5x": (176, 352, 704, 1024),
    "2x": (244, 488, 976, 2048),
}
"""Output channels of stages 2 to 4 and of the last 1x1 convolution."""

V1_WIDTHS = {1: (144, 288, 576), 2: (200, 400, 800), 3: (240, 480, 960), 4: (272, 544, 1088), 8: (384, 768, 1536)}
"""Output channels of stages 2 to 4 at 1x, by groups."""

V1_SCALES = {"0.5x": (0.5, 12), "1x": (1, 24), "1.5x": (1.5, 24), "2x": (2, 48)}
"""What multiplies `V1_WIDTHS`, and the channels of the stem as the authors' code has them (it is not simply scaled)."""


def shufflenet_v2(
    width: str = "1x",
    *,
    dialect: Literal["paper", "torchvision"] = "paper",
    input_size: int = 224,
    classes: int = 1000,
    stem_stride: int = 2,
    max_pool: bool = True,
) -> Network:
    """ShuffleNet V2.

    The dialects differ in the first unit of stage 2 and in the classifier. The paper's numbers, and its authors' code,
    keep the 24 channels of the stem in the side branch and have no bias in the classifier; torchvision gives half of
    the output channels to each branch, and the classifier has a bias.

    Args:
        width: one of `V2_WIDTHS`.
        dialect: of the stride-2 units and the classifier.
        input_size: side of the square RGB input, in pixels.
        classes: outputs of the classifier.
        stem_stride: stride of the first convolution; 1 suits 32x32 images.
        max_pool: whether the stem ends in a 3x3 max pool of stride 2; not for 32x32 images.
    """
    *stages, head_channels = _look_up(V2_WIDTHS, width, "a width of ShuffleNet V2")
    name = f"shufflenet-v2-{width}" + ("-torchvision" if dialect == "torchvision" else "")
    b = NetworkBuilder(name, (3, input_size, input_size))
    x = stem(b, b.input, 24, stem_stride, max_pool)
    for number, (channels, repeats) in enumerate(zip(stages, REPEATS, strict=True), 2):
        for index in range(1, repeats + 1):
            # in stages 3 and 4 the input is half of the output, and the dialects agree
            main_channels = channels - x.shape[0] if index == 1 and dialect == "paper" else channels // 2
            with b.unit(f"stage{number}.{index}"):
                x = shufflenet_v2_unit(
                    b,
                    x,
                    channels,
                    2 if index == 1 else 1,
                    UnitChoice(),
                    main_channels=main_channels,
                    middle_channels=channels // 2,
                )
    return b.build(head(b, x, head_channels, classes, bias=dialect == "torchvision"))


def shufflenet_v1(
    groups: int = 3,
    width: str = "1x",
    *,
    dialect: Literal["paper", "megvii"] = "paper",
    input_size: int = 224,
    classes: int = 1000,
) -> Network:
    """ShuffleNet V1; the first pointwise convolution of stage 2 is dense (section 3.2).

    Args:
        groups: of the pointwise convolutions, one of `V1_WIDTHS`.
        width: one of `V1_SCALES`.
        dialect: the authors' published code (`megvii`) has no bias in the classifier.
        input_size: side of the square RGB input, in pixels.
        classes: outputs of the classifier.

    Raises:
        HwnasError: a width that the groups do not divide, such as 0.5x with 2 or 4 groups; it names the nearest.
    """
    stages = _look_up(V1_WIDTHS, groups, "a number of groups of ShuffleNet V1")
    scale, stem_channels = _look_up(V1_SCALES, width, "a width of ShuffleNet V1")
    stem_channels = math.ceil(stem_channels / groups) * groups  # 16 at 0.5x with 8 groups, as in the authors' code
    name = f"shufflenet-v1-{width}-g{groups}" + ("-megvii" if dialect == "megvii" else "")
    b = NetworkBuilder(name, (3, input_size, input_size))
    x = stem(b, b.input, stem_channels, 2, max_pool=True)
    for number, (channels, repeats) in enumerate(zip(stages, REPEATS, strict=True), 2):
        for index in range(1, repeats + 1):
            with b.unit(f"stage{number}.{index}"):
                x = shufflenet_v1_unit(
                    b,
                    x,
                    int(channels * scale),
                    2 if index == 1 else 1,
                    groups,
                    group_first=(number, index) != (2, 1),
                )
    return b.build(head(b, x, None, classes, bias=dialect == "paper"))


def _look_up(table: dict[K, V], key: K, what: str) -> V:
    if key not in table:
        raise HwnasError(f"{key} is not {what}; there are {', '.join(map(str, table))}.")
    return table[key]
