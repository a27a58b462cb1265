"""The recipe for a small board, and its way there and back: run, bundle, measure, validate."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from secateurs import cli

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("recovery.epochs=0", "passes.0.mi-nodes.grid=2", "budget.accuracy_drop=0.5", "budget.peak_memory_ratio=1.5")


def secateurs(*arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return ended.value.code


def test_the_kit_measures_what_the_run_shipped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    options = [part for setting in QUICK for part in ("--set", setting)]
    assert secateurs("run", "examples/edge.yaml", *options, "--output", tmp_path / "edge") == 0
    report = json.loads((tmp_path / "edge" / "report.json").read_text())
    limits = {row["name"]: row for row in report["budget"]}
    assert limits["peak_memory_mib"]["limit"] == pytest.approx(5.12)
    assert limits["peak_memory_mib"]["status"] == "pass"
    assert [one["name"] for one in report["variants"] if one["ships"]] == ["pruned and quantised"]
    assert (tmp_path / "edge" / "model.quantised.edge.ort").is_file()

    assert secateurs("bundle", tmp_path / "edge", "--output", tmp_path / "kit", "--samples", "50") == 0
    subprocess.run([sys.executable, "measure.py"], cwd=tmp_path / "kit", check=True, capture_output=True)
    (tmp_path / "budget.yaml").write_text("{peak_memory_mib: 5.12, accuracy_drop: 0.5}")
    capsys.readouterr()
    validate = [
        "validate",
        "--measured",
        tmp_path / "kit" / "result.json",
        "--budget",
        tmp_path / "budget.yaml",
        "--json",
    ]
    assert secateurs(*validate) == 0
    measured = json.loads(capsys.readouterr().out)
    assert {row["name"]: row["status"] for row in measured["budget"]} == {
        "peak_memory_mib": "pass",
        "accuracy_drop": "pass",
    }
    assert measured["candidate"]["artifact_bytes"] == report["candidate"]["artifact_bytes"]
