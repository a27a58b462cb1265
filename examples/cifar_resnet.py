"""The residual networks that He et al. trained on CIFAR-10, of any depth 6n + 2.

A stem of 16 channels and three stages of n basic blocks with 16, 32 and 64 channels on maps of 32x32, 16x16 and 8x8. A
shortcut that changes shape has no weights (option A): it takes every second pixel and pads with channels of zeros.

References:
    He et al. 2016, Deep Residual Learning for Image Recognition, section 4.2.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

__all__ = ["BasicBlock", "CifarResNet", "SubsampleAndPad", "build"]


class SubsampleAndPad(nn.Module):
    """Every second pixel in both directions, with `padding` channels of zeros before and after the others.

    >>> import torch
    >>> SubsampleAndPad(8)(torch.ones(1, 16, 32, 32)).shape
    torch.Size([1, 32, 16, 16])
    """

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, images: Tensor) -> Tensor:
        """Return maps of half the size and `2 * padding` more channels."""
        return functional.pad(images[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class BasicBlock(nn.Module):
    """$y = relu(F(x) + S(x))$: two 3x3 convolutions F beside the shortcut S, the identity where the shape stays.

    Args:
        inputs: channels of x.
        outputs: channels of y; twice `inputs` halves the map.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if stride == 1 else SubsampleAndPad((outputs - inputs) // 2)

    def forward(self, images: Tensor) -> Tensor:
        """Return the block's output for maps of shape `(n, inputs, h, w)`."""
        hidden = functional.relu(self.bn1(self.conv1(images)))
        return functional.relu(self.bn2(self.conv2(hidden)) + self.shortcut(images))


class CifarResNet(nn.Module):
    """Stem, three stages of `blocks` basic blocks, global average and a linear head.

    Args:
        blocks: blocks per stage, n.
        classes: number of outputs.
    """

    def __init__(self, blocks: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks)
        self.layer2 = _stage(16, 32, blocks)
        self.layer3 = _stage(32, 64, blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores of shape `(n, classes)` for images of shape `(n, 3, 32, 32)`."""
        features = functional.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        scores: Tensor = self.linear(self.pool(features).flatten(1))
        return scores


def build(depth: int = 20, classes: int = 10) -> nn.Module:
    """Return an untrained network.

    Args:
        depth: layers with weights, 6n + 2; the paper has 20, 32, 44, 56 and 110.
        classes: number of outputs.

    Raises:
        ValueError: the depth is not 6n + 2.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"`depth` must be 6n + 2 with n >= 1 (8, 14, 20, 26, 32, ...), got {depth}.")
    return CifarResNet((depth - 2) // 6, classes)


def _stage(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(inputs, outputs), *(BasicBlock(outputs, outputs) for _ in range(blocks - 1)))
