"""The ShuffleNet units, V1, V2 and V2*, as pieces of a `Network`.

Sources: ShuffleNet V1 (arXiv 1707.01083, figure 2), ShuffleNet V2 (arXiv 1807.11164, figure 3, appendix figure 2; V2*
is the unit of section 4 with one more depthwise convolution).
"""

from dataclasses import dataclass
from fractions import Fraction

from hwnas.errors import HwnasError
from hwnas.network import NetworkBuilder, Tensor, nearest_multiple


@dataclass(frozen=True, slots=True)
class UnitChoice:
    """What one ShuffleNet V2 unit of a search space decides.

    Attributes:
        split_ratio: c'/c, the share of the unit's channels that the convolutions make; the rest is identity (stride 1)
            or the side branch (stride 2).
        kernel: side of the depthwise convolution.
        squeeze_excite: a squeeze-excite gate on the main branch, hidden width c'/4.
        residual: the main branch adds its own input (stride 1 only).
        groups: groups of the pointwise convolutions; above 1 the first is followed by a channel shuffle, as in V1.
        extra_depthwise: V2*, a 3x3 depthwise convolution before the first pointwise one.
    """

    split_ratio: Fraction = Fraction(1, 2)
    kernel: int = 3
    squeeze_excite: bool = False
    residual: bool = False
    groups: int = 1
    extra_depthwise: bool = False

    @property
    def text(self) -> str:
        """Short enough for a table's column: `1/2 k3 g1 se res dw`."""
        flags = {"se": self.squeeze_excite, "res": self.residual, "dw": self.extra_depthwise}
        words = [str(self.split_ratio), f"k{self.kernel}", f"g{self.groups}", *(w for w, on in flags.items() if on)]
        return " ".join(words)


def shufflenet_v2_unit(
    b: NetworkBuilder,
    x: Tensor,
    channels: int,
    stride: int,
    choice: UnitChoice,
    *,
    main_channels: int | None = None,
    middle_channels: int | None = None,
) -> Tensor:
    """One ShuffleNet V2 unit, from `x` to `channels` channels, ending in concat and a channel shuffle of two groups.

    Stride 1 keeps the first c - c' channels as they are and sends the last c' through the main branch (figure 3c).
    Stride 2 sends all channels through both branches (figure 3d). Squeeze-excite stands after the last batch norm and
    ReLU, or between batch norm and addition where there is a residual (appendix figures 2b and 2c).

    Args:
        b: the builder; its open unit receives the nodes.
        x: the input, `(C, H, W)`; with stride 1, C must equal `channels`.
        channels: c, the unit's output channels.
        stride: 1 or 2.
        choice: the unit's choices; `main_channels` overrules its split ratio.
        main_channels: c', the output channels of the main branch.
        middle_channels: channels between the two pointwise convolutions; c' by default.
    """
    main_channels = main_channels or int(channels * choice.split_ratio)
    middle_channels = middle_channels or main_channels
    groups = choice.groups
    if stride == 1:
        side, main_input = b.split(x, (channels - main_channels, main_channels))
    else:
        side, main_input = x, x
        side = b.conv_bn(side, x.shape[0], name="side_dw", kernel=choice.kernel, stride=2, groups=x.shape[0])
        side = b.conv_bn(side, channels - main_channels, name="side_pw", groups=groups, activation="relu")

    main = main_input
    if choice.extra_depthwise:
        main = b.conv_bn(main, main.shape[0], name="extra_dw", kernel=3, groups=main.shape[0])
    main = b.conv_bn(main, middle_channels, name="pw1", groups=groups, activation="relu")
    if groups > 1:
        main = b.shuffle(main, groups, name="group_shuffle")
    main = b.conv_bn(main, middle_channels, name="dw", kernel=choice.kernel, stride=stride, groups=middle_channels)
    residual = choice.residual and stride == 1
    main = b.conv_bn(main, main_channels, name="pw2", groups=groups, activation=None if residual else "relu")
    if choice.squeeze_excite:
        main = b.squeeze_excite(main, max(1, main_channels // 4))
    if residual:
        main = b.activation(b.add(main, main_input), "relu", name="add_relu")
    return b.shuffle(b.concat(side, main), 2)


def shufflenet_v1_unit(
    b: NetworkBuilder, x: Tensor, channels: int, stride: int, groups: int, *, group_first: bool = True
) -> Tensor:
    """One ShuffleNet V1 unit (figures 2b and 2c): bottleneck of a quarter of the output channels, shuffle after pw1.

    With stride 2 the branch makes `channels - C` channels and a 3x3 average pool of the input gives the other C.
    `group_first=False` leaves the first pointwise convolution dense, as the first unit of stage 2 has it.

    Raises:
        HwnasError: a quarter of `channels` is not whole or does not divide by `groups`.
    """
    if channels % (4 * groups):
        raise HwnasError(
            f"A ShuffleNet V1 unit of {groups} groups has a width that divides by {4 * groups}, and not {channels}. "
            f"The nearest that works is {nearest_multiple(channels, 4 * groups)}."
        )
    middle = channels // 4
    main = b.conv_bn(x, middle, name="pw1", groups=groups if group_first else 1, activation="relu")
    if groups > 1:
        main = b.shuffle(main, groups)
    main = b.conv_bn(main, middle, name="dw", kernel=3, stride=stride, groups=middle)
    main = b.conv_bn(main, channels - (x.shape[0] if stride == 2 else 0), name="pw2", groups=groups)
    if stride == 1:
        return b.activation(b.add(x, main), "relu", name="add_relu")
    return b.activation(b.concat(b.pool(x, "average", name="side_pool"), main), "relu", name="concat_relu")


def stem(b: NetworkBuilder, x: Tensor, channels: int, stride: int, max_pool: bool) -> Tensor:
    """Unit `stem` of the ShuffleNets: a 3x3 convolution, then a 3x3 max pool of stride 2 if `max_pool`."""
    with b.unit("stem"):
        x = b.conv_bn(x, channels, kernel=3, stride=stride, activation="relu")
        return b.pool(x, "max", name="pool") if max_pool else x


def head(b: NetworkBuilder, x: Tensor, channels: int | None, classes: int, *, bias: bool = True) -> Tensor:
    """Unit `head`: the last 1x1 convolution (`None` in V1, which has none), global mean, linear classifier."""
    with b.unit("head"):
        if channels is not None:
            x = b.conv_bn(x, channels, name="conv", activation="relu")
        return b.classifier(x, classes, bias=bias)
