"""Secateurs prunes trained PyTorch networks so that they fit a device, and proves it on the ONNX file that ships.

`import secateurs` is light: torch is imported when a function that needs it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from secateurs.checkpoint import load
    from secateurs.manager import create_manager
    from secateurs.plan import Plan
    from secateurs.script import PruneResult, prune

hookimpl = pluggy.HookimplMarker("secateurs")
"""Marks a plugin's functions as implementations of `secateurs.hookspecs`."""

_LAZY = {
    "Plan": "secateurs.plan",
    "PruneResult": "secateurs.script",
    "create_manager": "secateurs.manager",
    "load": "secateurs.checkpoint",
    "prune": "secateurs.script",
}

__all__ = ["Plan", "PruneResult", "create_manager", "hookimpl", "load", "prune"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'secateurs' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
