"""Networks of timm and torchvision by name: `model: {timm: NAME}` and `model: {torchvision: NAME}` of a recipe.

Both are optional; where one cannot be imported the error says why. Weights come from a safetensors file, or for timm from
the hub's `model.safetensors`; torchvision publishes pickles only, which are not read.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from secateurs.errors import ModelError, unknown_name
from secateurs_adapters.models import load_weights

__all__ = ["load_timm", "load_torchvision"]


def load_timm(value: str, *, arguments: Mapping[str, Any], weights: Path | None, folder: Path) -> nn.Module:  # noqa: ARG001
    """Return a network of timm in evaluation mode; implements `secateurs.interfaces.ModelLoader`.

    Args:
        value: a name that `timm.list_models()` has; `name.tag` and `hf-hub:owner/name` too.
        arguments: keyword arguments of `timm.create_model`; `pretrained: true` reads the hub's safetensors, strictly.
        weights: a safetensors file to load strictly.
        folder: the recipe's folder; not used.

    Raises:
        ModelError: timm cannot be imported, it has no such network, or the weights do not fit.
    """
    timm = _imported("timm", "timm")
    if not value.startswith("hf-hub:") and not timm.is_model(value.partition(".")[0]):
        raise ModelError(unknown_name("timm network", value, timm.list_models()))
    chosen = dict(arguments)
    pretrained = chosen.pop("pretrained", False) and weights is None
    network = _built("timm", value, lambda: timm.create_model(value, pretrained=False, **chosen), weights)
    if pretrained:
        load_weights(network, _from_hub(network, value))
    return network


def load_torchvision(value: str, *, arguments: Mapping[str, Any], weights: Path | None, folder: Path) -> nn.Module:  # noqa: ARG001
    """Return a network of torchvision in evaluation mode; implements `secateurs.interfaces.ModelLoader`.

    Args:
        value: a name that `torchvision.models.list_models()` has.
        arguments: keyword arguments of `torchvision.models.get_model`, without `weights`: those are pickles.
        weights: a safetensors file to load strictly.
        folder: the recipe's folder; not used.

    Raises:
        ModelError: torchvision cannot be imported, it has no such network, or the weights do not fit.
    """
    models = _imported("torchvision.models", "torchvision")
    if arguments.get("weights") is not None:
        raise ModelError(
            f"torchvision's weights {arguments['weights']!r} are pickles, which are not read; convert them once with "
            f"`safetensors.torch.save_file` and name the file in `weights`."
        )
    if value not in models.list_models():
        raise ModelError(unknown_name("torchvision network", value, models.list_models()))
    return _built("torchvision", value, lambda: models.get_model(value, weights=None, **arguments), weights)


def _from_hub(network: Any, value: str) -> Path:
    """Return the safetensors file of a network on the hub; timm itself would take a pickle where there is none."""
    from huggingface_hub import hf_hub_download

    repository = network.pretrained_cfg.get("hf_hub_id")
    try:
        return Path(hf_hub_download(repository, "model.safetensors"))
    except Exception as error:  # no repository, no access, or no such file
        raise ModelError(
            f"there are no safetensors of the timm network {value!r} at {repository!r} on the hub ({type(error).__name__}: "
            f"{error}); name a tag that has weights, or give a file in `weights`."
        ) from error


def _imported(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # torchvision of another torch raises RuntimeError at import
        raise ModelError(
            f"`model: {{{package}: ...}}` needs {package}, which cannot be imported ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no reason given'}); install a {package} that was built for "
            f"this torch (`pip install {package}`; both from one package index), or use `factory` or `hf`."
        ) from error


def _built(package: str, value: str, build: Callable[[], Any], weights: Path | None) -> nn.Module:
    try:
        network = build()
    except Exception as error:
        raise ModelError(f"{package} cannot build {value!r}: {type(error).__name__}: {error}.") from error
    assert isinstance(network, nn.Module)
    if weights is not None:
        load_weights(network, weights)
    return network.eval()
