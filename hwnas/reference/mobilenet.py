"""MobileNet V2 (arXiv 1801.04381, table 2)."""

from hwnas.network import Network, NetworkBuilder, Tensor

STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, output channels at width 1, units, and stride of the first unit."""


def mobilenet_v2(width: float = 1.0, *, input_size: int = 224, classes: int = 1000) -> Network:
    """MobileNet V2 with every layer `width` times as wide, rounded to multiples of 8 as torchvision rounds.

    Units are `stem`, `stage1.1` to `stage7.1` (the rows of the paper's table) and `head`, whose 1x1 convolution never
    shrinks below 1280 channels.
    """
    b = NetworkBuilder(f"mobilenet-v2-{width}", (3, input_size, input_size))
    with b.unit("stem"):
        x = b.conv_bn(b.input, round_channels(32 * width), kernel=3, stride=2, activation="relu6")
    for number, (expansion, channels, repeats, first_stride) in enumerate(STAGES, 1):
        for index in range(1, repeats + 1):
            with b.unit(f"stage{number}.{index}"):
                x = inverted_residual(
                    b, x, round_channels(channels * width), first_stride if index == 1 else 1, expansion
                )
    with b.unit("head"):
        x = b.conv_bn(x, round_channels(1280 * max(1.0, width)), activation="relu6")
        x = b.classifier(x, classes)
    return b.build(x)


def inverted_residual(b: NetworkBuilder, x: Tensor, channels: int, stride: int, expansion: int) -> Tensor:
    """Widen, depthwise 3x3, narrow without activation, and add the input where the shape stays (figure 4d)."""
    main, hidden = x, x.shape[0] * expansion
    if expansion > 1:
        main = b.conv_bn(main, hidden, name="pw1", activation="relu6")
    main = b.conv_bn(main, hidden, name="dw", kernel=3, stride=stride, groups=hidden, activation="relu6")
    main = b.conv_bn(main, channels, name="pw2")
    return b.add(x, main) if main.shape == x.shape else main


def round_channels(channels: float) -> int:
    """The nearest multiple of 8, and at least 8; one more if that were to lose over a tenth of the channels."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
