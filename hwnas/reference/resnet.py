"""ResNet-50 (arXiv 1512.03385, table 1)."""

from typing import Literal

from hwnas.network import Network, NetworkBuilder, Tensor

STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
"""Bottleneck channels and units of conv2_x to conv5_x; a unit puts out four times its bottleneck."""


def resnet50(*, stride_on: Literal["3x3", "1x1"] = "3x3", input_size: int = 224, classes: int = 1000) -> Network:
    """ResNet-50. Stages 3 to 5 halve the feature map in the 3x3 convolution, as torchvision, or in the first 1x1.

    The paper's 3.8 G MACs are those of `stride_on="1x1"`; `"3x3"` costs 4.09 G. Parameters are the same.
    """
    name = "resnet-50" + ("-stride-1x1" if stride_on == "1x1" else "")
    b = NetworkBuilder(name, (3, input_size, input_size))
    with b.unit("stem"):
        x = b.conv_bn(b.input, 64, kernel=7, stride=2, activation="relu")
        x = b.pool(x, "max", name="pool")
    for number, (middle, repeats) in enumerate(STAGES, 2):
        for index in range(1, repeats + 1):
            stride = 2 if index == 1 and number > 2 else 1
            strides = (stride, 1) if stride_on == "1x1" else (1, stride)
            with b.unit(f"stage{number}.{index}"):
                x = bottleneck(b, x, middle, strides)
    with b.unit("head"):
        x = b.classifier(x, classes)
    return b.build(x)


def bottleneck(b: NetworkBuilder, x: Tensor, middle: int, strides: tuple[int, int]) -> Tensor:
    """1x1, 3x3, 1x1 and the shortcut, projected where the shape changes; `strides` are those of the first two."""
    main = b.conv_bn(x, middle, name="pw1", stride=strides[0], activation="relu")
    main = b.conv_bn(main, middle, name="conv", kernel=3, stride=strides[1], activation="relu")
    main = b.conv_bn(main, 4 * middle, name="pw2")
    if x.shape != main.shape:
        x = b.conv_bn(x, 4 * middle, name="shortcut", stride=max(strides))
    return b.activation(b.add(x, main), "relu", name="add_relu")
