"""ZOO.yaml: entries, defaults, the matrix, and what is wrong with one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from secateurs.errors import RecipeError
from secateurs.manager import create_manager
from secateurs_adapters.zoo.spec import load_zoo, parse_zoo

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "examples/quickstart.yaml"


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_an_entry_takes_what_it_does_not_say_from_the_defaults():
    data = {
        "defaults": {"recipe": RECIPE, "timeout": 60, "memory_mib": 512, "set": {"seed": 3, "recovery.epochs": 1}},
        "entries": [{}, {"name": "other", "timeout": 5, "retries": 0, "set": {"seed": 4}}],
    }
    first, second = parse_zoo(data)
    assert (first.name, first.limits.timeout, first.limits.memory_mib, first.limits.retries) == (
        "quickstart",
        60,
        512,
        1,
    )
    assert (second.name, second.limits.timeout, second.limits.retries) == ("other", 5, 0)
    assert (first.recipe.seed, second.recipe.seed) == (3, 4)
    assert first.recipe.recovery.epochs == second.recipe.recovery.epochs == 1


def test_a_matrix_is_the_product_of_its_axes_and_the_later_axis_wins():
    data = {
        "defaults": {"recipe": RECIPE},
        "matrix": {
            "models": {"a": {"set": {"seed": 1}}, "b": {"set": {"seed": 2}, "timeout": 7}},
            "recipes": {"half": {"set": {"passes.mi-nodes.target_macs": 0.5}}, "third": {"set": {"seed": 9}}},
            "targets": {"one": None, "two": {"set": {"targets": [{"threads": 2}]}}},
        },
    }
    entries = {entry.name: entry for entry in parse_zoo(data)}
    assert list(entries) == [f"{m}-{r}-{t}" for m in "ab" for r in ("half", "third") for t in ("one", "two")]
    assert [entries[f"{m}-half-one"].recipe.seed for m in "ab"] == [1, 2]
    assert [entries[f"{m}-third-one"].recipe.seed for m in "ab"] == [9, 9]
    assert entries["b-half-two"].limits.timeout == 7
    assert entries["b-half-two"].recipe.targets[0].threads == 2


def test_small_numbers_texts_and_null_survive_the_way_into_the_recipe():
    data = {
        "entries": [{"recipe": RECIPE, "set": {"recovery.learning_rate": 1e-7, "metric": "f1-macro", "search": None}}]
    }
    (entry,) = parse_zoo(data)
    assert entry.recipe.recovery.learning_rate == 1e-7
    assert entry.recipe.metric == "f1-macro"
    assert entry.recipe.search is None


def test_overrides_of_the_command_line_come_last():
    (entry,) = parse_zoo({"entries": [{"recipe": RECIPE, "set": {"seed": 1}}]}, ["seed=5"])
    assert entry.recipe.seed == 5


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        pytest.param([], ["a zoo is a mapping"], id="no mapping"),
        pytest.param({}, ["neither `entries` nor a `matrix`"], id="empty"),
        pytest.param({"entrys": []}, ["'entrys'", "Did you mean 'entries'"], id="unknown key"),
        pytest.param({"schema": 2}, ["`schema` must be 1"], id="schema"),
        pytest.param({"entries": {}}, ["neither"], id="no entries"),
        pytest.param({"entries": {"a": 1}}, ["`entries` must be a list"], id="entries no list"),
        pytest.param({"entries": ["a.yaml"]}, ["`entries.0` must be a mapping", "a.yaml"], id="entry no mapping"),
        pytest.param({"entries": [{"name": "a"}]}, ["`entries.0` names no recipe"], id="no recipe"),
        pytest.param({"entries": [{"recipe": "none.yaml"}]}, ["entries.0 (none)", "none.yaml"], id="recipe missing"),
        pytest.param(
            {"entries": [{"recipe": RECIPE, "timeuot": 3}]},
            ["entries.0", "unknown option 'timeuot'", "'timeout'"],
            id="unknown limit",
        ),
        pytest.param(
            {"entries": [{"recipe": RECIPE, "timeout": 0}]}, ["entries.0.timeout", "greater than 0"], id="timeout"
        ),
        pytest.param(
            {"entries": [{"recipe": RECIPE, "timeout": float("inf")}]}, ["entries.0.timeout", "finite"], id="no end"
        ),
        pytest.param({"entries": [{"recipe": RECIPE}, {"recipe": RECIPE}]}, ["'quickstart' is taken"], id="same name"),
        pytest.param({"entries": [{"recipe": RECIPE, "name": "../up"}]}, ["'../up'", "letters"], id="name as a path"),
        pytest.param(
            {"entries": [{"recipe": RECIPE, "set": {"pases": []}}]},
            ["entries.0 (quickstart)", "'pases'", "'passes'"],
            id="set",
        ),
        pytest.param(
            {"entries": [{"recipe": RECIPE, "set": {"passes": ["mi-node"]}}]},
            ["unknown pass 'mi-node'", "'mi-nodes'"],
            id="unknown pass",
        ),
        pytest.param(
            {"entries": [{"recipe": RECIPE, "set": {"passes.mi-nodes.target_mac": 1}}]},
            ["'target_mac'", "'target_macs'"],
            id="pass option",
        ),
        pytest.param(
            {"entries": [{"recipe": RECIPE, "set": {"metric": "acuracy"}}]}, ["'acuracy'", "'accuracy'"], id="metric"
        ),
        pytest.param({"matrix": []}, ["neither"], id="empty matrix"),
        pytest.param({"matrix": {"model": {}}}, ["'model'", "Did you mean 'models'"], id="unknown axis"),
        pytest.param({"matrix": {"models": ["a"]}}, ["`matrix.models` must map names"], id="axis is a list"),
        pytest.param(
            {"matrix": [{"models": {"a": {"sets": {}}}}]}, ["matrix.0.models.a", "'sets'", "'set'"], id="part of axis"
        ),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(data, parts):
    with pytest.raises(RecipeError) as refused:
        parse_zoo(data, manager=create_manager(external=True))
    for part in parts:
        assert part in str(refused.value)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="cannot read the zoo"):
        load_zoo(tmp_path / "none.yaml")
    for text, words in (("a: [", "is not YAML"), ("a: &x 1\nb: *x", "alias"), ("#" * 2**21, "at most")):
        file = tmp_path / "zoo.yaml"
        file.write_text(text)
        with pytest.raises(RecipeError, match=words):
            load_zoo(file)


def test_the_example_is_a_zoo():
    entries = load_zoo(ROOT / "examples" / "zoo.yaml", manager=create_manager())
    assert len(entries) == len({entry.name for entry in entries}) >= 4
    assert yaml.safe_load(entries[0].recipe.to_yaml())["model"]
