"""The factory loader: where modules come from, what is refused, and strict weights."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from secateurs.errors import ModelError
from secateurs_adapters.models import load_factory, load_weights

SOURCE = """
from torch import nn
LIMIT = 3
def build(width=4, depth=1):
    if width > 100:
        raise ValueError("too wide")
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)), nn.BatchNorm1d(width))
def text():
    return "no network"
def leave():
    raise SystemExit(3)
"""


@pytest.fixture
def recipe(tmp_path):
    """Return a recipe's folder with a module `pruning_net`."""
    (tmp_path / "pruning_net.py").write_text(SOURCE)
    return tmp_path


def load(value, folder, weights=None, **arguments):
    return load_factory(value, arguments=arguments, weights=weights, folder=folder)


class TestFactory:
    def test_builds_in_evaluation_mode_and_restores_the_path(self, recipe):
        before = list(sys.path)
        network = load("pruning_net:build", recipe, depth=2)
        assert isinstance(network, nn.Sequential)
        assert len(network) == 3
        assert not any(module.training for module in network.modules())
        assert sys.path == before

    def test_each_folder_has_its_own_modules(self, tmp_path):
        for name, width in (("a", 1), ("b", 2), ("a/inner", 3)):
            (tmp_path / name).mkdir()
            (tmp_path / name / "pruning_net.py").write_text(
                "from pruning_widths import WIDTH\nfrom torch import nn\ndef build():\n    return nn.Linear(WIDTH, 1)\n"
            )
            (tmp_path / name / "pruning_widths.py").write_text(f"WIDTH = {width}\n")
        for name, width in (("a", 1), ("b", 2), ("a/inner", 3), ("a", 1)):
            network = load("pruning_net:build", tmp_path / name)
            assert network.in_features == width
            assert sys.modules["pruning_net"].__file__ == str(tmp_path / name / "pruning_net.py")

    def test_one_folder_is_imported_once(self, recipe):
        load("pruning_net:build", recipe)
        module = sys.modules["pruning_net"]
        load("pruning_net:build", recipe)
        assert sys.modules["pruning_net"] is module

    def test_a_package_in_the_folder(self, recipe):
        (recipe / "pruning_nets").mkdir()
        (recipe / "pruning_nets" / "__init__.py").write_text("")
        (recipe / "pruning_nets" / "small.py").write_text(SOURCE)
        assert isinstance(load("pruning_nets.small:build", recipe), nn.Sequential)

    def test_an_installed_module(self, tmp_path):
        assert isinstance(load("torch.nn:Linear", tmp_path, in_features=2, out_features=3), nn.Linear)

    def test_a_name_that_is_taken(self, tmp_path):
        (tmp_path / "json.py").write_text(SOURCE)
        with pytest.raises(ModelError, match=r"has that name already; rename the file"):
            load("json:build", tmp_path)
        import json

        assert json.loads("1") == 1

    @pytest.mark.parametrize(
        "value", ["pruning_net", "pruning_net:", ":build", "pruning_net:build()", "../x:build", ""]
    )
    def test_malformed(self, recipe, value):
        with pytest.raises(ModelError, match=r"write `package\.module:function`"):
            load(value, recipe)

    @pytest.mark.parametrize(
        ("value", "arguments", "message"),
        [
            ("pruning_nett:build", {}, "unknown module 'pruning_nett'. Did you mean 'pruning_net'"),
            ("pruning_net:biuld", {}, "unknown function 'biuld'. Did you mean 'build'"),
            ("pruning_net:LIMIT", {}, "'LIMIT'.*type 'int'; a factory is a function"),
            ("pruning_net:build", {"width": 101}, "raised ValueError: too wide. It takes width, depth."),
            ("pruning_net:build", {"wide": 1}, "unexpected keyword argument 'wide'. It takes width, depth."),
            ("pruning_net:text", {}, "returned an object of type 'str'"),
            ("pruning_net:leave", {}, "raised SystemExit: 3"),
            ("torch.nn:modules", {}, "type 'module'; a factory is"),
        ],
    )
    def test_refusals(self, recipe, value, arguments, message):
        with pytest.raises(ModelError, match=message):
            load(value, recipe, **arguments)

    @pytest.mark.parametrize(
        "body", ["import nothing_like_this", "raise KeyError('x')", "def (", "import sys; sys.exit(1)"]
    )
    def test_a_module_that_fails(self, recipe, body):
        (recipe / "pruning_bad.py").write_text(body)
        before = list(sys.path)
        with pytest.raises(ModelError, match="importing the module 'pruning_bad' raised") as caught:
            load("pruning_bad:build", recipe)
        assert caught.value.__cause__ is not None
        assert sys.path == before


class TestWeights:
    def test_exact(self, recipe):
        original = load("pruning_net:build", recipe, depth=2)
        for tensor in original.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape) if tensor.is_floating_point() else tensor)
        save_file(original.state_dict(), recipe / "w.safetensors")
        loaded = load("pruning_net:build", recipe, weights=recipe / "w.safetensors", depth=2)
        for name, tensor in original.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name])

    def test_counters_may_be_absent(self, recipe):
        state = {name: value for name, value in load("pruning_net:build", recipe).state_dict().items() if value.ndim}
        save_file(state, recipe / "w.safetensors")
        load("pruning_net:build", recipe, weights=recipe / "w.safetensors")

    def test_tied_parameters_may_be_absent(self, tmp_path):
        network = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        network["b"].weight = network["a"].weight
        state = {name: value for name, value in network.state_dict().items() if name != "b.weight"}
        save_file(state, tmp_path / "w.safetensors")
        load_weights(network, tmp_path / "w.safetensors")
        network["b"].weight = nn.Parameter(torch.zeros(2, 2))
        with pytest.raises(ModelError, match=r"1 missing in the file: b\.weight"):
            load_weights(network, tmp_path / "w.safetensors")

    def test_everything_wrong_is_listed(self, tmp_path):
        network = nn.Sequential(*(nn.Linear(2, 2) for _ in range(8)))
        state = network.state_dict()
        state["0.weight"] = torch.zeros(3, 2)
        save_file(
            {name: value for name, value in state.items() if name < "2"} | {"x": torch.ones(1)},
            tmp_path / "w.safetensors",
        )
        with pytest.raises(ModelError) as caught:
            load_weights(network, tmp_path / "w.safetensors")
        text = str(caught.value)
        assert r"1 shapes differ: 0.weight is (3, 2) in the file, (2, 2) in the network" in text
        assert "12 missing in the file: 2.weight, 2.bias" in text
        assert "6.bias, and 2 more" in text
        assert "7.weight" not in text
        assert "1 unexpected in the file: x" in text

    @settings(max_examples=25, deadline=None)
    @given(
        gone=st.sets(st.sampled_from(["0.weight", "0.bias", "1.weight", "1.bias"])),
        extra=st.sets(st.sampled_from("abc")),
    )
    def test_strict_exactly_when_the_names_differ(self, gone, extra, tmp_path_factory):
        network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        state = {name: value for name, value in network.state_dict().items() if name not in gone}
        path = tmp_path_factory.mktemp("w") / "w.safetensors"
        save_file(state | {name: torch.zeros(1) for name in extra}, path)
        if not gone | extra:
            load_weights(network, path)
            return
        with pytest.raises(ModelError) as caught:
            load_weights(network, path)
        assert all(name in str(caught.value) for name in gone | extra)

    def test_files_of_other_kinds(self, tmp_path):
        network = nn.Linear(2, 2)
        torch.save(network.state_dict(), tmp_path / "new.pt")
        torch.save(network.state_dict(), tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
        (tmp_path / "text.safetensors").write_text("version https://example.org")
        (tmp_path / "empty.safetensors").write_bytes(b"")
        for name, message in (
            ("new.pt", r"is a zip archive as `torch.save` writes it; reading one can run code"),
            ("old.safetensors", "is a pickle; reading one can run code"),
            ("text.safetensors", "cannot be read as safetensors"),
            ("empty.safetensors", "cannot be read as safetensors"),
            ("nowhere.safetensors", "does not exist"),
        ):
            with pytest.raises(ModelError, match=message):
                load_weights(network, tmp_path / name)
