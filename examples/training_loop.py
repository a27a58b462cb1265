"""Pruning inside a training loop of one's own: a network, a DataLoader, and no recipe.

Run it with `python examples/training_loop.py`; it trains a small network for handwritten digits, prunes it in the middle,
goes on training what is left, and saves it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secateurs
from secateurs_adapters.data_settings import DigitsSettings
from secateurs_adapters.datasets import load_digits

__all__ = ["batches_of", "build", "train"]


def build() -> nn.Module:
    """Return an untrained network for images of 8x8."""
    return nn.Sequential(
        *(nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU()),
        *(nn.Conv2d(24, 48, 3, stride=2, padding=1), nn.BatchNorm2d(48), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(48 * 16, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def batches_of(split: str) -> DataLoader[tuple[torch.Tensor, ...]]:
    """Return a DataLoader of images and labels."""
    digits = load_digits(DigitsSettings.model_validate({"split": split}))
    images, labels = torch.as_tensor(digits.inputs["input"]), torch.as_tensor(digits.labels)
    return DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=split == "train")


def accuracy(network: nn.Module, batches: DataLoader[tuple[torch.Tensor, ...]]) -> float:
    """Return the share of examples classified rightly."""
    network.eval()
    with torch.no_grad():
        right = sum(int((network(images).argmax(1) == labels).sum()) for images, labels in batches)
    return right / len(batches.dataset)  # type: ignore[arg-type]  # a TensorDataset has a length


def train(epochs: int, prune_after: int) -> secateurs.PruneResult:
    """Train, prune after some epochs, and train what is left; return the pruned and trained network with its plan."""
    network, batches, held_out = build(), batches_of("train"), batches_of("evaluation")
    for epoch in range(epochs):
        if epoch == prune_after:
            images, _ = next(iter(batches))
            result = secateurs.prune(network, images, batches, passes=[{"mi-nodes": {"target_macs": 0.5, "grid": 4}}])
            network = result.model
            print(f"{result.report.ratios.macs:.2f} of the MACs left, accuracy {accuracy(network, held_out):.3f}")
        if epoch in (0, prune_after):  # the pruned network has new parameters
            optimiser = torch.optim.AdamW(network.parameters(), lr=2e-3)
        network.train()
        for images, labels in batches:
            loss = nn.functional.cross_entropy(network(images), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        print(f"epoch {epoch + 1}: accuracy {accuracy(network, held_out):.3f}")
    return result


def main() -> None:
    """Parse the arguments, train, and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--prune-after", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("pruned-digits"))
    given = parser.parse_args()
    if not 0 < given.prune_after < given.epochs:
        parser.error("--prune-after has to lie between 0 and --epochs")
    torch.manual_seed(0)
    train(given.epochs, given.prune_after).save(given.output)


if __name__ == "__main__":
    main()
