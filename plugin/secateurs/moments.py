"""Second moments of what a layer reads: the statistics behind the information criterion and behind refit.

A linear layer reads its input features; a convolution reads patches, one row per example and output position. Rows are drawn evenly over
examples, and positions at random (seeded) where there are more than needed, so that cost and memory are bounded whatever the data. Rows
of padding are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from secateurs.layers import CONVOLUTIONS

__all__ = ["Moments", "PairedMoments", "Positions", "patches", "rows_of_output", "token_rows", "unit_columns"]

Array = npt.NDArray[np.bool_]


class Positions:
    """Draws the output positions of a layer that a batch contributes, the same for every tensor of that batch.

    Args:
        rows: upper limit of rows per batch.
        seed: of the draw.
    """

    def __init__(self, rows: int, seed: int) -> None:
        self._rows = rows
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self, examples: int, positions: int) -> Tensor:
        """Return the sorted indices of the positions to use, at least one."""
        wanted = max(1, min(positions, self._rows // max(examples, 1)))
        if wanted == positions:
            return torch.arange(positions)
        return torch.randperm(positions, generator=self._generator)[:wanted].sort().values


def output_positions(layer: nn.Module, output: Tensor) -> int:
    """Return how many positions per example a layer's output has."""
    if isinstance(layer, CONVOLUTIONS):
        return math.prod(output.shape[2:])
    return math.prod(output.shape[1:-1])


def rows_of_output(layer: nn.Module, output: Tensor, positions: Tensor) -> Tensor:
    """Return a layer's output at some positions, shape `(examples * positions, channels)`."""
    flat = (
        output.flatten(2).transpose(1, 2)
        if isinstance(layer, CONVOLUTIONS)
        else output.reshape(len(output), -1, output.shape[-1])
    )
    return flat[:, positions].flatten(0, 1)


def token_rows(layer: nn.Module, output: Tensor, positions: Tensor, tokens: Array | None) -> Tensor | None:
    """Return which rows of `rows_of_output` and `patches` are tokens and not padding, shape `(examples * positions,)`; None for all.

    Args:
        layer: the layer that is observed.
        output: of the layer.
        positions: those that were drawn.
        tokens: of the batch, shape `(examples, length)`, or None where nothing is padded.
    """
    if tokens is None or isinstance(layer, CONVOLUTIONS) or output.shape[:-1] != tokens.shape:
        return None
    return torch.from_numpy(tokens).to(output.device)[:, positions].flatten()


def patches(layer: nn.Module, value: Tensor, positions: Tensor) -> Tensor:
    """Return what a layer reads at some output positions.

    Args:
        layer: linear, or a convolution with one group.
        value: its input, examples first.
        positions: indices into the flattened output positions.

    Returns:
        Shape `(examples * positions, d)` with `d = in_channels * prod(kernel_size)`, channel-major as in `layer.weight.flatten(1)`.
    """
    if not isinstance(layer, CONVOLUTIONS):
        return value.reshape(len(value), -1, value.shape[-1])[:, positions].flatten(0, 1)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(value, layer._reversed_padding_repeated_twice, mode)
    for axis, (kernel, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        padded = padded.unfold(axis, (kernel - 1) * dilation + 1, stride)[..., ::dilation]
    dims = len(layer.kernel_size)
    # (examples, channels, *out, *kernel): pick positions before anything is copied.
    index = torch.unravel_index(positions, padded.shape[2 : 2 + dims])
    picked = padded[(slice(None), slice(None), *index)]  # type: ignore[index]  # (examples, channels, positions, *kernel)
    return picked.transpose(1, 2).flatten(2).flatten(0, 1)


def unit_columns(layer: nn.Module, channels: Tensor) -> Tensor:
    """Return the columns of `weight.flatten(1)` that belong to input channels.

    Args:
        layer: the reader.
        channels: shape `(units, channels_per_unit)`.

    Returns:
        Shape `(units, channels_per_unit * prod(kernel_size))`.
    """
    size = math.prod(layer.kernel_size) if isinstance(layer, CONVOLUTIONS) else 1
    return (channels[..., None] * size + torch.arange(size)).flatten(1)


def _add_products(total: Tensor, y: Tensor, x: Tensor) -> None:
    """Add the sum over rows of the outer products of `y` and `x`; in float32 the means, which may dwarf the spread, are added in float64."""
    middle_y, middle_x = y.mean(0), x.mean(0)
    total += ((y - middle_y).T @ (x - middle_x)).double()
    sum_y, sum_x = y.sum(0, dtype=torch.float64), x.sum(0, dtype=torch.float64)
    wide_y, wide_x = middle_y.double(), middle_x.double()
    total.addmm_(torch.stack((sum_y, wide_y), 1), torch.stack((wide_x, sum_x - len(x) * wide_x)))


@dataclass
class Moments:
    """Running first and second moments of rows `x`, shape `(rows, d)`, in float64."""

    count: int
    sum_x: Tensor
    sum_xx: Tensor

    @classmethod
    def zeros(cls, width: int) -> Moments:
        """Return empty moments of `width` columns."""
        return cls(0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64))

    def update(self, x: Tensor) -> None:
        """Add rows."""
        if not len(x):
            return
        x = x.float() if x.dtype not in (torch.float32, torch.float64) else x
        self.count += len(x)
        self.sum_x += x.sum(0, dtype=torch.float64)
        _add_products(self.sum_xx, x, x)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.sum_x + other.sum_x, self.sum_xx + other.sum_xx)

    def __sub__(self, other: Moments) -> Moments:
        return Moments(self.count - other.count, self.sum_x - other.sum_x, self.sum_xx - other.sum_xx)

    @property
    def mean(self) -> Tensor:
        """The mean row, shape `(d,)`."""
        return self.sum_x / self.count

    @property
    def second(self) -> Tensor:
        """The uncentred second moment, shape `(d, d)`."""
        return self.sum_xx / self.count

    @property
    def covariance(self) -> Tensor:
        """The covariance, shape `(d, d)`."""
        return self.second - torch.outer(self.mean, self.mean)


@dataclass
class PairedMoments:
    """Moments of rows `x` together with targets `y`, shape `(rows, p)`."""

    x: Moments
    sum_y: Tensor
    sum_yx: Tensor

    @classmethod
    def zeros(cls, width: int, targets: int) -> PairedMoments:
        """Return empty moments of `width` columns and `targets` targets."""
        return cls(
            Moments.zeros(width),
            torch.zeros(targets, dtype=torch.float64),
            torch.zeros(targets, width, dtype=torch.float64),
        )

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add paired rows."""
        if not len(x):
            return
        x = x.float() if x.dtype not in (torch.float32, torch.float64) else x
        self.x.update(x)
        self.sum_y += y.sum(0, dtype=torch.float64)
        _add_products(self.sum_yx, y.to(x.dtype), x)

    @property
    def mean_y(self) -> Tensor:
        """The mean target, shape `(p,)`."""
        return self.sum_y / self.x.count

    @property
    def cross(self) -> Tensor:
        """The uncentred cross moment of targets and rows, shape `(p, d)`."""
        return self.sum_yx / self.x.count
