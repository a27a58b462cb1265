"""Readers: found by running the network, whatever lies between, and the masked original built from them."""

import numpy as np
import pytest
import torch
from networks import (
    dense,
    encoder,
    images,
    mlp,
    plain,
    recurrent,
    residual,
    reused,
    separable,
    sequences,
    tied,
    tokens,
    vectors,
    zero_padded,
)
from torch import nn
from torch.nn import functional as F

from secateurs.data import Dataset
from secateurs.layers import channel_dim
from secateurs.readers import masked, observe_readers


def span(start, stop):
    return tuple(range(start, stop))


class InPlace(nn.Module):
    """A residual network that adds and rectifies in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5))

    def forward(self, x):
        x = self.a(x)
        hidden = self.c(F.relu_(self.b(x)))
        hidden += x
        return self.d(hidden)


class Transposed(nn.Module):
    """A transposed convolution between two others."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 6, 3, stride=2)
        self.up = nn.ConvTranspose2d(6, 4, 3, stride=2)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.last(F.relu(self.up(F.relu(self.down(x)))))


# network, data, disturbed -> readers
CASES = {
    "linear": (mlp, vectors, {"0": (3, 5)}, {"2": (3, 5)}),
    "flatten": (plain, images, {"2": (1, 7)}, {"5": (*span(16, 32), *span(112, 128))}),
    "residual stream": (
        residual,
        images,
        {"stem": (2,)},
        dict.fromkeys(("layers.0.conv1", "layers.1.conv1", "layers.2.conv1", "layers.2.projection.0"), (2,)),
    ),
    "second stage": (residual, images, {"layers.2.conv2": (4,)}, {"layers.3.conv1": (4,), "head": (4,)}),
    "zero-padded shortcut": (
        zero_padded,
        images,
        {"layers.1.conv2": (0,)},
        # The shortcut of block 2 puts channel 0 at 4: half of the 8 new channels come before it.
        {"layers.2.conv1": (0,), "layers.3.conv1": (4,), "head": (4,)},
    ),
    "concatenation": (dense, images, {"second": (0, 3)}, {"third": (6, 9), "head": (6, 9)}),
    "two parts of a concatenation": (
        dense,
        images,
        {"first": (1,), "second": (2,)},
        {"second": (1,), "third": (1, 8), "head": (1, 8)},
    ),
    "depthwise and gate": (separable, images, {"1.expand": (5,)}, {"1.squeeze": (5,), "1.project": (5,)}),
    "gate alone": (separable, images, {"1.excite": (5,)}, {"1.project": (5,)}),
    "attention values": (encoder, sequences, {"layers.0.attention.value": (6,)}, {"layers.0.attention.out": (6,)}),
    "attention queries": (
        encoder,
        sequences,
        {"layers.0.attention.query": (6,)},
        {"layers.0.attention.out": span(4, 8)},
    ),
    "feed-forward": (encoder, sequences, {"layers.1.up": (0, 23)}, {"layers.1.down": (0, 23)}),
    "layer norm": (
        encoder,
        sequences,
        {"layers.1.attention.out": (0,)},
        {"layers.1.up": span(0, 16), "head": span(0, 16)},
    ),
    "into an LSTM": (recurrent, sequences, {"embed": (2,)}, {"lstm": (2,)}),
    "out of an LSTM": (recurrent, sequences, {"lstm": (1, 4)}, {"hidden": (1, 4)}),
    "embedding": (tied, tokens, {"embedding": (3,)}, {"up": (3,), "head": (3,)}),
    "a layer called twice": (reused, vectors, {"shared": (1,)}, {"shared": (1,), "hidden": (1,)}),
    "in place": (InPlace, vectors, {"b": (0,)}, {"c": (0,)}),
    "in place, stream": (InPlace, vectors, {"a": (2,), "c": (2,)}, {"b": (2,), "d": (2,)}),
    "into a transposed convolution": (Transposed, images, {"down": (4,)}, {"up": (4,)}),
    "out of a transposed convolution": (Transposed, images, {"up": (0, 3)}, {"last": (0, 3)}),
}


@pytest.mark.parametrize(("build", "make", "disturbed", "expected"), CASES.values(), ids=CASES)
def test_readers(build, make, disturbed, expected):
    reading = observe_readers(build().eval(), make(4), disturbed)
    assert dict(reading.readers) == expected
    assert not reading.reaches_output


@pytest.mark.parametrize(
    ("build", "make", "layer"),
    [(mlp, vectors, "4"), (residual, images, "head"), (tied, tokens, "head")],
    ids=["mlp", "residual", "tied"],
)
def test_units_of_the_last_layer_reach_the_output(build, make, layer):
    reading = observe_readers(build(), make(4), {layer: (0,)})
    assert reading.reaches_output
    assert dict(reading.readers) == {}


def test_the_layout_of_the_input_changes_nothing():
    """Channels last in memory, as images read from files: a sum in another order would make every channel differ a little."""
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5)
    )
    pixels = np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32)
    reading = observe_readers(model.eval(), Dataset({"input": pixels.transpose(0, 3, 1, 2)}), {"0": (1,)})
    assert dict(reading.readers) == {"4": (1,)}


def test_watched_layers_are_readers_that_let_a_disturbance_through():
    reading = observe_readers(residual().eval(), images(4), {"stem": (2,)}, watched=["bn"])
    assert reading.readers["bn"] == (2,)
    assert reading.readers["layers.0.conv1"] == (2,)


def test_observing_is_seeded_and_leaves_no_trace():
    model, data = residual().train(), images(4)
    random = torch.get_rng_state()
    first, second = (observe_readers(model, data, {"stem": (2,)}, seed=3) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_masking_zeroes_what_a_reader_reads_and_nothing_else():
    model, data = dense(), images(4)
    value = torch.from_numpy(data.inputs["input"])
    a = F.relu(model.first(value))
    b = F.relu(model.second(a))
    wide = torch.cat((a, b), 1)
    wide[:, [1, 7]] = 0
    c = F.relu(model.third(wide))
    expected = model.head(F.relu(model.norm(torch.cat((a, b, c), 1))).mean((2, 3)))
    with torch.no_grad():
        plain_output = model(value)
        with masked(model, {"third": (1, 7)}):
            torch.testing.assert_close(model(value), expected, rtol=0, atol=0)
        assert torch.equal(model(value), plain_output), "the mask is gone after the block"
    assert float((expected - plain_output).detach().abs().max()) > 1e-3


def test_bypassed_blocks_return_their_input():
    model, data = residual(), images(4)
    value = torch.from_numpy(data.inputs["input"])
    with torch.no_grad():
        stem = F.relu(model.bn(model.stem(value)))
        expected = model.head(model.layers[3](model.layers[2](model.layers[0](stem))).mean((2, 3)))
        with masked(model, {}, ("layers.1",)):
            torch.testing.assert_close(model(value), expected, rtol=0, atol=0)


def test_masks_end_with_an_exception():
    model = mlp()
    with pytest.raises(RuntimeError, match="stop"), masked(model, {"2": (0,)}, ("1",)):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Own(nn.Conv2d):
    """A subclass is a convolution too."""


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Linear(3, 2), (2, 3), 1),
        (nn.Linear(3, 2), (2, 5, 3), 2),
        (nn.Conv1d(3, 2, 1), (2, 3, 5), 1),
        (nn.Conv1d(3, 2, 1), (3, 5), 0),
        (nn.Conv2d(3, 2, 1), (2, 3, 5, 5), 1),
        (Own(3, 2, 1), (2, 3, 5, 5), 1),
        (nn.ConvTranspose2d(3, 2, 1), (2, 3, 5, 5), 1),
        (nn.Conv3d(3, 2, 1), (2, 3, 5, 5, 5), 1),
        (nn.BatchNorm1d(3), (2, 3), 1),
        (nn.BatchNorm1d(3), (2, 3, 5), 1),
        (nn.BatchNorm2d(3), (2, 3, 5, 5), 1),
        (nn.Embedding(9, 3), (2, 5, 3), 2),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_channel_dim(layer, shape, expected):
    assert channel_dim(layer, torch.zeros(shape)) == expected
