"""Recipes: variables, overrides, refusals that name the key, absolute paths, and the resolved form."""

import copy
from pathlib import Path

import pytest
import yaml

from secateurs.budget import Budget
from secateurs.errors import RecipeError, UserError
from secateurs.recipe import load_recipe, parse_pass, parse_recipe, settings_from
from secateurs.settings import ExportSettings, MiNodesSettings, RecoverySettings, SearchSettings, TargetSettings

FULL = """
schema: 1
variables: {data_dir: data, depth: 20, share: 0.5, rate: 1.0e-3}
seed: 3
model:
  factory: cifar_resnet:build
  arguments: {depth: "${depth}", label: "resnet-${depth}"}
  weights: "${data_dir}/weights_${depth}.safetensors"
data:
  calibration: {source: npz, file: "${data_dir}/train.npz", samples: 1024, normalise: {mean: [0.5], std: [0.25]}}
  evaluation: {source: npz, file: "${data_dir}/test.npz"}
metric: accuracy
passes:
  - cka-cluster: {threshold: 0.98}
  - mi-nodes: {target_macs: "${share}"}
  - magnitude
recovery: {epochs: 2, learning_rate: "${rate}", distill: true}
export: {exporter: dynamo, opset: 20}
budget: {accuracy_drop: 0.01, peak_memory_mib: 32}
targets:
  - {provider: CPUExecutionProvider, threads: 1, batch_size: 1}
  - {provider: CPUExecutionProvider, threads: 2, batch_size: 8}
"""


@pytest.fixture
def write(tmp_path):
    def write(text=FULL):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def minimal(**more):
    return {
        "model": {"factory": "net:build"},
        "data": {"calibration": {"source": "npz", "file": "x.npz"}},
        "passes": ["mi-nodes"],
        **more,
    }


def parse(data, *overrides):
    return parse_recipe(copy.deepcopy(data), folder=Path("/somewhere"), overrides=overrides)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_full_recipe(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(write())
    assert recipe.seed == 3
    assert recipe.folder == tmp_path
    assert (recipe.model.loader, recipe.model.value) == ("factory", "cifar_resnet:build")
    assert recipe.model.arguments == {"depth": 20, "label": "resnet-20"}
    assert recipe.data["calibration"].samples == 1024
    assert recipe.data["calibration"].options["normalise"] == {"mean": [0.5], "std": [0.25]}
    assert [(spec.name, spec.options) for spec in recipe.passes] == [
        ("cka-cluster", {"threshold": 0.98}),
        ("mi-nodes", {"target_macs": 0.5}),
        ("magnitude", {}),
    ]
    assert recipe.recovery == RecoverySettings(epochs=2, learning_rate=1e-3, distill=True)
    assert recipe.budget == Budget(accuracy_drop=0.01, peak_memory_mib=32)
    assert [target.batch_size for target in recipe.targets] == [1, 8]


def test_defaults():
    recipe = parse(minimal())
    assert (recipe.seed, recipe.metric, recipe.folder) == (0, "accuracy", Path("/somewhere"))
    assert recipe.recovery == RecoverySettings()
    assert recipe.search is None
    assert recipe.export == ExportSettings()
    assert recipe.budget == Budget()
    assert recipe.targets == (TargetSettings(),)


def test_paths_are_relative_to_the_working_directory_and_become_absolute(write, tmp_path, monkeypatch):
    path = write()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    recipe = load_recipe(path)
    assert recipe.model.weights == elsewhere / "data" / "weights_20.safetensors"
    assert recipe.data["calibration"].options["file"] == str(elsewhere / "data" / "train.npz")
    assert recipe.folder == tmp_path
    assert parse(minimal(folder="sub")).folder == elsewhere / "sub"


def test_the_given_data_is_not_changed():
    data = minimal(variables={"a": 1}, seed="${a}")
    before = copy.deepcopy(data)
    parse_recipe(data, folder=Path("/x"), overrides=["seed=5", "budget.accuracy_drop=0.1"])
    assert data == before


# --- variables --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [7, 0.5, True, None, "text", [1, 2], {"a": 1}], ids=repr)
def test_a_lone_variable_keeps_its_type(value):
    data = minimal(variables={"v": value})
    data["model"]["arguments"] = {"x": "${v}"}
    assert parse(data).model.arguments == {"x": value}


def test_a_variable_inside_text_becomes_text():
    data = minimal(variables={"a": 5, "b": "c"})
    data["model"]["arguments"] = {"x": ["${a}-${b}", "$a ${ a } $${a}"]}
    assert parse(data).model.arguments == {"x": ["5-c", "$a ${ a } $5"]}


def test_an_unknown_variable_says_where_and_suggests():
    data = minimal(variables={"depth": 20})
    data["model"]["arguments"] = {"x": "${dept}"}
    with pytest.raises(RecipeError, match=r"`model.arguments.x`: unknown variable 'dept'. Did you mean 'depth'.*--set"):
        parse(data)


# --- overrides --------------------------------------------------------------------------------------------------------


def at(recipe, path):
    value = recipe
    for part in path.split("."):
        value = value[int(part)] if part.isdigit() else value[part] if isinstance(value, dict) else getattr(value, part)
    return value


OVERRIDES = {
    "variable": ("depth=56", "model.arguments.depth", 56),
    "variable in text": ("depth=56", "model.arguments.label", "resnet-56"),
    "variable by its full name": ("variables.depth=56", "model.arguments.depth", 56),
    "scalar": ("seed=9", "seed", 9),
    "section": ("recovery.epochs=5", "recovery.epochs", 5),
    "exponent": ("recovery.learning_rate=2e-4", "recovery.learning_rate", 2e-4),
    "boolean": ("recovery.distill=false", "recovery.distill", False),
    "null": ("budget.accuracy_drop=null", "budget.accuracy_drop", None),
    "new key": ("budget.latency_ratio=0.8", "budget.latency_ratio", 0.8),
    "pass by name": ("passes.mi-nodes.target_macs=0.3", "passes.1.options.target_macs", 0.3),
    "pass by number": ("passes.0.cka-cluster.threshold=0.9", "passes.0.options.threshold", 0.9),
    "pass without options": ("passes.magnitude.target_units=0.5", "passes.2.options.target_units", 0.5),
    "whole pass": ("passes.2={taylor: {target_units: 0.5}}", "passes.2.name", "taylor"),
    "target": ("targets.1.threads=4", "targets.1.threads", 4),
    "whole target": ("targets.0={batch_size: 32}", "targets.0.batch_size", 32),
    "deep": ("data.calibration.normalise.std=[0.5]", "data.calibration.options.normalise", {"mean": [0.5], "std": [0.5]}),
    "argument": ("model.arguments.width=2", "model.arguments.width", 2),
    "whole section": ("recovery={epochs: 1}", "recovery.epochs", 1),
    "with a variable": ('metric="metric-${depth}"', "metric", "metric-20"),
    "equals sign in the value": ("metric=a=b", "metric", "a=b"),
}  # fmt: skip


@pytest.mark.parametrize(("override", "path", "expected"), OVERRIDES.values(), ids=OVERRIDES)
def test_set(write, override, path, expected):
    assert at(load_recipe(write(), [override]), path) == expected


@pytest.mark.parametrize("key", ["model.arguments", "depth"])
def test_keys_that_are_numbers_become_text_as_in_a_file(write, key):
    given = "{7: 2, true: {0: x}, null: 2024-01-01}"
    in_file = load_recipe(write(FULL.replace('{depth: "${depth}", label: "resnet-${depth}"}', given)))
    by_option = load_recipe(
        write(FULL.replace('{depth: "${depth}", label: "resnet-${depth}"}', '"${depth}"')), [f"{key}={given}"]
    )
    assert by_option.model.arguments == {"7": 2, "true": {"0": "x"}, "null": "2024-01-01"}
    assert by_option.model.arguments == in_file.model.arguments


def test_a_value_with_a_key_that_has_no_text_is_refused():
    with pytest.raises(RecipeError, match=r"`--set model.arguments` is not plain data.*Keys are text"):
        parse(minimal(), "model.arguments={2024-01-01: 1}")


def test_later_overrides_win_and_earlier_ones_stay(write):
    recipe = load_recipe(write(), ["seed=1", "depth=8", "recovery.epochs=7", "seed=2"])
    assert (recipe.seed, recipe.model.arguments["depth"], recipe.recovery.epochs) == (2, 8, 7)


def test_set_below_a_pass_whose_options_are_empty():
    recipe = parse(minimal(passes=[{"mi-nodes": None}]), "passes.mi-nodes.target_macs=0.4")
    assert recipe.passes[0].options == {"target_macs": 0.4}


def test_set_makes_missing_sections():
    recipe = parse(minimal(), "budget.accuracy_drop=0.02", "model.arguments.depth=3")
    assert recipe.budget.accuracy_drop == 0.02
    assert recipe.model.arguments == {"depth": 3}


BAD_OVERRIDES = {
    "no equals": ("seed", "takes key=value, got 'seed'"),
    "no key": ("=3", "takes key=value"),
    "unknown": ("sed=3", r"unknown recipe key or variable 'sed'. Did you mean 'seed'"),
    "unknown variable": ("dept=3", "Did you mean 'depth'"),
    "unknown section": ("recover.epochs=3", "Did you mean 'recovery'"),
    "not yaml": ("seed=[1", "`--set seed` is not YAML"),
    "pass that is not there": ("passes.taylor.p=1", "'taylor' is not an item of that list of 3"),
    "number that is not there": ("targets.7.threads=1", "'7' is not an item of that list of 2"),
    "below a number": ("seed.x.y=1", "nothing below"),
    "wrong type": ("seed=many", "`seed`.*got 'many'"),
}


@pytest.mark.parametrize(("override", "message"), BAD_OVERRIDES.values(), ids=BAD_OVERRIDES)
def test_set_that_does_not_fit(write, override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(), [override])


# --- refusals ---------------------------------------------------------------------------------------------------------

REFUSED = {
    "unknown key": (minimal(recovry={}), "unknown recipe key 'recovry'. Did you mean 'recovery'"),
    "unknown role": (
        minimal(data={"calibrate": {"source": "npz"}}),
        "unknown data role 'calibrate'. Did you mean 'calibration'",
    ),
    "unknown recovery option": (
        minimal(recovery={"epoch": 1}),
        "recovery: unknown option 'epoch'. Did you mean 'epochs'",
    ),
    "unknown search option": (
        minimal(search={"trial": 1}),
        "search: unknown option 'trial'. Did you mean 'trials'",
    ),
    "search trials": (minimal(search={"trials": 0}), "`search.trials`: .*; got 0"),
    "unknown target option": (
        minimal(targets=[{}, {"thread": 1}]),
        "targets.1: unknown option 'thread'. Did you mean 'threads'",
    ),
    "unknown budget": (minimal(budget={"acuracy_drop": 1}), "Did you mean 'accuracy_drop'"),
    "another schema": (minimal(schema=2), "`schema` must be 1"),
    "no model": ({"data": {}, "passes": []}, "no `model`"),
    "no passes": (minimal(passes=[]), "no `passes`"),
    "two loaders": (minimal(model={"factory": "a:b", "timm": "c"}), "one loader .*; got factory, timm"),
    "no loader": (minimal(model={"arguments": {"a": 1}}), "got none"),
    "no source": (minimal(data={"calibration": {"file": "x"}}), "`data.calibration` has no `source`"),
    "seed": (minimal(seed="zero"), "`seed`: .*; got 'zero'"),
    "epochs": (minimal(recovery={"epochs": -1}), "`recovery.epochs`: .*; got -1"),
    "samples": (
        minimal(data={"calibration": {"source": "npz", "samples": 0}}),
        "`data.calibration.samples`: .*; got 0",
    ),
    "batch size": (minimal(targets=[{"batch_size": "all"}]), "`targets.0.batch_size`.*got 'all'"),
    "budget value": (minimal(budget={"accuracy_drop": 5}), r"`budget.accuracy_drop`.*got 5"),
    "section that is a list": (minimal(recovery=[1]), r"`recovery` must be a mapping, got \[1\]"),
    "passes that are a mapping": (minimal(passes={"mi-nodes": {}}), "`passes` must be a list"),
    "two names in one pass": (minimal(passes=[{"a": {}, "b": {}}]), "each item of `passes` is one name"),
    "options that are a list": (minimal(passes=[{"a": [1]}]), "`passes.a` must be a mapping"),
    "variables that are a list": (minimal(variables=[1]), "`variables` must be a mapping"),
    "a list": ([1], "a recipe is a mapping .* got list"),
    "nothing": (None, "a recipe is a mapping .* got NoneType"),
}


@pytest.mark.parametrize(("data", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_follow_the_form_is_refused(data, message):
    with pytest.raises(UserError, match=message):
        parse(data)


FILES = {
    "not yaml": ("a: [1", "is not YAML"),
    "two documents": ("a: 1\n---\nb: 2\n", "is not YAML"),
    "python object": ("seed: !!python/object/apply:os.system [true]", "line 1 uses a YAML tag"),
    "holds itself": ("seed: &a [*a]", "YAML alias"),
    "grows without end": ("a: &a [1, 1]\nb: &b [*a, *a]\nseed: [*b, *b]", "line 2 .* YAML alias"),
    "key that is a date": ("2024-01-01: 1", "not plain data"),
}


@pytest.mark.parametrize(("text", "message"), FILES.values(), ids=FILES)
def test_files_that_are_not_recipes(write, text, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(text))


def test_a_missing_a_binary_and_an_oversized_file(tmp_path, write):
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load_recipe(tmp_path / "binary.yaml")
    with pytest.raises(RecipeError, match="at most 524288 are read"):
        load_recipe(write("# " + "x" * 1024 * 1024))


# --- the resolved form ------------------------------------------------------------------------------------------------


def test_the_resolved_recipe_reads_back_as_itself(write, tmp_path, monkeypatch):
    recipe = load_recipe(write(), ["depth=56", "passes.mi-nodes.criteria=[residual]"])
    resolved = tmp_path / "out" / "resolved.yaml"
    resolved.parent.mkdir()
    resolved.write_text(recipe.to_yaml())
    monkeypatch.chdir(resolved.parent)  # absolute paths: neither folder nor working directory matter any more
    again = load_recipe(resolved)
    assert again == recipe
    assert again.digest() == recipe.digest()
    assert again.to_yaml() == recipe.to_yaml()
    assert "${" not in recipe.to_yaml()


def test_a_minimal_recipe_reads_back_as_itself(tmp_path):
    recipe = parse(minimal(search={"trials": 5}))
    assert recipe.search == SearchSettings(trials=5)
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "r.yaml") == recipe


@pytest.mark.parametrize(
    "override",
    [
        "seed=4",
        "depth=8",
        "search={}",
        "search.trials=3",
        "recovery.epochs=3",
        "passes.mi-nodes.target_macs=0.6",
        "export.opset=19",
    ],
)
def test_the_digest_follows_everything_that_determines_the_result(write, override):
    assert load_recipe(write(), [override]).digest() != load_recipe(write()).digest()


def test_the_digest_follows_the_weights_and_not_the_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = minimal(model={"factory": "net:build", "weights": "w.safetensors"})
    (tmp_path / "w.safetensors").write_bytes(b"one")
    first = parse(data).digest()
    reordered = dict(reversed(data.items()))
    assert parse(reordered).digest() == first
    (tmp_path / "w.safetensors").write_bytes(b"two")
    assert parse(data).digest() != first


def test_the_resolved_form_is_plain_yaml(write):
    data = yaml.safe_load(load_recipe(write()).to_yaml())
    assert data["schema"] == 1
    assert data["passes"][2] == {"magnitude": {}}
    assert data["budget"] == {"accuracy_drop": 0.01, "peak_memory_mib": 32.0}


# --- parts ------------------------------------------------------------------------------------------------------------


def test_parse_pass():
    assert parse_pass("mi-nodes").options == {}
    assert parse_pass({"mi-nodes": {"target_macs": 0.5}}).options == {"target_macs": 0.5}
    assert parse_pass({"mi-nodes": None}).options == {}
    with pytest.raises(RecipeError, match="must be a mapping"):
        parse_pass(3)


def test_settings_from():
    assert settings_from(MiNodesSettings, {"target_macs": 0.5}, "p") == MiNodesSettings(target_macs=0.5)
    with pytest.raises(RecipeError, match=r"passes.mi-nodes: unknown option 'target_mac'\. Did you mean 'target_macs'"):
        settings_from(MiNodesSettings, {"target_mac": 0.5}, "passes.mi-nodes")
    with pytest.raises(RecipeError, match=r"`passes.mi-nodes.target_macs`: .*; got 0"):
        settings_from(MiNodesSettings, {"target_macs": 0}, "passes.mi-nodes")
    with pytest.raises(RecipeError, match=r"\(1 more\)"):
        settings_from(MiNodesSettings, {"target_macs": 0, "grid": 1}, "p")
