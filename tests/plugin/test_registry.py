"""Registries: collisions show both parties, unknown names the nearest one, and references are imported late."""

import collections
import inspect
import sys
from pathlib import Path

import pytest

from secateurs import hookspecs
from secateurs.errors import PluginError, RecipeError
from secateurs.registry import Registrar, Registry


@pytest.fixture
def registry():
    found = Registry("pass")
    found.register("mi-nodes", "collections:OrderedDict", plugin="built-in", summary="information")
    found.register("cka-cluster", dict, plugin="built-in", settings=int)
    return found


def test_entries_are_found_listed_and_counted(registry):
    assert registry["mi-nodes"].summary == "information"
    assert registry["mi-nodes"].plugin == "built-in"
    assert [entry.name for entry in registry] == ["cka-cluster", "mi-nodes"]
    assert len(registry) == 2
    assert "mi-nodes" in registry
    assert "nodes" not in registry


def test_references_are_imported_and_objects_are_themselves(registry):
    assert registry["mi-nodes"].load() is collections.OrderedDict
    assert registry["cka-cluster"].load() is dict
    assert registry["cka-cluster"].load_settings() is int
    assert registry["mi-nodes"].load_settings() is None


def test_make_returns_instances_of_classes_and_other_objects_as_they_are(registry):
    assert registry["mi-nodes"].make() == collections.OrderedDict()
    value = ("an", "object")
    registry.register("object", value, plugin="x")
    assert registry["object"].make() is value


def test_nothing_is_imported_before_it_is_used(registry, tmp_path, monkeypatch):
    (tmp_path / "late_module_of_a_plugin.py").write_text("VALUE = 42\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry.register("late", "late_module_of_a_plugin:VALUE", plugin="p")
    assert "late_module_of_a_plugin" not in sys.modules
    assert registry["late"].load() == 42


def test_a_collision_shows_both_plugins_and_targets(registry):
    with pytest.raises(PluginError) as caught:
        registry.register("mi-nodes", "other.module:Pass", plugin="rival")
    message = str(caught.value)
    assert all(part in message for part in ("pass 'mi-nodes'", "'built-in'", "collections:OrderedDict", "'rival'"))
    assert "other.module:Pass" in message
    assert registry["mi-nodes"].plugin == "built-in", "the first one stays"


@pytest.mark.parametrize(
    ("name", "suggestion"), [("mi-node", "mi-nodes"), ("mi_nodes", "mi-nodes"), ("cka-clusters", "cka-cluster")]
)
def test_an_unknown_name_suggests_the_nearest(registry, name, suggestion):
    with pytest.raises(RecipeError, match=f"unknown pass '{name}'. Did you mean '{suggestion}'"):
        registry[name]


def test_a_name_like_no_other_lists_what_there_is(registry):
    with pytest.raises(RecipeError) as caught:
        registry["zzz"]
    assert "Did you mean" not in str(caught.value)
    assert "Known: 'cka-cluster', 'mi-nodes'." in str(caught.value)
    with pytest.raises(RecipeError, match="Known: none"):
        Registry("metric")["accuracy"]


@pytest.mark.parametrize(
    "target", ["no_such_module_at_all:Thing", "collections:NoSuchThing", "collections"], ids=["module", "name", "form"]
)
def test_a_reference_that_cannot_be_imported_names_the_plugin(registry, target):
    registry.register("broken", target, plugin="stranger")
    with pytest.raises(PluginError, match="'broken' of plugin 'stranger' cannot be imported from") as caught:
        registry["broken"].load()
    assert target in str(caught.value)


def test_a_registrar_speaks_for_one_plugin():
    registry = Registry("metric")
    Registrar(registry, "mine")("accuracy", "collections:Counter", summary="share of hits", settings="builtins:dict")
    entry = registry["accuracy"]
    assert (entry.plugin, entry.summary, entry.load_settings()) == ("mine", "share of hits", dict)


def test_the_hooks_are_documented_as_they_are():
    page = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text()
    told = [line for line in page.splitlines() if line.startswith("* `secateurs_")]
    real = {name: hook for name, hook in vars(hookspecs).items() if name.startswith("secateurs_")}
    assert told == [f"* `{name}{inspect.signature(hook)}`".replace("'", "") for name, hook in real.items()]
    for hook in real.values():
        assert inspect.getdoc(hook).splitlines()[0] in page
