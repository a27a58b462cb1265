"""A small residual network for scikit-learn's 8x8 handwritten digits.

A stem and three stages of basic blocks on maps of 8x8, 4x4 and 2x2. A block that keeps its shape has the identity as
its shortcut and can be dropped whole; the first block of stages two and three changes shape and has a projection
instead (option B of He et al. 2016).
`train_digits.py` trains it into `digits_resnet.safetensors`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["BasicBlock", "DigitsResNet", "build"]


class BasicBlock(nn.Module):
    """$y = relu(F(x) + S(x))$: two 3x3 convolutions F beside the shortcut S.

    Args:
        inputs: channels of x.
        outputs: channels of y.
        stride: of the first convolution; 2 halves the map.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, images: Tensor) -> Tensor:
        """Return the block's output for maps of shape `(n, inputs, h, w)`."""
        hidden = self.relu(self.bn1(self.conv1(images)))
        out: Tensor = self.relu(self.bn2(self.conv2(hidden)) + self.shortcut(images))
        return out


class DigitsResNet(nn.Module):
    """Stem, stages of `BasicBlock`s, global average and a linear head.

    Args:
        widths: channels of each stage; every stage after the first halves the map.
        blocks: basic blocks per stage.
        classes: number of outputs.
    """

    def __init__(self, widths: Sequence[int], blocks: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        stages, inputs = [], widths[0]
        for index, width in enumerate(widths):
            entry = BasicBlock(inputs, width, stride=1 if index == 0 else 2)
            stages.append(nn.Sequential(entry, *(BasicBlock(width, width) for _ in range(blocks - 1))))
            inputs = width
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores of shape `(n, classes)` for images of shape `(n, 1, 8, 8)`."""
        features = self.pool(self.stages(self.stem(images))).flatten(1)
        scores: Tensor = self.head(features)
        return scores


def build(widths: Sequence[int] = (16, 32, 48), blocks: int = 3, classes: int = 10) -> nn.Module:
    """Return an untrained network.

    Args:
        widths: channels of each stage.
        blocks: basic blocks per stage.
        classes: number of outputs.

    Raises:
        ValueError: a width, `blocks` or `classes` is not positive.

    >>> sum(parameter.numel() for parameter in build().parameters())
    186042
    """
    if not widths or min(*widths, blocks, classes) < 1:
        raise ValueError(
            f"`widths`, `blocks` and `classes` must be positive, got {tuple(widths)}, {blocks}, {classes}."
        )
    return DigitsResNet(widths, blocks, classes)
