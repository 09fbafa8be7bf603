"""ShuffleNet V2 in PyTorch, for comparison only: the torchvision dialect, which splits every unit in equal halves."""

# pyright: reportMissingImports=false
import torch
from torch import nn

STAGES = {"0.5x": (48, 96, 192, 1024), "1x": (116, 232, 464, 1024)}


def conv_bn(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, relu: bool = True):
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)]
    return nn.Sequential(*layers, nn.BatchNorm2d(outputs), *([nn.ReLU(inplace=True)] if relu else []))


class Unit(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        half = outputs // 2
        entry = inputs if stride == 2 else half
        self.side = None
        if stride == 2:
            self.side = nn.Sequential(conv_bn(inputs, inputs, 3, 2, inputs, relu=False), conv_bn(inputs, half))
        depthwise = conv_bn(half, half, 3, stride, half, relu=False)
        self.main = nn.Sequential(conv_bn(entry, half), depthwise, conv_bn(half, half))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side, main = (x, x) if self.side is not None else x.chunk(2, dim=1)
        side = self.side(x) if self.side is not None else side
        y = torch.cat((side, self.main(main)), dim=1)
        count, channels, height, width = y.shape
        return y.view(count, 2, channels // 2, height, width).transpose(1, 2).reshape(count, channels, height, width)


class ShuffleNetV2(nn.Module):
    """`small_images` has a stem of stride 1 without a pool, as is usual at 32x32."""

    def __init__(self, width: str = "1x", classes: int = 1000, *, small_images: bool = False) -> None:
        super().__init__()
        *stages, head = STAGES[width]
        pool = [] if small_images else [nn.MaxPool2d(3, 2, 1)]
        layers: list[nn.Module] = [conv_bn(3, 24, 3, 1 if small_images else 2), *pool]
        channels = 24
        for outputs, repeats in zip(stages, (4, 8, 4), strict=True):
            layers += [Unit(channels if i == 0 else outputs, outputs, 2 if i == 0 else 1) for i in range(repeats)]
            channels = outputs
        self.features = nn.Sequential(*layers, conv_bn(channels, head))
        self.classifier = nn.Linear(head, classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(image).mean((2, 3)))
