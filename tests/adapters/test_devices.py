"""The packaged device profiles, and the way from a recipe or a budget file to their limits."""

import json
from pathlib import Path
from urllib.parse import urlparse

import pytest
import typer
import yaml
from typer.testing import CliRunner

from secateurs.errors import RecipeError
from secateurs.manager import create_manager
from secateurs.recipe import load_recipe
from secateurs.runner import prepare
from secateurs_adapters.commands import devices, load_budget
from secateurs_adapters.devices import load_devices

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples" / "quickstart.yaml"


def test_a_dozen_devices_with_the_source_of_each_figure():
    known = load_devices()
    assert len({device.title.split(",")[0] for device in known.values()}) >= 12
    providers = {entry.name for entry in create_manager().registries.targets}
    for name, device in known.items():
        assert name == name.lower()
        assert device.provider in providers
        assert all(urlparse(page).scheme == "https" for page in device.sources.values())
    # What the vendors' pages say of three of them.
    assert (known["raspberry-pi-zero-2-w"].ram_mib, known["raspberry-pi-4"].cores) == (512, 4)
    assert known["iphone-15"].ram_mib is None


def test_the_resolved_recipe_holds_what_the_device_stands_for(tmp_path):
    recipe = load_recipe(QUICKSTART, ["budget={device: raspberry-pi-zero-2-w, accuracy_drop: 0.02}", "targets=[{}]"])
    prepared = prepare(recipe, create_manager())
    resolved = yaml.safe_load(prepared.recipe.to_yaml())
    assert resolved["budget"] == {
        "device": "raspberry-pi-zero-2-w",
        "memory_share": 0.25,
        "accuracy_drop": 0.02,
        "peak_memory_mib": 128,
    }
    assert (resolved["targets"][0]["threads"], resolved["targets"][0]["provider"]) == (4, "CPUExecutionProvider")
    assert prepared.targets[0][1].threads == 4
    (tmp_path / "recipe.yaml").write_text(prepared.recipe.to_yaml())
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again.digest() == prepare(again, create_manager()).recipe.digest() == prepared.recipe.digest()


def test_an_unknown_device_in_a_recipe():
    with pytest.raises(RecipeError, match="Did you mean 'raspberry-pi-4'"):
        prepare(load_recipe(QUICKSTART, ["budget={device: rasberry-pi-4}"]), create_manager())


def test_a_budget_file_may_name_a_device(tmp_path):
    file = tmp_path / "budget.yaml"
    file.write_text("device: beagleplay\nmemory_share: 0.5\n")
    assert load_budget(file).peak_memory_mib == 1024


def test_the_list(monkeypatch):
    app = typer.Typer()
    app.command()(devices)
    monkeypatch.setenv("COLUMNS", "80")
    table = CliRunner().invoke(app, []).stdout
    assert "raspberry-pi-4" in table
    assert "CoreML" in table
    listed = {row["name"]: row for row in json.loads(CliRunner().invoke(app, ["--json"]).stdout)}
    assert set(listed) == set(load_devices())
    assert listed["beagleplay"]["ram_mib"] == 2048
    assert listed["beagleplay"]["sources"]["ram_mib"].startswith("https://")
    assert not any("latency" in key for row in listed.values() for key in row)
