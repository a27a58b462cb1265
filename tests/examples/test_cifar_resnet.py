"""Our CIFAR ResNet against published weights and the counts that they reach on real images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from secateurs.errors import ModelError
from secateurs_adapters.datasets import NpzSettings, load_npz
from secateurs_adapters.models import load_factory

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
NORMALISE = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def build(weights=None, **arguments):
    return load_factory("cifar_resnet:build", arguments=arguments, weights=weights, folder=ROOT / "examples")


@pytest.mark.parametrize(("depth", "right"), [(20, 915), (32, 928), (56, 926)])
def test_published_weights_reach_their_counts(depth, right):
    weights, images = DATA / f"weights_resnet{depth}_cifar10.safetensors", DATA / "cifar10_lossless_test1k.npz"
    for file in (weights, images):
        if not file.is_file():
            pytest.skip(f"needs {file.name}, which is not in {DATA}")
    data = load_npz(NpzSettings(file=images, normalise=NORMALISE))
    network = build(weights, depth=depth)
    with torch.inference_mode():
        hits = [
            (network(torch.from_numpy(batch.inputs["input"])).argmax(1).numpy() == batch.labels).sum()
            for batch in data.batches(250)
        ]
    assert sum(hits) == right


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154), (56, 853_018), (110, 1_727_962)])
def test_parameters(depth, parameters):
    """The counts of akamaster/pytorch_resnet_cifar10, which are those of the paper with option A."""
    assert sum(parameter.numel() for parameter in build(depth=depth).parameters()) == parameters


@pytest.mark.parametrize("depth", [0, 2, 18, 21, -4])
def test_depths(depth):
    with pytest.raises(ModelError, match=r"`depth` must be 6n \+ 2 with n >= 1"):
        build(depth=depth)


def test_option_a_shortcut_against_a_loop():
    shortcut = build(depth=8).layer2[0].shortcut
    images = torch.randn(2, 16, 6, 6)
    expected = torch.zeros(2, 32, 3, 3)
    for channel in range(16):
        for row in range(3):
            for column in range(3):
                expected[:, channel + 8, row, column] = images[:, channel, 2 * row, 2 * column]
    assert torch.equal(shortcut(images), expected)
    assert torch.equal(shortcut(images)[:, 8:24], functional.max_pool2d(images, 1, stride=2))
