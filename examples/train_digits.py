"""Train `digits_resnet` on scikit-learn's digits, reproducibly, and write its weights as safetensors.

    python train_digits.py [--output FILE] [--epochs 80] [--seed 0] [--folds 3]

Only the 1,347 training images are ever trained on. `--folds K` trains K times on (K-1)/K of them and prints the accuracy
on the rest: choose options by that, and by nothing else. The 450 evaluation images are looked at once, at the end.
One thread and deterministic kernels: the same machine and versions give the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from digits_resnet import build
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from secateurs_adapters.datasets import DigitsSettings, load_digits

OUTPUT = Path(__file__).with_name("digits_resnet.safetensors")


def digits(split: str) -> tuple[Tensor, Tensor]:
    """Return images of shape `(n, 1, 8, 8)` and labels of one split, `train` or `evaluation`."""
    data = load_digits(DigitsSettings.model_validate({"split": split}))
    return torch.from_numpy(data.inputs["input"]), torch.from_numpy(data.labels)


def augmented(images: Tensor, generator: torch.Generator, *, angle: float = 0.2, scale: float = 0.1) -> Tensor:
    """Return the images each shifted by up to a pixel, turned by up to `angle` radians and scaled by up to `scale`."""
    n, size = len(images), images.shape[-1]
    turn, grow, right, down = (torch.rand(4, n, generator=generator) * 2 - 1).unbind()
    cos, sin = torch.cos(turn * angle) * (1 + grow * scale), torch.sin(turn * angle) * (1 + grow * scale)
    rows = (cos, -sin, right * 2 / size), (sin, cos, down * 2 / size)
    maps = torch.stack([torch.stack(row, -1) for row in rows], 1)
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    background = images.min()
    return functional.grid_sample(images - background, grid, align_corners=False) + background


def train(images: Tensor, labels: Tensor, *, epochs: int, seed: int, batch: int = 64, rate: float = 3e-3) -> nn.Module:
    """Return a network trained with AdamW and a cosine schedule."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = build()
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.05)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for _ in range(epochs):
        network.train()
        order = torch.randperm(len(images), generator=generator)
        for index in order[: len(order) // batch * batch].split(batch):
            loss = functional.cross_entropy(
                network(augmented(images[index], generator)), labels[index], label_smoothing=0.05
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def correct(network: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Return how many images the network classifies rightly."""
    with torch.inference_mode():
        return int((network(images).argmax(1) == labels).sum())


def cross_validate(images: Tensor, labels: Tensor, *, folds: int, epochs: int, seed: int) -> None:
    """Print the accuracy of each fold of the training images under a network trained on the other folds."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(images)))
    hits = 0
    for number, held_out in enumerate(order.tensor_split(folds)):
        rest = torch.ones(len(images), dtype=torch.bool)
        rest[held_out] = False
        network = train(images[rest], labels[rest], epochs=epochs, seed=seed + number)
        right = correct(network, images[held_out], labels[held_out])
        hits += right
        print(f"fold {number + 1} of {folds}: {right} of {len(held_out)}", flush=True)
    print(f"cross-validation: {hits} of {len(images)} ({hits / len(images):.2%})")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Train digits_resnet on scikit-learn's digits.")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the weights go")
    parser.add_argument("--epochs", type=int, default=80, help="passes over the training images")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights, the order and the augmentation")
    parser.add_argument("--folds", type=int, default=0, help="cross-validate on the training images and write nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(mode=True)
    images, labels = digits("train")
    if options.folds:
        cross_validate(images, labels, folds=options.folds, epochs=options.epochs, seed=options.seed)
        return
    network = train(images, labels, epochs=options.epochs, seed=options.seed)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, options.output)
    print(f"training: {correct(network, images, labels)} of {len(images)}")
    images, labels = digits("evaluation")
    right = correct(network, images, labels)
    print(f"evaluation: {right} of {len(images)} ({right / len(images):.2%})")
    print(f"wrote {options.output} ({options.output.stat().st_size} bytes)")


if __name__ == "__main__":
    main()
