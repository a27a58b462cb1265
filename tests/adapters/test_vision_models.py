"""Loaders of timm and torchvision: networks by name where the packages import, and an error that says why not elsewhere."""

from __future__ import annotations

import importlib

import pytest
import torch
from safetensors.torch import save_file

from secateurs.errors import ModelError
from secateurs_adapters.vision_models import load_timm, load_torchvision

LOADERS = {"timm": load_timm, "torchvision": load_torchvision}


def reason(package):
    try:
        importlib.import_module("torchvision.models" if package == "torchvision" else package)
    except Exception as error:  # torchvision of another torch raises RuntimeError
        return f"{type(error).__name__}: {error}"
    return None


def load(package, name, folder, weights=None, **arguments):
    return LOADERS[package](name, arguments=arguments, weights=weights, folder=folder)


@pytest.mark.parametrize("package", LOADERS)
def test_a_package_that_cannot_be_imported_is_named_with_the_reason(package, tmp_path):
    why = reason(package)
    if why is None:
        pytest.skip(f"{package} can be imported here")
    with pytest.raises(ModelError, match=f"needs {package}, which cannot be imported") as caught:
        load(package, "resnet18", tmp_path)
    assert why.splitlines()[0][:30] in str(caught.value)
    assert "or use `factory` or `hf`" in str(caught.value)


@pytest.mark.parametrize("package", LOADERS)
def test_a_network_by_name(package, tmp_path):
    if (why := reason(package)) is not None:
        pytest.skip(f"{package} cannot be imported here ({why})")
    model = load(package, "resnet18", tmp_path, num_classes=3)
    assert not model.training
    with torch.no_grad():
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 3)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "w.safetensors")
    again = load(package, "resnet18", tmp_path, weights=tmp_path / "w.safetensors", num_classes=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(ModelError, match=r"unknown .* network 'resnet81'.*resnet18"):
        load(package, "resnet81", tmp_path)
    with pytest.raises(ModelError, match="cannot build 'resnet18'"):
        load(package, "resnet18", tmp_path, no_such_argument=1)


def test_weights_that_are_pickles_are_refused(tmp_path):
    if (why := reason("torchvision")) is not None:
        pytest.skip(f"torchvision cannot be imported here ({why})")
    with pytest.raises(ModelError, match="are pickles"):
        load_torchvision("resnet18", arguments={"weights": "DEFAULT"}, weights=None, folder=tmp_path)
