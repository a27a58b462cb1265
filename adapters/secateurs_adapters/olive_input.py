"""What an Olive pass works on, as a recipe sees it: the network and Olive's data configs behind names of our registries."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from olive.common.config_utils import validate_config
from olive.data.config import DataConfig
from torch import nn

import secateurs
import secateurs_adapters
from secateurs import hookimpl
from secateurs.data import Dataset
from secateurs.forward import gathered
from secateurs.manager import GROUP, Manager, create_manager
from secateurs.settings import PassSettings

if TYPE_CHECKING:
    from secateurs.interfaces import DatasetLoader, ModelLoader
    from secateurs.registry import Registrar

__all__ = ["LOADER", "OliveDataSettings", "algorithm_version", "fingerprint", "manager_for"]

LOADER = "olive"
"""The name of the model loader and of the data source that stand for Olive's."""
_DECIDING = ("torch", "torch-pruning", "numpy")
"""Libraries whose version may change a result."""


class OliveDataSettings(PassSettings):
    """Options of the data source `olive`."""

    role: Literal["calibration", "training", "validation"]


@dataclass(frozen=True)
class _Inputs:
    """Registers a network and data configs; a plugin like any other.

    Attributes:
        network: what the model loader `olive` returns.
        data: Olive's data config of each role.
    """

    network: nn.Module
    data: Mapping[str, Any]

    @hookimpl
    def secateurs_register_models(self, register: Registrar[ModelLoader]) -> None:
        """Register the network."""
        register(LOADER, lambda value, **_: self.network, summary="the network that Olive hands over")  # noqa: ARG005

    @hookimpl
    def secateurs_register_datasets(self, register: Registrar[DatasetLoader]) -> None:
        """Register the data configs."""
        register(LOADER, self._load, summary="Olive's data configs", settings=OliveDataSettings)

    def _load(self, settings: OliveDataSettings) -> Dataset:
        config = validate_config(self.data[settings.role], DataConfig)
        return gathered(config.to_data_container().create_dataloader(), f"olive:{config.name}:{settings.role}")


def manager_for(network: nn.Module, data: Mapping[str, Any]) -> Manager:
    """Return the plugins' manager, with the network and the data configs of an Olive pass among the registered names."""
    manager = create_manager()
    manager.adopt(_Inputs(network, data), "olive-input")
    return manager


# --- what determines a result, for Olive's cache ----------------------------------------------------------------------------------------


@cache
def algorithm_version() -> str:
    """Return the version of Secateurs with a hash of its code and of what it computes with.

    A result of other code is then never taken for this one's.
    """
    hashed = hashlib.sha256(" ".join(importlib.metadata.version(name) for name in _DECIDING).encode())
    for package in (secateurs, secateurs_adapters):
        home = Path(str(package.__file__)).parent
        for path in sorted(home.rglob("*.py")):
            hashed.update(path.relative_to(home).as_posix().encode() + path.read_bytes())
    return f"{importlib.metadata.version('secateurs')}+{hashed.hexdigest()[:12]}"


def fingerprint(values: Any, more: str = "") -> str:
    """Return a hash of settings, of the files and folders that they name, and of the plugins that are installed.

    A file counts by its content, a folder by the names, sizes and times of the files in it.

    Args:
        values: nested mappings and lists.
        more: hashed too.
    """
    hashed = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode() + more.encode())
    for path in sorted({Path(text).resolve() for text in _texts(values) if _exists(text)}):
        hashed.update(str(path).encode())
        if path.is_file():
            hashed.update(path.read_bytes())
            continue
        for inner in sorted(path.rglob("*")):
            status = inner.stat()
            hashed.update(f"{inner.relative_to(path)} {status.st_size} {status.st_mtime_ns}".encode())
    plugins = {
        f"{entry.dist.name} {entry.dist.version}"
        for entry in importlib.metadata.entry_points(group=GROUP)
        if entry.dist is not None
    }
    hashed.update(" ".join(sorted(plugins)).encode())
    return hashed.hexdigest()[:16]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, (str, Path)):
        yield str(value)


def _exists(text: str) -> bool:
    """Tell whether a text is the path of something; a bare word such as `train` is a name, even where a folder has it too."""
    try:
        return bool(Path(text).suffix or set(text) & set("/\\")) and Path(text).exists()
    except (OSError, ValueError):  # a text that no path can be
        return False
