"""Zoos of trivial models: what a zoo costs beside its models' own work shows best where they have next to none.

The target of their recipes is a plugin that measures nothing but the files' sizes, which the report has anyway.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
RECIPE = HERE / "trivial.yaml"


def environment_with_plugin(folder: Path) -> dict[str, str]:
    """Install the plugin into a folder, and return the environment in which child processes find it."""
    (folder / "secateurs_sizes.py").write_text((HERE / "secateurs_sizes.py").read_text())
    metadata = folder / "secateurs_sizes-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: secateurs-sizes\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[secateurs]\nsecateurs-sizes = secateurs_sizes\n")
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH", ""))))
    return {**os.environ, "PYTHONPATH": path}


def write(path: Path, count: int, **limits: Any) -> Path:
    """Write a zoo of so many models that differ in their seeds."""
    entries: list[Mapping[str, Any]] = [
        {"name": f"model{number}", "set": {"seed": number, "variables.name": f"model{number}"}}
        for number in range(count)
    ]
    defaults = {"recipe": str(RECIPE), **limits}
    path.write_text(yaml.safe_dump({"schema": 1, "defaults": defaults, "entries": entries}))
    return path
