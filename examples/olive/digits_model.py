"""What Olive is told of the digits network: how to load it, what to export it with, and images to calibrate quantisation.

Olive imports this file by its path (`model_script`), with the folder above on the import path (`script_dir`).
"""

from __future__ import annotations

from typing import Any

import torch
from digits_resnet import build
from olive.data.registry import Registry
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.utils.data import Dataset

from secateurs_adapters.data_settings import DigitsSettings
from secateurs_adapters.datasets import load_digits

__all__ = ["digits_train", "dummy_inputs", "load_network"]


def load_network(path: str) -> nn.Module:
    """Return the trained network of `digits_resnet.py`.

    Args:
        path: the safetensors file of its weights.
    """
    network = build()
    load_model(network, path)
    return network.eval()


def dummy_inputs(handler: Any) -> dict[str, Tensor]:  # noqa: ARG001
    """Return the inputs to trace with, by name: torch's dynamo exporter would take a bare tensor apart.

    Args:
        handler: Olive's; not used.
    """
    return {"images": torch.zeros(2, 1, 8, 8)}


class _Images(Dataset[tuple[dict[str, Tensor], Tensor]]):
    """Images by the name of the network's input, with their labels."""

    def __init__(self, count: int) -> None:
        digits = load_digits(DigitsSettings(split="train"))
        assert digits.labels is not None
        self.images = torch.as_tensor(next(iter(digits.inputs.values()))[:count])
        self.labels = torch.as_tensor(digits.labels[:count])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], Tensor]:
        return {"images": self.images[index]}, self.labels[index]


@Registry.register_dataset()
def digits_train(count: int = 256, **_: Any) -> _Images:
    """Return images for Olive's data configs.

    Args:
        count: how many.
    """
    return _Images(count)
