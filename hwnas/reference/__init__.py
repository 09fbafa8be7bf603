"""Networks of the literature by name, as published: a short builder a family."""

from collections.abc import Callable
from functools import partial

from hwnas.errors import HwnasError
from hwnas.network import Network
from hwnas.reference.mobilenet import mobilenet_v2
from hwnas.reference.resnet import resnet50
from hwnas.reference.shufflenet import V1_SCALES, V1_WIDTHS, V2_WIDTHS, shufflenet_v1, shufflenet_v2

REFERENCE: dict[str, Callable[[], Network]] = {
    **{f"shufflenet-v2-{width}": partial(shufflenet_v2, width) for width in V2_WIDTHS},
    **{
        f"shufflenet-v2-{width}-torchvision": partial(shufflenet_v2, width, dialect="torchvision")
        for width in V2_WIDTHS
    },
    **{f"shufflenet-v1-1x-g{groups}": partial(shufflenet_v1, groups) for groups in V1_WIDTHS},
    **{
        f"shufflenet-v1-{width}-g{groups}-megvii": partial(shufflenet_v1, groups, width, dialect="megvii")
        for groups in (3, 8)
        for width in V1_SCALES
    },
    **{f"mobilenet-v2-{width}": partial(mobilenet_v2, width) for width in (1.0, 1.4)},
    "resnet-50": resnet50,
    "resnet-50-stride-1x1": partial(resnet50, stride_on="1x1"),
}
"""Builders at ImageNet size (224x224, 1000 classes). A suffix names the dialect where it is not the paper's."""


def reference(name: str) -> Network:
    """The network of that name in `REFERENCE`; `HwnasError` listing the names if there is none."""
    if name not in REFERENCE:
        raise HwnasError(f"There is no reference network '{name}'. There are {', '.join(REFERENCE)}.")
    return REFERENCE[name]()
