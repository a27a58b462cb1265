"""The whole main job on the embedded data: weights to a validated ONNX file."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import onnxruntime
import pytest
import yaml

import secateurs
from secateurs.plan import DropBlock, Plan, RemoveUnits
from secateurs.report import Report, report_schema
from secateurs.run_folder import OUTPUTS

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def report(quickstart):
    return json.loads((quickstart[0] / "report.json").read_text())


def test_it_passes_within_its_budget(quickstart, report):
    assert quickstart[1] == 0, report["budget"]
    assert report["verdict"] == "pass"
    assert report["ratios"]["macs"] <= 0.5
    drop = report["ratios"]["targets"][0]["accuracy_drop"]["value"]
    assert drop <= 0.01
    assert report["baseline"]["accuracy"]["n"] == 450
    assert report["seconds"] <= 60


def test_both_passes_made_certified_edits(report):
    assert [record["name"] for record in report["passes"]] == ["cka-cluster", "mi-nodes"]
    for record in report["passes"]:
        assert record["edits"] > 0
        assert record["certificate"]["max_abs"] <= 1e-4 * record["certificate"]["scale"]


def test_every_file_is_there_and_nothing_is_half_written(quickstart):
    names = {path.name for path in quickstart[0].iterdir()}
    assert set(OUTPUTS) <= names
    assert not [name for name in names if name.endswith(".partial") or name == ".secateurs"]


def test_the_report_follows_the_schema_that_ships(report):
    jsonschema.validate(report, report_schema())


def test_the_report_says_what_was_measured(report):
    target = report["candidate"]["targets"][0]
    assert target["provider_obtained"] == "CPUExecutionProvider"
    assert set(target["nodes_per_provider"]) == {"CPUExecutionProvider"}
    assert target["latency_ms"]["p50"] > 0
    assert target["peak_memory_bytes"] > 0
    assert target["activation_bytes_profiled"] > 0
    assert report["parity"]["max_abs"] <= 1e-4
    assert len(report["parity"]["batch_sizes"]) >= 2


def test_the_plan_holds_the_edits_that_the_report_counts(quickstart, report):
    plan = Plan.load(quickstart[0] / "plan.json")
    assert len(list(plan.of(DropBlock))) == report["passes"][0]["edits"]
    assert len(list(plan.of(RemoveUnits))) == report["passes"][1]["edits"]
    assert all(edit.reason for edit in plan.edits)


def test_the_network_reloads_bit_for_bit_in_a_new_process_without_pickle(quickstart, tmp_path):
    import torch
    from digits_resnet import build

    inputs = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "inputs.npy", inputs.numpy())
    program = f"""
import builtins, sys
import numpy as np, torch
sys.path.insert(0, {str(ROOT / "examples")!r})
def refuse(*_, **__):
    raise AssertionError("pickle was used")
import pickle
pickle.load = pickle.loads = pickle.Unpickler = torch.load = refuse
import secateurs
from digits_resnet import build
model = secateurs.load({str(quickstart[0])!r}, build=build)
with torch.no_grad():
    np.save({str(tmp_path / "outputs.npy")!r}, model(torch.from_numpy(np.load({str(tmp_path / "inputs.npy")!r}))).numpy())
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    model = secateurs.load(quickstart[0], build=build)
    with torch.no_grad():
        expected = model(inputs).numpy()
    assert np.abs(np.load(tmp_path / "outputs.npy") - expected).max() == 0.0
    session = onnxruntime.InferenceSession(quickstart[0] / "model.onnx", providers=["CPUExecutionProvider"])
    assert np.abs(session.run(None, {"input": inputs.numpy()})[0] - expected).max() <= 1e-4 * np.abs(expected).max()


def test_the_evaluation_accuracy_is_that_of_the_file(quickstart, report):
    from secateurs_adapters.data_settings import DigitsSettings
    from secateurs_adapters.datasets import load_digits

    data = load_digits(DigitsSettings(split="evaluation"))
    for name, side in (("baseline.onnx", "baseline"), ("model.onnx", "candidate")):
        session = onnxruntime.InferenceSession(quickstart[0] / name, providers=["CPUExecutionProvider"])
        found = session.run(None, dict(data.inputs))[0].argmax(1)
        assert report[side]["accuracy"]["value"] == pytest.approx(float((found == data.labels).mean()))


def test_the_resolved_recipe_runs_again_to_the_same_plan(quickstart, secateurs):
    shown = secateurs("run", quickstart[0] / "recipe.yaml", "--dry-run", "--json")
    assert shown.code == 0, shown.err
    assert Plan.from_json(shown.out) == Plan.load(quickstart[0] / "plan.json")


def test_a_finished_run_is_read_back_by_resume(quickstart, secateurs):
    before = (quickstart[0] / "report.json").stat().st_mtime_ns
    again = secateurs("run", "examples/quickstart.yaml", "--output", quickstart[0], "--resume", "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["verdict"] == "pass"
    assert (quickstart[0] / "report.json").stat().st_mtime_ns == before


def test_a_run_that_is_read_back_says_what_it_was_made_with(quickstart, secateurs, tmp_path):
    """Versions do not forbid to read it back; one that was made here has nothing to say."""
    command = ("run", "examples/quickstart.yaml", "--resume", "--output")
    assert "note:" not in secateurs(*command, quickstart[0]).err
    out = tmp_path / "out"
    shutil.copytree(quickstart[0], out)
    report = Report.load(out / "report.json")
    here = report.environment.versions["torch"]
    del report.environment.versions["onnx"]
    report.environment.versions["torch"] = "1.0.0"
    (out / "report.json").write_text(report.to_json())
    again = secateurs(*command, out)
    assert again.code == quickstart[1]
    onnx = importlib.metadata.version("onnx")
    assert f"made with onnx not known (here {onnx}), torch 1.0.0 (here {here}); `--overwrite`" in again.err


def test_a_run_without_its_network_is_not_read_back(quickstart, secateurs, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(quickstart[0], out)
    (out / "model.onnx").unlink()
    refused = secateurs("run", "examples/quickstart.yaml", "--output", out, "--resume")
    assert refused.code == 2
    assert "its file 'model.onnx' is missing" in refused.err
    assert "verdict" not in refused.out


def test_resume_refuses_another_recipe(quickstart, secateurs):
    refused = secateurs("run", "examples/quickstart.yaml", "--output", quickstart[0], "--resume", "--set", "seed=1")
    assert refused.code == 2
    assert "another recipe" in refused.err


def test_an_impossible_budget_fails_and_still_writes_everything(secateurs, tmp_path):
    out = tmp_path / "out"
    failed = secateurs(
        "run",
        "examples/quickstart.yaml",
        "--output",
        out,
        "--set",
        "budget.latency_ratio=0.01",
        "--set",
        "recovery.epochs=0",
    )
    assert failed.code == 1
    report = json.loads((out / "report.json").read_text())
    row = next(row for row in report["budget"] if row["name"] == "latency_ratio")
    assert row["status"] == "fail"
    assert "latency_ratio" in failed.out
    assert f"{row['measured']:.4g}" in failed.out
    assert "0.01" in failed.out
    assert set(OUTPUTS) <= {path.name for path in out.iterdir()}


def test_an_interrupted_run_resumes_after_its_last_finished_pass(quickstart, secateurs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    from secateurs.passes.mi_nodes import MiNodes

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MiNodes, "orders", interrupt)
        stopped = secateurs("run", "examples/quickstart.yaml", "--output", out)
    assert stopped.code == 3
    assert not set(OUTPUTS) & {path.name for path in out.iterdir()}
    resumed = secateurs("run", "examples/quickstart.yaml", "--output", out, "--resume")
    assert resumed.code in (0, 1), resumed.err
    assert Plan.load(out / "plan.json") == Plan.load(quickstart[0] / "plan.json")
    assert (out / "model.safetensors").read_bytes() == (quickstart[0] / "model.safetensors").read_bytes()
    assert not (out / ".secateurs").exists()


def test_inspect_lists_blocks_groups_and_refusals(secateurs):
    shown = secateurs("inspect", "examples/quickstart.yaml", "--json")
    assert shown.code == 0, shown.err
    found = json.loads(shown.out)
    assert len(found["blocks"]) == 9
    assert sum(block["removable"] for block in found["blocks"]) == 7
    assert found["macs"] == 2189792
    assert {item["where"] for item in found["skipped"]} == {"head"}
    readable = secateurs("inspect", "examples/quickstart.yaml")
    assert "not prunable" in readable.out


def test_validate_judges_the_files_of_a_run(quickstart, secateurs, tmp_path):
    budget = tmp_path / "budget.yaml"
    budget.write_text(yaml.safe_dump({"artifact_ratio": 0.7, "accuracy_drop": 0.02}))
    spec = tmp_path / "data.yaml"
    spec.write_text(yaml.safe_dump({"source": "digits", "split": "evaluation"}))
    files = (quickstart[0] / "baseline.onnx", quickstart[0] / "model.onnx")
    judged = secateurs("validate", *files, "--data", spec, "--budget", budget, "--json")
    assert judged.code == 0, judged.err
    report = json.loads(judged.out)
    assert {row["name"]: row["status"] for row in report["budget"]} == {
        "artifact_ratio": "pass",
        "accuracy_drop": "pass",
    }
    budget.write_text(yaml.safe_dump({"artifact_ratio": 0.1}))
    assert secateurs("validate", *files, "--budget", budget).code == 1
