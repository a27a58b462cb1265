"""Small seeded networks, one per pattern that pruning has to get right, and data to run them on.

Every builder seeds itself, gives BatchNorm statistics that matter, and returns the network in evaluation mode.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateurs.data import Dataset

CLASSES = 5


def seeded(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Make a builder deterministic, and randomise what PyTorch initialises to zeros and ones."""

    def wrapped(*args, seed: int = 0, **options) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build(*args, **options)
            for module in model.modules():
                if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.normal_(module.bias, std=0.2)
                    nn.init.normal_(module.running_mean, std=0.2)
                    nn.init.uniform_(module.running_var, 0.5, 1.5)
        return model.eval()

    wrapped.__name__ = build.__name__
    return wrapped


def images(n: int = 32, channels: int = 3, size: int = 8, *, labels: bool = False, seed: int = 0) -> Dataset:
    """Return images of smooth noise; with `labels`, the class is a linear function of the image."""
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(n, channels, size, size)).astype(np.float32)
    values += 0.5 * np.roll(values, 1, axis=-1) + 0.5 * np.roll(values, 1, axis=-2)
    classes = None
    if labels:
        direction = np.random.default_rng(99).normal(size=(channels * size * size, CLASSES))
        classes = (values.reshape(n, -1) @ direction).argmax(1)
    return Dataset({"input": values}, classes)


def vectors(n: int = 64, width: int = 12, *, seed: int = 0) -> Dataset:
    """Return correlated Gaussian vectors with a mean."""
    generator = np.random.default_rng(seed)
    mix = np.random.default_rng(7).normal(size=(width, width))
    values = generator.normal(size=(n, width)) @ mix / width**0.5 + 0.3
    return Dataset({"input": values.astype(np.float32)})


def sequences(n: int = 16, length: int = 6, width: int = 16, *, seed: int = 0) -> Dataset:
    """Return sequences of vectors."""
    return Dataset({"input": np.random.default_rng(seed).normal(size=(n, length, width)).astype(np.float32)})


def tokens(n: int = 16, length: int = 6, vocabulary: int = 20, *, seed: int = 0) -> Dataset:
    """Return sequences of token numbers."""
    return Dataset({"input": np.random.default_rng(seed).integers(0, vocabulary, size=(n, length))})


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: `identity`, `projection` (option B) or `padding` (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, shortcut: str = "projection") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.pad = outputs - inputs
        self.stride = stride
        self.projection = None
        if shortcut == "projection" and (stride != 1 or inputs != outputs):
            self.projection = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.projection is not None:
            return F.relu(out + self.projection(x))
        if self.pad or self.stride != 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad // 2, self.pad - self.pad // 2))
        return F.relu(out + x)


class ResNet(nn.Module):
    """A stem, two stages of residual blocks, global average and a linear head."""

    def __init__(self, widths=(8, 16), blocks: int = 2, shortcut: str = "projection") -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        layers, inputs = [], widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                layers.append(ResidualBlock(inputs, width, stride, shortcut))
                inputs = width
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, CLASSES)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return self.head(self.layers(F.relu(self.bn(self.stem(input)))).mean((2, 3)))


@seeded
def residual(blocks: int = 2) -> nn.Module:
    return ResNet(blocks=blocks)


@seeded
def zero_padded() -> nn.Module:
    return ResNet(shortcut="padding")


@seeded
def plain(in_place: bool = False) -> nn.Module:
    """Convolutions with biases, then flatten and linear layers."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(inplace=in_place),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.ReLU(inplace=in_place),
        nn.Flatten(),
        nn.Linear(8 * 16, 10),
        nn.ReLU(inplace=in_place),
        nn.Linear(10, CLASSES),
    )


class SeparableBlock(nn.Module):
    """Expansion, depthwise convolution, squeeze-excitation, projection."""

    def __init__(self, width: int = 8, hidden: int = 12) -> None:
        super().__init__()
        self.expand = nn.Conv2d(width, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.squeeze = nn.Conv2d(hidden, 4, 1)
        self.excite = nn.Conv2d(4, hidden, 1)
        self.project = nn.Conv2d(hidden, width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.bn2(self.depthwise(F.silu(self.bn1(self.expand(x))))))
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(hidden.mean((2, 3), keepdim=True)))))
        return x + self.bn3(self.project(hidden * scale))


@seeded
def separable() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        SeparableBlock(),
        SeparableBlock(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )


class Dense(nn.Module):
    """DenseNet-like: every layer reads the concatenation of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 4, 3, padding=1)
        self.third = nn.Conv2d(10, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(15)
        self.head = nn.Linear(15, CLASSES)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        a = F.relu(self.first(input))
        b = F.relu(self.second(a))
        c = F.relu(self.third(torch.cat((a, b), 1)))
        return self.head(F.relu(self.norm(torch.cat((a, b, c), 1))).mean((2, 3)))


@seeded
def dense() -> nn.Module:
    return Dense()


class Attention(nn.Module):
    """Self-attention that cuts heads with `view(..., -1, head_dim)`."""

    def __init__(self, width: int = 16, head_dim: int = 4) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = (
            layer(x).view(n, length, -1, self.head_dim).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, -1))


class EncoderLayer(nn.Module):
    """Pre-LN transformer layer."""

    def __init__(self, width: int = 16, hidden: int = 24) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    """Two encoder layers, mean over the sequence, linear head."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer() for _ in range(depth))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        for layer in self.layers:
            input = layer(input)  # noqa: A001
        return self.head(self.norm(input).mean(1))


@seeded
def encoder(depth: int = 2) -> nn.Module:
    return Encoder(depth)


@seeded
def group_normed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(4, 8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, CLASSES),
    )


@seeded
def layer_normed() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, CLASSES)
    )


@seeded
def mlp(bias: bool = True, hidden: int = 16) -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, hidden, bias=bias),
        nn.ReLU(),
        nn.Linear(hidden, 10, bias=bias),
        nn.ReLU(),
        nn.Linear(10, CLASSES, bias=bias),
    )


@seeded
def sigmoid() -> nn.Module:
    """An activation with f(0) != 0: zeroing weights is not masking."""
    return nn.Sequential(nn.Linear(12, 16), nn.Sigmoid(), nn.Linear(16, 10), nn.Softplus(), nn.Linear(10, CLASSES))


class Recurrent(nn.Module):
    """An LSTM between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 8)
        self.lstm = nn.LSTM(8, 6, batch_first=True)
        self.hidden = nn.Linear(6, 10)
        self.head = nn.Linear(10, CLASSES)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        states, _ = self.lstm(torch.tanh(self.embed(input)))
        return self.head(F.relu(self.hidden(states[:, -1])))


@seeded
def recurrent() -> nn.Module:
    return Recurrent()


class LanguageModel(nn.Module):
    """Embedding and head share one tensor; a residual feed-forward layer lies between."""

    def __init__(self, vocabulary: int = 20, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.up = nn.Linear(width, 12)
        self.down = nn.Linear(12, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        x = self.embedding(input)
        return self.head(x + self.down(F.relu(self.up(x))))


@seeded
def tied() -> nn.Module:
    return LanguageModel()


class Reused(nn.Module):
    """One linear layer is called twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 8)
        self.shared = nn.Linear(8, 8)
        self.alias = self.shared
        self.hidden = nn.Linear(8, 9)
        self.head = nn.Linear(9, CLASSES)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        x = F.relu(self.first(input))
        x = F.relu(self.alias(F.relu(self.shared(x))))
        return self.head(F.relu(self.hidden(x)))


@seeded
def reused() -> nn.Module:
    return Reused()


@seeded
def constant() -> nn.Module:
    """The last layer ignores its input, so the output is the same for every example."""
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    nn.init.zeros_(model[2].weight)
    return model


NETWORKS = {
    "residual": (residual, images),
    "zero_padded": (zero_padded, images),
    "plain": (plain, images),
    "separable": (separable, images),
    "dense": (dense, images),
    "encoder": (encoder, sequences),
    "group_normed": (group_normed, images),
    "layer_normed": (layer_normed, vectors),
    "mlp": (mlp, vectors),
    "sigmoid": (sigmoid, vectors),
    "recurrent": (recurrent, sequences),
    "tied": (tied, tokens),
    "reused": (reused, vectors),
    "constant": (constant, vectors),
}
"""Every network with data that fits it."""
