"""Small networks of the families that torch users write themselves, seeded by the caller."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def head(width: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))


class Residual(nn.Module):
    """A basic block with any normalisation and any shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, norm=nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), norm(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), norm(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet(norm=nn.BatchNorm2d) -> nn.Module:
    blocks = [
        Residual(16, 16, norm=norm),
        Residual(16, 16, norm=norm),
        Residual(16, 32, 2, norm),
        Residual(32, 32, norm=norm),
    ]
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *blocks, head(32))


def vgg() -> nn.Module:
    layers = [conv(3, 16), conv(16, 16), nn.MaxPool2d(2), conv(16, 32), conv(32, 32), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 5))


class SqueezeExcite(nn.Module):
    """Channel attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class InvertedResidual(nn.Module):
    """MobileNetV3's block."""

    def __init__(self, width: int, expanded: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv(width, expanded, 1),
            conv(expanded, expanded, 3, groups=expanded),
            SqueezeExcite(expanded),
            nn.Conv2d(expanded, width, 1),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def mobilenet() -> nn.Module:
    return nn.Sequential(
        conv(3, 16, stride=2), InvertedResidual(16, 48), InvertedResidual(16, 48), conv(16, 64, 1), head(64)
    )


class Dense(nn.Module):
    """DenseNet's layer: the input beside what is computed of it."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bottleneck, self.grow = conv(inputs, 2 * growth, 1), conv(2 * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.grow(self.bottleneck(x))], 1)


def densenet() -> nn.Module:
    return nn.Sequential(
        conv(3, 16), Dense(16, 8), Dense(24, 8), conv(32, 16, 1), nn.AvgPool2d(2), Dense(16, 8), head(24)
    )


class Shuffle(nn.Module):
    """ShuffleNetV2's block: split, work on one half, concatenate, shuffle."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.body = nn.Sequential(conv(half, half, 1), conv(half, half, 3, groups=half), conv(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        y = torch.cat([left, self.body(right)], 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def shufflenet() -> nn.Module:
    return nn.Sequential(conv(3, 32, stride=2), Shuffle(32), Shuffle(32), conv(32, 64, 1), head(64))


class CrossStage(nn.Module):
    """YOLO's C2f: split, chain, concatenate everything."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = conv(width, width, 1), conv(2 * width, width, 1)
        self.chain = nn.ModuleList([conv(width // 2, width // 2), conv(width // 2, width // 2)])

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for layer in self.chain:
            parts.append(layer(parts[-1]))
        return self.last(torch.cat(parts, 1))


def crossstage() -> nn.Module:
    return nn.Sequential(conv(3, 32, stride=2), CrossStage(32), conv(32, 48, stride=2), CrossStage(48), head(48))


class UNet(nn.Module):
    """Segmentation: its output is a map, its skip connections are concatenations."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = conv(3, 16), conv(16, 32, stride=2)
        self.up, self.out = conv(48, 16), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.down(x)
        low = F.interpolate(self.middle(high), scale_factor=2.0, mode="nearest")
        return self.out(self.up(torch.cat([high, low], 1)))


class Recurrent(nn.Module):
    """A convolution, an LSTM and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(3, 32, 3, padding=1), nn.Conv1d(32, 16, 3, padding=1)
        self.lstm, self.hidden, self.out = nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x.flatten(2))))
        return self.out(F.relu(self.hidden(self.lstm(y.transpose(1, 2))[0][:, -1])))


class Attention(nn.Module):
    """A vision transformer's attention with one fused projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1))


class GatedBlock(nn.Module):
    """Pre-norm block with layer scale and a gated feed-forward part."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), Attention(width, heads), nn.LayerNorm(width)
        self.gate, self.value, self.down = (
            nn.Linear(width, 2 * width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale * self.attn(self.norm1(x))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.value(y))


class VisionTransformer(nn.Module):
    """Patches, blocks, mean, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 16, 32) * 0.1)
        self.blocks = nn.Sequential(GatedBlock(32, 4), GatedBlock(32, 4))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class Mixer(nn.Module):
    """MLP-Mixer's block."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.within = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.within(self.norm2(x))


class MixerNetwork(nn.Module):
    """Patches, mixers, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.blocks, self.head = (
            nn.Conv2d(3, 32, 4, 4),
            nn.Sequential(Mixer(16, 32), Mixer(16, 32)),
            nn.Linear(32, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def autoencoder() -> nn.Module:
    up = [nn.ConvTranspose2d(32, 16, 2, 2), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 1)]
    return nn.Sequential(conv(3, 32), conv(32, 48, stride=2), conv(48, 32), *up)


def weight_normed() -> nn.Module:
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 3, padding=1))
    return nn.Sequential(conv(3, 16), normed, nn.ReLU(), conv(16, 32), conv(32, 32), head(32))


def grouped() -> nn.Module:
    return nn.Sequential(
        conv(3, 32), conv(32, 64, 1), conv(64, 64, 3, groups=8), conv(64, 64, 1), conv(64, 64), head(64)
    )


class TorchEncoder(nn.Module):
    """Torch's own transformer encoder over patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


NETWORKS = {
    "resnet": resnet,
    "resnet-groupnorm": lambda: resnet(lambda width: nn.GroupNorm(4, width)),
    "vgg": vgg,
    "mobilenet": mobilenet,
    "densenet": densenet,
    "shufflenet": shufflenet,
    "cross-stage": crossstage,
    "unet": UNet,
    "lstm": Recurrent,
    "vit-fused-qkv": VisionTransformer,
    "mlp-mixer": MixerNetwork,
    "torch-encoder": TorchEncoder,
    "autoencoder": autoencoder,
    "weight-norm": weight_normed,
    "grouped": grouped,
}
