"""The kinds of layers whose units are understood: where their channels are, in tensors and in weights.

Hugging Face's `Conv1D` (GPT-2) is a linear layer whose weight is stored the other way round; it is recognised by its form, so that nothing here
imports transformers.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

__all__ = [
    "CONVOLUTIONS",
    "NORMS",
    "Kind",
    "as_weight",
    "channel_dim",
    "is_depthwise",
    "is_matrix_layer",
    "is_stored_transposed",
    "mixes",
    "slice_dimensions",
    "weight_dims",
    "weight_matrix",
    "width_attributes",
    "widths_of",
]

Kind = Literal["out", "in", "pass"]
"""How a layer takes part in a group: it produces units, reads them, or works on each by itself."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_SPATIAL_AXES: tuple[tuple[tuple[type[nn.Module], ...], int], ...] = (
    ((nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d), 1),
    ((nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d), 2),
    ((nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d), 3),
)


def is_stored_transposed(layer: nn.Module) -> bool:
    """Tell whether a layer is linear with a weight of shape `(in, out)`, as Hugging Face's `Conv1D`."""
    weight = getattr(layer, "weight", None)
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf") and isinstance(weight, Tensor) and weight.ndim == 2


def is_depthwise(layer: nn.Module) -> bool:
    """Tell whether a convolution works on each channel by itself."""
    return (
        isinstance(layer, CONVOLUTIONS) and layer.groups > 1 and layer.groups == layer.out_channels == layer.in_channels
    )


def is_matrix_layer(layer: nn.Module) -> bool:
    """Tell whether a layer is a matrix product over its channels: linear, or a convolution with one group."""
    return (
        isinstance(layer, nn.Linear)
        or (isinstance(layer, CONVOLUTIONS) and layer.groups == 1)
        or is_stored_transposed(layer)
    )


def mixes(layer: nn.Module) -> bool:
    """Tell whether a layer combines channels: it has a weight of two dimensions or more and is not depthwise.

    A module with such a tensor of its own around layers with weights (a table of position biases beside projections) is not one layer.
    """
    own = [parameter for parameter in layer.parameters(recurse=False) if parameter.ndim >= 2]
    groups = getattr(layer, "groups", 1)
    if not own or (groups > 1 and groups == getattr(layer, "in_channels", 0)):
        return False
    # Torch's MultiheadAttention computes with its child's weight and never calls it.
    inside = any(next(child.parameters(), None) is not None for child in layer.children())
    return not inside or isinstance(layer, nn.MultiheadAttention)


def channel_dim(layer: nn.Module, value: Tensor) -> int:
    """Return the axis of a layer's input or output that holds the channels."""
    if isinstance(layer, nn.PReLU):
        return min(1, value.ndim - 1)
    spatial = next((axes for kinds, axes in _SPATIAL_AXES if isinstance(layer, kinds)), None)
    if spatial is None or (isinstance(layer, nn.BatchNorm1d) and value.ndim == 2):
        return value.ndim - 1
    return value.ndim - 1 - spatial


def weight_dims(layer: nn.Module) -> tuple[int, int]:
    """Return the dimensions of a layer's weight that hold its outputs and its inputs."""
    return (1, 0) if is_stored_transposed(layer) else (0, 1)


def widths_of(layer: nn.Module) -> tuple[int, int]:
    """Return how many channels a matrix layer reads and how many it puts out."""
    weight: Any = layer.weight
    out_dim, in_dim = weight_dims(layer)
    return int(weight.shape[in_dim]), int(weight.shape[out_dim])


def weight_matrix(layer: nn.Module) -> Tensor:
    """Return a matrix layer's weight as a matrix of shape `(out, d)`, detached; a view where it can be one."""
    weight: Any = layer.weight
    detached: Tensor = weight.detach()
    return detached.T if is_stored_transposed(layer) else detached.flatten(1)


def as_weight(layer: nn.Module, matrix: Tensor) -> Tensor:
    """Return a matrix of shape `(out, d)` in the shape of the layer's weight."""
    weight: Any = layer.weight
    return matrix.T if is_stored_transposed(layer) else matrix.reshape(weight.shape)


def slice_dimensions(layer: nn.Module, kind: Kind) -> tuple[tuple[str, int], ...]:
    """Return the parameters and buffers, with the dimension, that shrink when a layer loses channels."""
    out_dim, in_dim = weight_dims(layer)
    if kind == "in":
        return (("weight", in_dim),)
    if isinstance(layer, NORMS):
        return (("weight", 0), ("bias", 0), ("running_mean", 0), ("running_var", 0))
    return (("weight", 0),) if isinstance(layer, nn.PReLU) else (("weight", out_dim), ("bias", 0))


def width_attributes(layer: nn.Module, kind: Kind) -> tuple[str, ...]:
    """Return the attributes of a layer that count the channels it loses."""
    if isinstance(layer, NORMS):
        return ("num_features",)
    if isinstance(layer, nn.PReLU):
        return ("num_parameters",)
    if isinstance(layer, nn.Linear):
        return ("out_features",) if kind == "out" else ("in_features",)
    if is_stored_transposed(layer):
        names = ("nf",) if kind == "out" else ("nx",)
        return tuple(name for name in names if hasattr(layer, name))
    if kind == "pass":
        return ("in_channels", "out_channels", "groups")
    return ("out_channels",) if kind == "out" else ("in_channels",)
