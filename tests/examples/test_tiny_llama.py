"""The tiny Llama: the folder that the example writes, and its recipe, prove what the README says of language models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")
tiny_llama = pytest.importorskip("tiny_llama")

from secateurs import cli  # noqa: E402 - after the skip

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT.parent / "shared" / "data" / "weights_stories260k_llama.safetensors"

pytestmark = [
    pytest.mark.hf,
    pytest.mark.skipif(not WEIGHTS.is_file(), reason=f"needs {WEIGHTS.name}, which is not in {WEIGHTS.parent}"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "llama"
    tiny_llama.write_folder(tiny_llama.build(WEIGHTS), path, {"calibration": 24, "evaluation": 16}, length=48)
    return path


def test_each_label_is_the_token_that_follows(folder):
    with np.load(folder / "calibration.npz") as one, np.load(folder / "evaluation.npz") as other:
        assert one["input_ids"].shape == one["labels"].shape == (24, 48)
        assert (one["labels"][:, :-1] == one["input_ids"][:, 1:]).all()
        assert (one["labels"][:, -1] == tiny_llama.IGNORED).all()
        assert (one["input_ids"][:, 0] == tiny_llama.BOS).all()
        assert not {*map(bytes, one["input_ids"])} & {*map(bytes, other["input_ids"])}


def test_the_recipe_prunes_it_and_the_file_agrees(folder, tmp_path):
    recipe = str(ROOT / "examples" / "tiny_llama.yaml")
    quick = ["passes.mi-nodes.allocation=uniform", "targets.0.processes=5", "targets.0.repeats=4"]
    options = [part for setting in (f"folder={folder}", *quick) for part in ("--set", setting)]
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", recipe, *options, "--output", str(tmp_path / "out")])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert ended.value.code in (0, 1), report
    assert report["ratios"]["params"] <= 0.9
    assert all(record["certificate"]["max_abs"] < 1e-3 * record["certificate"]["scale"] for record in report["passes"])
    before, after = (report[side]["targets"][0]["accuracy"] for side in ("baseline", "candidate"))
    assert before["metric"] == after["metric"] == "perplexity"
    assert 2.5 < before["value"] < 4.5
    assert before["value"] <= after["value"] < 3 * before["value"]
