"""The network of trivial zoos."""

import os
from pathlib import Path

from torch import nn


def build(name: str = "") -> nn.Module:
    """Return a perceptron of one hidden layer, none of whose units can be dead, and note its name in the file that the environment names."""
    if journal := os.environ.get("ZOO_JOURNAL"):
        with Path(journal).open("a") as file:
            file.write(f"{name}\n")
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))
