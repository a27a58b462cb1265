"""Runs each benchmark as a script and reads what it wrote: `pytest -m long tests/benchmarks`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
DATA = HERE.parents[2] / "shared" / "data"

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(not DATA.is_dir(), reason="the data folder shared/data beside the repository is not here"),
]


def results(name, tmp_path, *options):
    output = tmp_path / f"{name}.json"
    command = [sys.executable, str(HERE / f"{name}.py"), "--output", str(output), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert output.exists(), done.stderr
    return json.loads(output.read_text())


def test_a_cka_sweep_costs_at_most_a_fifth_of_the_forward_passes(tmp_path):
    body = results("cka_sweep", tmp_path, "--depth", "20", "--layouts", "contiguous")
    assert body["accuracy"]["max_abs_difference_naive_float64"] <= 1e-6
    assert body["accuracy"]["max_abs_difference_torch_cka"] <= 1e-3
    assert [run["ratio_sweep_to_forward"] for run in body["runs"]] <= [body["budget_ratio"]]


def test_mi_nodes_keeps_the_accuracy_that_the_readme_states(tmp_path):
    body = results("cifar", tmp_path, "--images", "lossless", "--targets", "0.5", "--methods", "mi-nodes", "taylor")
    rows = {row["method"]: row for row in body["rows"]}
    assert rows["mi-nodes"]["right"] >= 830
    assert rows["mi-nodes"]["kl"] < rows["taylor"]["kl"]
    assert all(row["macs_ratio"] <= row["target"] for row in rows.values())
    assert all(row["certificate"]["max_abs"] <= 1e-4 * row["certificate"]["scale"] for row in body["rows"])


def test_choosing_half_of_a_resnet_50_takes_a_minute_and_memory_does_not_grow(tmp_path):
    body = results("selection_speed", tmp_path, "--repeats", "1")
    assert body["units"] == {"inner": 7552, "coupled": 3904}
    assert body["selection"][0]["information_seconds"] <= body["budget_seconds"]
    peaks = body["growth"]["peak_memory_bytes"]
    assert peaks["64"] <= body["growth"]["slack"] * peaks["4"]


def test_six_blocks_chosen_by_cka_segment_cost_less_than_others(tmp_path):
    """The committed results hold all counts, methods and five seeds, and refit."""
    options = ["--counts", "6", "--seeds", "2", "--mending", "recalibrated"]
    body = results("depth", tmp_path, *options, "--methods", "cka-segment", "block-influence", "random")
    assert body["summary"]["recalibrated"]["holds"]
    assert all(row["certificate"]["max_abs"] <= 1e-4 * row["certificate"]["scale"] for row in body["rows"])
    assert all(len(row["blocks"]) == 6 for row in body["rows"])
