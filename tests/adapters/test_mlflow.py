"""Tracking: what a run leaves in MLflow's local file store, and that a broken server costs no run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from secateurs import cli
from secateurs.files import write_text
from secateurs.manager import create_manager
from secateurs.report import Report
from secateurs_adapters.mlflow_tracking import figures, log_run, secateurs_after_run, settings

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ENVIRONMENT = {"versions": {}, "cpu": "none", "threads": 1, "seed": 0}


def report(**more):
    row = {"name": "macs_ratio", "limit": 0.6, "measured": 0.5, "status": "pass"}
    return Report.model_validate(
        {
            "verdict": "fail",
            "reasons": ["latency is undecided"],
            "candidate": {"macs": 50, "targets": [{"provider": "CPU", "threads": 1, "batch_size": 2}]},
            "ratios": {"macs": 0.5},
            "budget": [row, {**row, "name": "latency_ratio", "target": "CPU, 1 thread", "measured": None}],
            "environment": ENVIRONMENT,
            **more,
        }
    )


@pytest.fixture
def folder(tmp_path):
    """Return the output of a run that never was."""
    made = tmp_path / "out"
    made.mkdir()
    write_text(made / "report.json", report().to_json())
    write_text(
        made / "recipe.yaml", "seed: 3\npasses:\n- mi-nodes: {target_macs: 0.5, names: []}\nmodel: {factory: 'a:b'}\n"
    )
    (made / "state").mkdir()
    return made


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Return a client of a new local file store, and the store's URI."""
    pytest.importorskip("mlflow", reason="needs the extra `mlflow`")
    from mlflow import MlflowClient

    uri = (tmp_path / "store").as_uri()
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return MlflowClient(tracking_uri=uri)


def only_run(store):
    (found,) = store.search_runs([store.get_experiment_by_name("secateurs").experiment_id])
    return found


def test_numbers_and_settings_have_paths_as_names(folder):
    assert settings(folder) == {
        "seed": "3",
        "passes.0.mi-nodes.target_macs": "0.5",
        "passes.0.mi-nodes.names": "[]",
        "model.factory": "a:b",
    }
    found = figures(report())
    assert found["candidate/macs"] == 50
    assert found["candidate/targets/0/batch_size"] == 2
    assert found["ratios/macs"] == found["budget/macs_ratio/measured"] == 0.5
    assert found["budget/latency_ratio/CPU_ 1 thread/limit"] == 0.6
    assert "budget/latency_ratio/CPU_ 1 thread/measured" not in found
    assert found["pass"] == 0


def test_a_run_is_logged_with_its_files_and_trials(folder, store):
    trial = {"edits": 1, "blocks": 0, "cost_ratio": 0.5, "params_ratio": 0.5, "accepted": True, "seconds": 1.0}
    trials = [{**trial, "number": number, "macs_ratio": 1 / number} for number in (1, 2)]
    run = log_run(report(trials=trials), folder)
    found = only_run(store)
    assert found.info.run_id == run
    assert found.info.run_name == "out"
    assert found.data.params == settings(folder)
    assert found.data.metrics.items() >= figures(report()).items()
    assert [(item.step, item.value) for item in store.get_metric_history(run, "trial/macs_ratio")] == [
        (1, 1.0),
        (2, 0.5),
    ]
    assert found.data.tags["secateurs.verdict"] == "fail"
    assert found.data.tags["secateurs.reasons"] == "latency is undecided"
    assert {item.path for item in store.list_artifacts(run)} == {"report.json", "recipe.yaml"}


def test_an_active_run_is_the_one_that_is_logged_into(folder, store, monkeypatch):
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(store.tracking_uri)
    with mlflow.start_run(experiment_id=mlflow.create_experiment("secateurs")) as mine:
        secateurs_after_run(report=report(), folder=folder)
    mlflow.set_tracking_uri(None)
    assert only_run(store).info.run_id == mine.info.run_id
    assert only_run(store).data.metrics["ratios/macs"] == 0.5


def test_a_recipe_that_runs_is_tracked_by_the_installed_plugin(tmp_path, store):
    recipe = {
        "model": {"factory": "digits_resnet:build", "arguments": {"widths": [8], "blocks": 1}},
        "data": {"calibration": {"source": "digits", "split": "train", "samples": 64}},
        "passes": [{"magnitude": {"target_macs": 0.7}}],
        "targets": [{"repeats": 4, "warmup": 1, "max_processes": 5, "memory_repeats": 1}],
        "folder": str(EXAMPLES),
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "small")])
    assert ended.value.code == 0
    found = only_run(store)
    assert found.info.run_name == "small"
    own = Report.load(tmp_path / "small" / "report.json")
    assert found.data.metrics["candidate/macs"] == own.candidate.macs
    assert found.data.metrics["ratios/targets/0/latency_p50/value"] == own.ratios.targets[0].latency_p50.value
    assert {item.path for item in store.list_artifacts(found.info.run_id)} >= {"report.html", "model.onnx", "plan.json"}


def test_the_plugin_is_installed_and_may_be_left_out():
    assert create_manager().has_plugin("secateurs-mlflow")
    assert not create_manager(["secateurs-mlflow"]).has_plugin("secateurs-mlflow")


def test_nothing_is_imported_or_written_without_mlflows_settings(folder):
    program = (
        "import sys\nfrom pathlib import Path\nfrom secateurs.report import Report\n"
        "from secateurs_adapters.mlflow_tracking import secateurs_after_run\n"
        f"secateurs_after_run(report=Report.load(Path({str(folder / 'report.json')!r})), folder=Path({str(folder)!r}))\n"
        "print('mlflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env={})
    assert done.stdout.strip() == "False"


def test_a_server_that_does_not_work_costs_a_warning(folder, store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "no-such-scheme://here")
    with pytest.warns(UserWarning, match="this run is not in MLflow: "):
        secateurs_after_run(report=report(), folder=folder)


def test_without_mlflow_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///x")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.warns(UserWarning, match=r"secateurs\[mlflow\]"):
        secateurs_after_run(report=report(), folder=folder)
