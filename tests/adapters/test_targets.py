"""Targets for latency and peak memory, from the option to the profile of the exported file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import secateurs
from secateurs.errors import RecipeError
from secateurs.forward import to_dataset
from secateurs.settings import TargetSettings
from secateurs_adapters.datasets import NpzSettings, load_npz
from secateurs_adapters.export import dynamo
from secateurs_adapters.memory import profile_memory
from secateurs_adapters.models import load_factory

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
NORMALISE = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
QUICK = {"criteria": ["magnitude"], "refit": "none", "grid": 4, "held_out": 16}


class Network(nn.Module):
    """A residual stream of 64 channels on a large map, where the peak is, and a wide layer behind it, where it is not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.inner, self.outer = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
        self.last, self.head = nn.Conv2d(64, 96, 3, stride=2), nn.Linear(96, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.outer(F.relu(self.inner(x))))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, 3, 16, 16, generator=generator) for _ in range(4)]


def network():
    torch.manual_seed(0)
    return Network().eval()


def profiled(model, example, path):
    dynamo(model, example, path, opset=20)
    return profile_memory(path, TargetSettings())


def prune(**options):
    model, data = network(), batches()
    return model, secateurs.prune(model, data[0], data, passes=[{"mi-nodes": {**QUICK, **options}}])


@pytest.mark.parametrize("allocation", ["measured", "uniform"])
def test_a_target_for_peak_memory_is_kept_by_the_exported_file(tmp_path, allocation):
    model, result = prune(target_peak_memory=0.6, allocation=allocation)
    [record] = result.report.passes
    assert result.report.verdict == "pass"
    assert record.certificate.max_abs <= 1e-4 * record.certificate.scale
    example = to_dataset(batches()[0])
    before, after = (profiled(net, example, tmp_path / f"{n}.onnx") for n, net in enumerate((model, result.model)))
    assert after <= 0.6 * before
    widths = {name: getattr(result.model, name).out_channels for name in ("stem", "inner", "last")}
    assert all(width % 16 == 0 for width in widths.values())
    assert "blocks of 16 channels" in record.details["rounding"] or "any number" in record.details["rounding"]
    if allocation == "measured":
        assert widths["last"] == 96, "what is not alive at the peak keeps its units"


def test_a_target_for_latency_is_kept_by_the_cost_model():
    _, result = prune(target_latency=0.6)
    assert result.report.verdict == "pass"
    assert result.report.ratios.macs < 0.9


def test_rounding_that_is_given_is_kept():
    _, result = prune(target_peak_memory=0.8, round_to=24)
    assert {result.model.stem.out_channels, result.model.inner.out_channels} <= {24, 48, 64}
    assert result.report.passes[0].details["rounding"] == "multiples of 24: as given"


def test_a_target_that_cannot_be_reached_says_what_is_left():
    _, result = prune(target_peak_memory=0.01)
    assert result.report.verdict == "fail"
    assert any("`target_peak_memory` 0.01 was not reached" in reason for reason in result.report.reasons)


def test_one_target_only():
    with pytest.raises(RecipeError, match=r"exactly one of .*`target_peak_memory`"):
        prune(target_peak_memory=0.5, target_latency=0.5)


@pytest.mark.long
def test_a_fifth_of_resnet20s_peak_goes_by_a_certified_plan(tmp_path):
    files = [DATA / name for name in ("weights_resnet20_cifar10.safetensors", "cifar10_lossless_train4k.npz")]
    for file in files:
        if not file.is_file():
            pytest.skip(f"needs {file.name}, which is not in {DATA}")
    model = load_factory("cifar_resnet:build", arguments={"depth": 20}, weights=None, folder=ROOT / "examples")
    model.load_state_dict(load_file(files[0]))
    data = load_npz(NpzSettings(file=files[1], normalise=NORMALISE)).take(np.arange(256))
    images = torch.from_numpy(np.ascontiguousarray(data.inputs["input"]))
    options = {**QUICK, "grid": 8, "held_out": 64, "target_peak_memory": 0.8}
    result = secateurs.prune(model, images[:4], images.split(64), passes=[{"mi-nodes": options}])
    assert result.report.verdict == "pass"
    assert result.report.passes[0].certificate.max_abs <= 1e-4 * result.report.passes[0].certificate.scale
    example = to_dataset(images[:4])
    before, after = (profiled(net, example, tmp_path / f"{n}.onnx") for n, net in enumerate((model, result.model)))
    assert after <= 0.8 * before
