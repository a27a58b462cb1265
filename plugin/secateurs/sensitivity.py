r"""How much the loss cares for each output of a layer: the second moment of its gradient $g$ there.

$F = \mathbb{E} \sum_s g_s g_s^\top$, summed over positions $s$. Labels are drawn from the network's own predictions, so that $F$ is the Fisher
information with respect to the layer's output; unlabelled data are enough. An error $e$ of the output, alike at all positions of which one is
drawn, costs about $e^\top F e / 2$ nats.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateurs.data import Dataset
from secateurs.forward import call, frozen_randomness, logits
from secateurs.layers import channel_dim, widths_of
from secateurs.outputs import prediction_rows, sampled_loss

__all__ = ["output_sensitivity"]


def output_sensitivity(
    model: nn.Module,
    names: Sequence[str],
    data: Dataset,
    *,
    pairs: bool = False,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return the second moment of the loss gradient at each layer's output.

    Args:
        model: the network; a copy is used.
        names: the layers.
        data: examples; labels are not used.
        pairs: of each pair of channels, and not only of each channel with itself.
        batch_size: examples per backward pass.
        seed: of the drawn labels.

    Returns:
        By layer, float64: the mean squared gradient of each channel, shape `(channels,)`, or with `pairs` the whole matrix, shape
        `(channels, channels)`, of which that is the diagonal.
    """
    twin = copy.deepcopy(model).eval()
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    outputs: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    layers: dict[str, Any] = {name: twin.get_submodule(name) for name in names}
    for name in names:

        def keep(_: nn.Module, __: Any, output: Tensor, name: str = name) -> Tensor:
            outputs[name] = output
            return output.clone()  # an operation in place (ReLU) must not change what the gradient is taken at

        twin.get_submodule(name).register_forward_hook(keep)
    with torch.enable_grad(), frozen_randomness(seed):
        for batch in data.longest_first().batches(batch_size):
            prediction = logits(call(twin, batch))
            loss = sampled_loss(prediction_rows(prediction))
            gradients: tuple[Tensor | None, ...] = torch.autograd.grad(loss, list(outputs.values()), allow_unused=True)
            for name, gradient in zip(outputs, gradients, strict=True):
                if gradient is None:
                    continue
                flat = gradient.double().movedim(channel_dim(layers[name], gradient), 0).flatten(1)
                sums[name] = sums.get(name, 0) + (flat @ flat.T if pairs else flat.square().sum(1))
    ones = {name: torch.ones(widths_of(layers[name])[1], dtype=torch.float64) for name in names}
    return {name: sums.get(name, ones[name].diag() if pairs else ones[name]) / len(data) for name in names}
