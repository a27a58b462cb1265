"""Passes and data sources that a plugin registers without `settings`: they run, and options are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from secateurs import hookimpl
from secateurs.errors import RecipeError
from secateurs.manager import create_manager
from secateurs.passes.base import Pass
from secateurs.passes.baselines import Magnitude
from secateurs.recipe import parse_recipe
from secateurs.runner import dry_run, prepare
from secateurs_adapters.data_settings import DigitsSettings
from secateurs_adapters.datasets import load_digits
from secateurs_adapters.zoo.spec import parse_zoo

ROOT = Path(__file__).resolve().parents[2]


class Half(Magnitude):
    """Removes half of all units; a class of its own, whose author forgot `settings`."""

    name = "half"

    def __init__(self, settings=None):
        super().__init__(target_units=0.5)


class Plain:
    """A plugin that registers names and nothing else."""

    @hookimpl
    def secateurs_register_passes(self, register):
        register("half", Half)

    @hookimpl
    def secateurs_register_datasets(self, register):
        register("some-digits", lambda settings: load_digits(DigitsSettings()).take(range(64)))


@pytest.fixture
def manager():
    manager = create_manager()
    manager.adopt(Plain(), "plain")
    return manager


def recipe(monkeypatch, **more):
    monkeypatch.chdir(ROOT)
    body = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text())
    body |= {"data": {"calibration": {"source": "some-digits"}}, "passes": ["half"], "budget": {}} | more
    body.pop("search", None)
    return parse_recipe(body, folder=ROOT / "examples")


def test_what_takes_no_options_runs(manager, monkeypatch):
    assert issubclass(manager.registries.passes["half"].load(), Pass)
    outcome = dry_run(prepare(recipe(monkeypatch), manager)).outcome
    assert outcome.plan.removes
    assert outcome.records[0].name == "half"


def test_the_source_of_a_hugging_face_network_may_have_no_settings(manager, monkeypatch):
    """The network's processor is offered to sources that take one."""
    from secateurs.sources import load_role

    found = load_role(recipe(monkeypatch, model={"hf": "any/network"}), "calibration", manager)
    assert len(found) == 64


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"passes": [{"half": {"target_macs": 0.5}}]}, r"`passes\.half` takes no options, got target_macs"),
        ({"data": {"calibration": {"source": "some-digits", "split": "x"}}}, r"`data\.calibration` takes no .* split"),
    ],
)
def test_options_are_refused_by_name(manager, monkeypatch, more, words):
    with pytest.raises(RecipeError, match=words):
        prepare(recipe(monkeypatch, **more), manager)


def test_a_zoo_names_them_too(manager, monkeypatch):
    monkeypatch.chdir(ROOT)
    entry = {"recipe": "examples/quickstart.yaml", "set": {"passes": ["half"]}}
    assert parse_zoo({"entries": [entry]}, (), manager)[0].recipe.passes[0].name == "half"
    entry["set"] = {"passes": [{"half": {"grid": 1}}]}
    with pytest.raises(RecipeError, match=r"entries\.0 .*`passes\.half` takes no options, got grid"):
        parse_zoo({"entries": [entry]}, (), manager)
