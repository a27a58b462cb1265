"""A key changes with everything that determines a result, and with nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from secateurs.recipe import load_recipe
from secateurs_adapters.zoo import keys

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Return a function that reads a recipe whose weights, data and factory lie in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"weights")
    (tmp_path / "train.npz").write_bytes(b"data")
    (tmp_path / "net.py").write_text("from parts import layer\n")
    (tmp_path / "parts.py").write_text("layer = 1\n")
    (tmp_path / "unrelated.py").write_text("x = 1\n")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "a.json").write_text("{}")
    (tmp_path / "recipe.yaml").write_text(
        "model: {factory: net:build, weights: weights.safetensors, arguments: {folder: config}}\n"
        "data: {calibration: {source: npz, file: train.npz}}\npasses: [{magnitude: {target_units: 0.5}}]\n"
    )
    return lambda *overrides: load_recipe(tmp_path / "recipe.yaml", overrides)


def test_the_same_has_the_same_key(recipe, tmp_path):
    first = keys.result_key(recipe(), "e")
    (tmp_path / "unrelated.py").write_text("x = 2\n")
    (tmp_path / "recipe.yaml").write_text("# a comment\n" + (tmp_path / "recipe.yaml").read_text())
    assert keys.result_key(recipe(), "e") == first
    assert len(first) == 32


@pytest.mark.parametrize("name", ["weights.safetensors", "train.npz", "net.py", "parts.py", "config/a.json"])
def test_every_file_that_a_recipe_reads_is_in_the_key(recipe, tmp_path, name):
    first = keys.result_key(recipe(), "e")
    file = tmp_path / name
    file.write_bytes(bytes(file.read_bytes()[:-1]) + b"!")  # the same length
    assert keys.result_key(recipe(), "e") != first


@pytest.mark.parametrize(
    "override", ["seed=1", "targets=[{provider: CUDAExecutionProvider}]", "budget={macs_ratio: 1}"]
)
def test_every_key_of_a_recipe_is_in_the_key(recipe, override):
    assert keys.result_key(recipe(override), "e") != keys.result_key(recipe(), "e")


def test_code_and_libraries_are_in_the_key(recipe):
    assert keys.result_key(recipe(), "one") != keys.result_key(recipe(), "other")


def test_the_versions_of_the_libraries_are_those_installed():
    import numpy as np
    import torch

    versions = keys.library_versions()
    assert versions["torch"] in (
        torch.__version__,
        torch.__version__.partition("+")[0],
    )  # wheels may leave their build out
    assert versions["numpy"] == np.__version__
    assert "ruff" not in versions


def test_the_code_is_that_of_both_packages(tmp_path, monkeypatch):
    for source in ("plugin", "adapters"):
        shutil.copytree(ROOT / source, tmp_path / source, ignore=shutil.ignore_patterns("__pycache__"))
    before = keys.code_digest()
    for source, package in (("plugin", "secateurs"), ("adapters", "secateurs_adapters")):
        file = tmp_path / source / package / "__init__.py"
        monkeypatch.setattr(keys.importlib.util, "find_spec", _spec_in(tmp_path))
        same = keys.code_digest()
        text = file.read_text()
        file.write_text(text + "# changed\n")
        assert keys.code_digest() != same
        file.write_text(text)
        monkeypatch.undo()
    assert keys.code_digest() == before


def _spec_in(folder):
    from importlib.machinery import PathFinder

    places = [str(folder / "plugin"), str(folder / "adapters")]
    return lambda name: PathFinder.find_spec(name, places)
