"""The device profiles that come with the adapters: data in `devices.toml`, each figure with its source."""

from __future__ import annotations

import importlib.resources
import tomllib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from secateurs.devices import Device

__all__ = ["load_devices"]


def load_devices() -> dict[str, Device]:
    """Return every packaged profile by its name."""
    from secateurs.devices import Device

    text = importlib.resources.files("secateurs_adapters").joinpath("devices.toml").read_text(encoding="utf-8")
    return {name: Device.model_validate(profile) for name, profile in tomllib.loads(text).items()}
