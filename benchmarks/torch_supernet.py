"""The supernet of a search space in PyTorch, for comparison only: single paths that slice the weights they use.

What it computes is what `hwnas.supernet` computes; which slice of a shared kernel a narrower choice takes is the usual
one, the first channels. Feature maps are exactly as wide as the architecture, so that nothing is computed in vain.
"""

# pyright: reportMissingImports=false
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hwnas.space import Architecture, SearchSpace
from hwnas.units import UnitChoice


class SharedNorm(nn.Module):
    """Batch norm of the first channels, by each batch's own statistics or by those estimated for one architecture."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale, self.offset = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.statistics: tuple[Tensor, Tensor] | None = None
        self.batches = 0

    def forward(self, x: Tensor, mode: str) -> Tensor:
        count = x.shape[1]
        scale, offset = self.scale[:count], self.offset[:count]
        if mode == "train":
            return functional.batch_norm(x, None, None, scale, offset, training=True)
        if mode == "first estimate":
            self.statistics, self.batches = (x.new_zeros(count), x.new_zeros(count)), 0
        assert self.statistics is not None
        if mode == "score":
            return functional.batch_norm(x, *self.statistics, scale, offset, training=False)
        self.batches += 1
        return functional.batch_norm(x, *self.statistics, scale, offset, training=True, momentum=1 / self.batches)


class SharedConv(nn.Module):
    """A convolution by the first filters of a shared kernel, each by its first inputs and its centre, then its norm."""

    def __init__(self, inputs: int, outputs: int, side: int = 1) -> None:
        super().__init__()
        self.kernel = nn.Parameter(nn.init.kaiming_normal_(torch.empty(outputs, inputs, side, side)))
        self.norm = SharedNorm(outputs)

    def forward(self, x: Tensor, outputs: int, mode: str, *, side: int = 1, stride: int = 1, groups: int = 1) -> Tensor:
        margin = (self.kernel.shape[2] - side) // 2
        centre = slice(margin, margin + side)
        kernel = self.kernel[:outputs, : x.shape[1] // groups, centre, centre]
        return self.norm(functional.conv2d(x, kernel, None, stride, side // 2, groups=groups), mode)


def shuffled(x: Tensor, groups: int) -> Tensor:
    """The channel shuffle of ShuffleNet V1, as torchvision writes it."""
    count, channels, height, width = x.shape
    return x.view(count, groups, channels // groups, height, width).transpose(1, 2).reshape(count, -1, height, width)


class Unit(nn.Module):
    """A ShuffleNet V2 unit at its widest choice."""

    def __init__(self, space: SearchSpace, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        main, side = int(width * max(space.choices["split_ratio"])), max(space.choices["kernel"])
        self.stride = stride
        entry = inputs if stride == 2 else main
        self.extra = SharedConv(1, entry, 3)
        self.pw1, self.dw, self.pw2 = SharedConv(entry, main), SharedConv(1, main, side), SharedConv(main, main)
        self.reduce, self.expand = nn.Linear(main, max(1, main // 4)), nn.Linear(max(1, main // 4), main)
        if stride == 2:
            self.side_dw, self.side_pw = SharedConv(1, inputs, side), SharedConv(inputs, width)

    def forward(self, x: Tensor, width: int, choice: UnitChoice, mode: str) -> Tensor:
        main, groups = int(width * choice.split_ratio), choice.groups
        if self.stride == 2:
            aside = self.side_dw(x, x.shape[1], mode, side=choice.kernel, stride=2, groups=x.shape[1])
            aside, entry = functional.relu(self.side_pw(aside, width - main, mode, groups=groups)), x
        else:
            aside, entry = x[:, : width - main], x[:, width - main :]
        y = self.extra(entry, entry.shape[1], mode, side=3, groups=entry.shape[1]) if choice.extra_depthwise else entry
        y = functional.relu(self.pw1(y, main, mode, groups=groups))
        y = shuffled(y, groups) if groups > 1 else y
        y = self.dw(y, main, mode, side=choice.kernel, stride=self.stride, groups=main)
        y = self.pw2(y, main, mode, groups=groups)
        y = y if choice.residual else functional.relu(y)
        y = y * self._gate(y.mean((2, 3)), main) if choice.squeeze_excite else y
        y = functional.relu(y + entry) if choice.residual else y
        return shuffled(torch.cat((aside, y), 1), 2)

    def _gate(self, means: Tensor, main: int) -> Tensor:
        hidden = max(1, main // 4)
        squeezed = functional.linear(means, self.reduce.weight[:hidden, :main], self.reduce.bias[:hidden])
        gate = functional.linear(functional.relu(squeezed), self.expand.weight[:main, :hidden], self.expand.bias[:main])
        return torch.sigmoid(gate)[:, :, None, None]


class TorchSupernet(nn.Module):
    """All architectures of a space; the architecture is an argument."""

    def __init__(self, space: SearchSpace) -> None:
        super().__init__()
        self.space, channels = space, space.stem_channels
        self.stem, stages = SharedConv(3, channels, 3), []
        for stage in space.stages:
            width = max(stage.width)
            units = [Unit(space, width if i else channels, width, 1 if i else 2) for i in range(max(stage.depth))]
            stages.append(nn.ModuleList(units))
            channels = width
        self.stages: Any = nn.ModuleList(stages)
        self.head, self.classifier = (
            SharedConv(channels, space.head_channels),
            nn.Linear(space.head_channels, space.classes),
        )

    def forward(self, images: Tensor, architecture: Architecture, mode: str = "train") -> Tensor:
        """Logits of one architecture; `mode` is train, first estimate, estimate or score."""
        space = self.space
        x = functional.relu(self.stem(images, space.stem_channels, mode, side=3, stride=space.stem_stride))
        x = functional.max_pool2d(x, 3, 2, 1) if space.max_pool else x
        for units, chosen in zip(self.stages, architecture.stages, strict=True):
            for unit, choice in zip(units, chosen.units, strict=False):  # the stage may be less deep
                x = unit(x, chosen.width, choice, mode)
        return self.classifier(functional.relu(self.head(x, space.head_channels, mode)).mean((2, 3)))
