"""Real Olive: both routes to the exported file, the cache, and what Olive would swallow."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("olive")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore")

import torch  # noqa: E402
from olive.model import PyTorchModelHandler  # noqa: E402
from olive.workflows import run  # noqa: E402
from olive_example import CALIBRATION, QUICK, ROOT  # noqa: E402
from small_digits import load_small  # noqa: E402

import secateurs  # noqa: E402
from secateurs import cli, cost  # noqa: E402
from secateurs.data import Dataset  # noqa: E402
from secateurs.errors import RecipeError, SecateursError  # noqa: E402
from secateurs_adapters.olive_pass import PassError  # noqa: E402
from secateurs_adapters.olive_workflow import (  # noqa: E402
    package_config,
    require_output,
    run_workflow,
    write_package_config,
)

IMAGES = np.random.default_rng(0).normal(size=(3, 1, 8, 8)).astype(np.float32)
ENVIRONMENT = {**os.environ, "OLIVE_DISABLE_TELEMETRY": "1", "CI": "1"}


def command(*arguments):
    """Run a Python module in a fresh process at the repository's root."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )


def shapes(file):
    return sorted(tuple(item.dims) for item in onnx.load(file).graph.initializer)


def answers(file):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: IMAGES})[0]


def weights(folder):
    """Return when each cached network was written, by path."""
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("model.safetensors")}


@pytest.fixture(scope="module")
def routes(example, tmp_path_factory):
    """Run the example from the command line, then the same from Python with the same cache; quantisation comes after."""
    home = tmp_path_factory.mktemp("routes")
    config = {**copy.deepcopy(example), "cache_dir": str(home / "cache"), "output_dir": str(home / "command-line")}
    (home / "config.json").write_text(json.dumps(config))
    write_package_config(home / "package.json")
    ended = command("olive", "run", "--config", home / "config.json", "--package-config", home / "package.json")
    assert ended.returncode == 0, ended.stderr
    before = weights(home / "cache")
    assert len(before) == 1
    quantise = config["passes"].pop("quantise")
    os.chdir(ROOT)
    plain = run({**copy.deepcopy(config), "output_dir": str(home / "plain")}, package_config=package_config())
    config["passes"]["quantise"] = quantise
    output = run_workflow({**config, "output_dir": str(home / "python")})
    assert weights(home / "cache") == before  # nothing was pruned again
    return home, plain, output


def test_both_routes_end_in_the_same_file_with_a_latency(routes):
    home, _, output = routes
    first, second = home / "command-line", home / "python"
    assert (first / "model.onnx").read_bytes() == (second / "model.onnx").read_bytes()
    assert json.loads((first / "metrics.json").read_text())["latency-p50"]["value"] > 0
    assert output.get_best_candidate().metrics_value["latency-p50"]["value"] > 0
    kinds = {item.op_type for item in onnx.load(second / "model.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds


def test_the_exported_file_is_that_of_secateurs_run(routes, tmp_path):
    _, plain, _ = routes
    made = plain.get_best_candidate().model_path
    targets = [{"processes": 5, "max_processes": 5, "repeats": 4, "warmup": 1, "memory_repeats": 1}]
    recipe = {
        "model": {"factory": "digits_resnet:build", "weights": "examples/digits_resnet.safetensors"},
        "data": {"calibration": CALIBRATION},
        "passes": [{"mi-nodes": {**QUICK, "grid": 4, "round_to": 4}}],
        "targets": targets,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "folder": str(ROOT / "examples")}))
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "run")])
    assert ended.value.code == 0
    own = tmp_path / "run" / "model.onnx"
    assert shapes(made) == shapes(own)
    np.testing.assert_allclose(answers(made), answers(own), rtol=0, atol=1e-5)


def test_the_pass_meets_its_target_and_reloads_from_the_output_folder(workflow, tmp_path):
    run_workflow(workflow())
    saved = json.loads((tmp_path / "out" / "model_config.json").read_text())
    assert saved["type"].lower() == "pytorchmodel"
    network = PyTorchModelHandler(**saved["config"]).load_model()
    original = load_small(None)
    one = Dataset({"images": IMAGES[:1]})
    left = cost.total(cost.macs(network, one)) / cost.total(cost.macs(original, one))
    assert 0.5 < left <= 0.6
    again = secateurs.load(Path(saved["config"]["model_path"]), build=lambda: load_small(None))
    images = torch.as_tensor(IMAGES)
    torch.testing.assert_close(network(images), again(images), rtol=0, atol=0)


def test_another_code_version_prunes_again(workflow, tmp_path):
    cache = tmp_path / "cache"
    run_workflow(workflow())
    first = weights(cache)
    run_workflow(workflow())
    assert weights(cache) == first
    run_workflow(workflow(algorithm_version="next"))
    assert len(weights(cache)) == 2


def test_two_passes_in_a_row_reload_without_the_first_ones_folder(workflow, tmp_path):
    config = workflow()
    data = config["passes"]["prune"]["data"]
    config["passes"] = {
        "depth": {"type": "SecateursCkaSegment", "blocks": 1, "refit": "none", "data": data},
        **config["passes"],
    }
    run_workflow(config)
    saved = json.loads((tmp_path / "out" / "model_config.json").read_text())["config"]
    plan = secateurs.Plan.load(Path(saved["model_path"]) / "plan.json")
    assert {"drop_block", "remove_units"} <= {edit.edit for edit in plan.edits}
    (tmp_path / "cache").rename(tmp_path / "gone")
    assert PyTorchModelHandler(**saved).load_model()(torch.as_tensor(IMAGES)).shape == (3, 10)


def test_olive_data_configs_calibrate(workflow):
    settings = {"data": None, "calibration_data_config": "digits"}
    output = run_workflow(workflow(**settings))
    assert output.has_output_model()


# --- what Olive would swallow -----------------------------------------------------------------------------------------------------------


def test_an_unreachable_target_is_an_error_without_our_help_too(workflow):
    with pytest.raises(PassError, match="target_macs") as caught:
        run(workflow(target_macs=0.01, min_units=8), package_config=package_config())
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        ({"target_macs": 7}, 2, "less than or equal to 1"),
        ({"target_macs": 0.01, "min_units": 8}, 1, "target_macs"),
        ({"target_macs": 0.01, "min_units": 8, "strict": False}, 0, ""),
    ],
)
def test_the_command_ends_with_our_exit_codes(workflow, tmp_path, capsys, settings, code, words):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(workflow(**settings)))
    with pytest.raises(SystemExit) as ended:
        cli.main(["olive", str(file)])
    said = capsys.readouterr()
    assert ended.value.code == code
    assert words in " ".join(said.err.split())
    assert "Traceback" not in said.err
    assert (f"the model is {tmp_path / 'out'}" in said.out) == (code == 0)


def test_a_failure_inside_olive_is_named(workflow, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("the disk is full")

    monkeypatch.setattr("secateurs_adapters.olive_pass.read_handler", broken)
    with pytest.raises(SecateursError, match="the disk is full"):
        run_workflow(workflow())


def test_a_failure_of_another_pass_is_no_success(workflow, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no such operator")

    config = workflow()
    config["passes"] |= {"convert": {"type": "OnnxConversion"}}
    monkeypatch.setattr("olive.passes.onnx.conversion.OnnxConversion._run_for_config", broken)
    with pytest.raises(SecateursError, match="no such operator"):
        run_workflow(config)
    silent = run({**copy.deepcopy(config), "output_dir": config["output_dir"] + "2"}, package_config=package_config())
    with pytest.raises(SecateursError, match="no model"):
        require_output(silent)


def test_what_olive_refuses_is_a_wrong_configuration(workflow):
    config = workflow()
    config["passes"]["prune"]["type"] = "SecateursMiNode"
    with pytest.raises(RecipeError, match="secateursminode"):
        run_workflow(config)


def test_a_recipe_runs_as_a_pass(workflow, tmp_path):
    recipe = {
        "data": {"calibration": CALIBRATION},
        "passes": [{"mi-nodes": {**QUICK, "target_macs": "${left}"}}],
    }
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({"variables": {"left": 0.9}, "model": {"factory": "absent:build"}, **recipe})
    )
    config = workflow()
    settings = {"recipe": str(tmp_path / "recipe.yaml"), "overrides": ["left=0.7"], "prove": False}
    config["passes"] = {"recipe": {"type": "SecateursRecipe", **settings}}
    folder = Path(run_workflow(config).get_best_candidate().model_path)
    report = json.loads((folder / "report.json").read_text())
    assert 0.6 < report["ratios"]["macs"] <= 0.7
