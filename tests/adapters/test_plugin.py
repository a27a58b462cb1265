"""The adapters' entry point: it is light, and everything that it registers exists."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import BaseModel

from secateurs import hookspecs
from secateurs.registry import Registrar, Registry
from secateurs_adapters import plugin

KINDS = ("models", "datasets", "exporters", "converters", "targets", "metrics", "cost_models", "devices", "commands")


def registered(kind: str) -> Registry:
    registry = Registry(kind)
    getattr(plugin, f"secateurs_register_{kind}")(Registrar(registry, "secateurs-adapters"))
    return registry


def test_every_hook_exists():
    hooks = [name for name in vars(plugin) if name.startswith("secateurs_register_")]
    assert sorted(hooks) == sorted(f"secateurs_register_{kind}" for kind in KINDS)
    assert all(hasattr(hookspecs, name) for name in hooks)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_can_be_imported(kind):
    for entry in registered(kind):
        assert callable(entry.load()) or kind in ("metrics", "cost_models", "devices")
        assert entry.summary
        if kind == "datasets":
            assert issubclass(entry.load_settings(), BaseModel)


def test_metrics_are_registered_under_their_names():
    assert {entry.name: entry.make().name for entry in registered("metrics")} == {
        name: name for name in ("accuracy", "top5-accuracy", "f1-macro", *plugin.VALUE_METRICS)
    }


def test_the_entry_point_is_light():
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; import secateurs_adapters.plugin; "
        "print([name for name in ('torch', 'onnxruntime', 'onnx', 'sklearn', 'PIL', 'transformers') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
