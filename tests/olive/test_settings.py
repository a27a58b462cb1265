"""What Olive's own machinery makes of our settings: defaults, search values, cache keys, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("olive")
pytestmark = pytest.mark.filterwarnings("ignore")

from olive.cache import OliveCache  # noqa: E402
from olive.hardware import DEFAULT_CPU_ACCELERATOR as CPU  # noqa: E402
from olive.package_config import OlivePackageConfig  # noqa: E402
from olive.passes import Pass  # noqa: E402

from secateurs.settings import MiNodesSettings  # noqa: E402
from secateurs_adapters.olive_pass import (  # noqa: E402
    PassError,
    SecateursCkaCluster,
    SecateursCkaSegment,
    SecateursMiNodes,
    SecateursRecipe,
)
from secateurs_adapters.olive_workflow import package_config, write_package_config  # noqa: E402

DIGITS = {"calibration": {"source": "digits", "split": "train"}}


def fixed(kind, **settings):
    """Return the configuration that Olive makes of settings where it does not search."""
    return kind.generate_config(CPU, settings, {}, True)


def searched(kind, **settings):
    """Return what Olive's search would try, by setting."""
    _, _, params = kind.get_config_params(CPU, settings, False)
    return {name: param.get_support() for name, param in params.items()}


def key(kind, **settings):
    """Return the name under which Olive caches the result of a pass."""
    config = fixed(kind, **settings).to_json()
    return OliveCache.get_output_model_id(OliveCache, kind.__name__, config, "input")


@pytest.mark.parametrize("kind", [SecateursCkaCluster, SecateursCkaSegment, SecateursMiNodes, SecateursRecipe])
def test_olive_finds_the_pass_beside_its_own(kind):
    package = OlivePackageConfig.parse_file_or_obj(package_config())
    assert package.import_pass_module(kind.__name__.lower()) is kind
    assert issubclass(kind, Pass)
    assert package.import_pass_module("onnxconversion").__name__ == "OnnxConversion"


def test_the_written_package_config_is_read_by_olive(tmp_path):
    write_package_config(tmp_path / "package.json")
    package = OlivePackageConfig.parse_file_or_obj(tmp_path / "package.json")
    original = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text())
    assert set(package.passes) - {name.lower() for name in original["passes"]} == {
        "secateursckacluster",
        "secateursckasegment",
        "secateursminodes",
        "secateursrecipe",
    }


def test_settings_carry_our_defaults_and_descriptions():
    params = SecateursMiNodes.default_config(CPU)
    for name, field in MiNodesSettings.model_fields.items():
        assert params[name].default_value == field.default
        assert params[name].description == field.description
    assert fixed(SecateursMiNodes, target_macs=0.5, data=DIGITS).criteria == MiNodesSettings().criteria


def test_a_search_tries_values_unless_the_user_chose_another_target():
    assert searched(SecateursMiNodes, data=DIGITS) == {"target_macs": [0.75, 0.5, 0.25]}
    assert searched(SecateursMiNodes, data=DIGITS, target_units=0.5) == {}
    assert searched(SecateursMiNodes, data=DIGITS, target_macs=[0.6, 0.4]) == {"target_macs": [0.6, 0.4]}
    assert searched(SecateursCkaSegment, data=DIGITS, target_macs=0.6) == {}
    assert searched(SecateursCkaSegment, data=DIGITS) == {"blocks": [1, 2, 3]}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_mac": 0.5}, "Did you mean 'target_macs'"),
        ({"target_macs": 0.0}, "greater than 0"),
        ({"target_macs": [0.5, 1.5]}, "less than or equal to 1"),
        ({"estimator": "guess"}, "'gaussian'"),
    ],
)
def test_an_unknown_setting_or_value_is_an_error(settings, words):
    with pytest.raises(PassError, match=words) as caught:
        SecateursMiNodes.get_config_params(CPU, {"data": DIGITS, **settings}, False)
    assert isinstance(caught.value, ValueError)  # the kind that Olive lets through
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (SecateursMiNodes, {"target_macs": 0.5}, "no calibration data"),
        (SecateursMiNodes, {"data": DIGITS}, "give one of target_macs"),
        (SecateursCkaSegment, {"data": DIGITS, "blocks": 1, "target_macs": 0.5}, "blocks"),
        (SecateursMiNodes, {"target_macs": 0.5, "data": {"calibration": {"source": "digit"}}}, "'digits'"),
        (SecateursMiNodes, {"target_macs": 0.5, "data": {"calibration": {"source": "digits", "part": 1}}}, "part"),
        (SecateursMiNodes, {"target_macs": 0.5, "data": DIGITS, "metric": "accurcy"}, "'accuracy'"),
        (SecateursMiNodes, {"target_macs": 0.5, "data": DIGITS, "recovery": {"epoch": 1}}, "'epochs'"),
        (SecateursRecipe, {}, "`recipe` is missing"),
        (SecateursRecipe, {"recipe": {"data": DIGITS, "passes": ["mi-node"]}}, "'mi-nodes'"),
    ],
)
def test_settings_that_cannot_work_are_an_error_and_no_warning(kind, settings, words):
    with pytest.raises(PassError, match=words):
        kind.validate_config(fixed(kind, **settings), CPU)


def test_the_cache_key_knows_settings_code_and_files(tmp_path, monkeypatch):
    file = tmp_path / "images.npz"
    file.write_bytes(b"first")
    settings = {"target_macs": 0.5, "data": {"calibration": {"source": "npz", "file": str(file)}}}
    first = key(SecateursMiNodes, **settings)
    assert key(SecateursMiNodes, **settings) == first
    assert key(SecateursMiNodes, **{**settings, "target_macs": 0.6}) != first
    assert key(SecateursMiNodes, **settings, algorithm_version="next") != first
    file.write_bytes(b"second")
    assert key(SecateursMiNodes, **settings) != first
    file.write_bytes(b"first")
    assert key(SecateursMiNodes, **settings) == first
    monkeypatch.setattr("secateurs_adapters.olive_pass.algorithm_version", lambda: "other code")
    assert key(SecateursMiNodes, **settings) != first


def test_the_cache_key_of_a_recipe_knows_its_text(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    text = "model: {factory: 'net:build'}\ndata: {calibration: {source: digits}}\npasses: [{mi-nodes: {target_macs: 0.5}}]\n"
    recipe.write_text(text)
    first = key(SecateursRecipe, recipe=str(recipe))
    assert key(SecateursRecipe, recipe=str(recipe), overrides=["passes.mi-nodes.target_macs=0.7"]) != first
    recipe.write_text("# a remark\n" + text)
    assert key(SecateursRecipe, recipe=str(recipe)) == first
    recipe.write_text(text.replace("0.5", "0.6"))
    assert key(SecateursRecipe, recipe=str(recipe)) != first
