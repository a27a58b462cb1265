"""An attention of your own: tell Secateurs where its heads are, and they are pruned whole.

    python examples/own_architecture.py

`OwnAttention` names its projections `wq`, `wk`, `wv` and `wo`, which no built-in description knows: its heads are left alone, with the
reason. A plugin of one hook describes them. A description is a claim, not a promise: if it were wrong, the edits would not be certified, and
refused.

In a package, put the class `Heads` behind an entry point of the group `secateurs`, as `examples/plugin_example` does.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import secateurs
from secateurs.attention import AttentionHeads
from secateurs.manager import create_manager

__all__ = ["Classifier", "Heads", "OwnAttention", "digits", "prune", "train"]

WIDTH, HEADS, DIM, LAYERS, CLASSES = 48, 6, 8, 2, 10


class OwnAttention(nn.Module):
    """Self-attention over tokens of width `WIDTH`, shape `(n, tokens, WIDTH)` in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Linear(WIDTH, HEADS * DIM) for _ in range(3))
        self.wo = nn.Linear(HEADS * DIM, WIDTH)
        self.n_heads = HEADS

    def forward(self, tokens: Tensor) -> Tensor:
        """Return what each token gathers from all."""
        parts = (
            layer(tokens).unflatten(-1, (self.n_heads, DIM)).transpose(1, 2) for layer in (self.wq, self.wk, self.wv)
        )
        mixed: Tensor = functional.scaled_dot_product_attention(*parts)
        out: Tensor = self.wo(mixed.transpose(1, 2).flatten(2))
        return out


class Layer(nn.Module):
    """Attention and two layers of neurons, each beside a residual path."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = OwnAttention()
        self.neurons = nn.Sequential(nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, WIDTH))
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens of the same shape."""
        tokens = tokens + self.attention(self.first(tokens))
        out: Tensor = tokens + self.neurons(self.second(tokens))
        return out


class Classifier(nn.Module):
    """Digits of 8x8 pixels as sixteen tokens of 2x2, two layers, and a head on the mean of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Conv2d(1, WIDTH, 2, stride=2), nn.Parameter(torch.zeros(16, WIDTH))
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return scores of the classes, shape `(n, 10)`, for images of shape `(n, 1, 8, 8)`."""
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.places
        scores: Tensor = self.head(self.layers(tokens).mean(1))
        return scores


class Heads:
    """The plugin: says where the heads of an `OwnAttention` are."""

    @secateurs.hookimpl
    def secateurs_describe_attention(self, module: nn.Module) -> AttentionHeads | None:
        """Return the description, or None for modules of others."""
        if not isinstance(module, OwnAttention):
            return None
        return AttentionHeads(
            queries="wq",
            keys="wk",
            values="wv",
            output="wo",
            heads=module.n_heads,
            kv_heads=module.n_heads,
            attributes=(("n_heads", 1),),  # goes down by one with each head
        )


def digits() -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Return batches of scikit-learn's handwritten digits, to learn from and to judge by."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    batches = [*zip(images.split(64), torch.tensor(found.target).split(64), strict=True)]
    return batches[:21], batches[21:]


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]], epochs: int) -> None:
    """Train with Adam; a few seconds give a network worth pruning."""
    optimiser = torch.optim.Adam(model.parameters(), lr=4e-3)
    for _ in range(epochs):
        for images, labels in batches:
            optimiser.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimiser.step()


def accuracy(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Return the share of images whose label is found."""
    with torch.no_grad():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    return right / sum(len(labels) for _, labels in batches)


def prune(model: nn.Module, batches: list[tuple[Tensor, Tensor]], *plugins: Any) -> secateurs.PruneResult:
    """Return the network with two thirds of its units, heads among them if a plugin describes them."""
    manager = create_manager()
    for plugin in plugins:
        manager.adopt(plugin, type(plugin).__name__)
    passes = [{"mi-nodes": {"target_units": 0.67, "allocation": "uniform"}}]
    return secateurs.prune(model, batches[0][0], batches, passes, manager=manager)


def main() -> int:
    """Prune without and with the description, and print what became of the heads."""
    torch.manual_seed(0)
    learn, judge = digits()
    model = Classifier()
    train(model, learn, epochs=25)
    model.eval()
    print(f"dense: {accuracy(model, judge):.3f} right")
    for words, plugins in (("not described", ()), ("described", (Heads(),))):
        result = prune(model, learn, *plugins)
        heads = [layer.attention.n_heads for layer in result.model.layers]
        print(
            f"{words}: heads {heads}, {result.report.ratios.params:.2f} of the parameters, {accuracy(result.model, judge):.3f} right"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
