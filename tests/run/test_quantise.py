"""A run that quantises what it pruned and fixes its shapes: four files in one table, and the verdict on the one that ships."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import onnxruntime
import pytest

from secateurs import cli
from secateurs.report import report_schema
from secateurs.run_folder import OUTPUTS

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("dense", "pruned", "quantised", "pruned and quantised")
EDGE = ("baseline.edge", "model.edge", "model.quantised.edge")
pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """Return the folder of one quantised run of the quickstart and its exit code."""
    folder = tmp_path_factory.mktemp("quantised") / "out"
    settings = ("recovery.epochs=1", "quantise.mode=static", "export.edge.ort=true")
    budget = ("budget={accuracy_drop: 0.02, artifact_mib: 0.25}", "targets.0.repeats=10")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        options = [part for item in (*settings, *budget) for part in ("--set", item)]
        with pytest.raises(SystemExit) as ended:
            cli.main(["run", "examples/quickstart.yaml", "--output", str(folder), *options])
    return folder, ended.value.code


@pytest.fixture(scope="module")
def report(quantised):
    return json.loads((quantised[0] / "report.json").read_text())


def outputs(path, inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: inputs})[0]


def test_the_verdict_is_on_the_file_that_ships(quantised, report):
    folder, code = quantised
    assert code == 0, report["budget"]
    jsonschema.validate(report, report_schema())
    assert report["candidate"]["file"] == "model.quantised.onnx"
    assert report["candidate"]["artifact_bytes"] == (folder / "model.quantised.onnx").stat().st_size
    size = next(row for row in report["budget"] if row["name"] == "artifact_mib")
    assert size["measured"] * 2**20 == pytest.approx(report["candidate"]["artifact_bytes"])
    # The pruned file alone, in 32 bits, breaks that limit.
    assert (folder / "model.onnx").stat().st_size > 0.25 * 2**20
    assert report["parity"]["max_abs"] <= 1e-4, "of the file in 32 bits"


def test_four_files_stand_in_one_table(quantised, report):
    folder, _ = quantised
    table = {one["name"]: one for one in report["variants"]}
    assert tuple(table) == NAMES
    assert [one["name"] for one in report["variants"] if one["ships"]] == ["pruned and quantised"]
    files = dict(zip(NAMES, ("baseline", "model", "baseline.quantised", "model.quantised"), strict=True))
    sizes = {name: (folder / f"{file}.onnx").stat().st_size for name, file in files.items()}
    assert {name: one["side"]["artifact_bytes"] for name, one in table.items()} == sizes
    assert sizes["pruned and quantised"] < min(sizes["pruned"], sizes["quantised"])
    assert table["dense"]["ratios"] is None
    for name in NAMES[1:]:
        ratios = table[name]["ratios"]
        assert ratios["artifact_bytes"] == pytest.approx(sizes[name] / sizes["dense"])
        assert ratios["targets"][0]["latency_p50"]["value"] > 0
    assert table["quantised"]["ratios"]["macs"] == 1.0


def test_every_accuracy_is_that_of_its_file(quantised, report):
    from secateurs_adapters.data_settings import DigitsSettings
    from secateurs_adapters.datasets import load_digits

    data = load_digits(DigitsSettings(split="evaluation"))
    for one in report["variants"]:
        found = outputs(quantised[0] / one["side"]["file"], data.inputs["input"]).argmax(1)
        assert one["side"]["accuracy"]["value"] == pytest.approx(float((found == data.labels).mean()))


def test_people_read_the_table_too(quantised):
    for page in ("README.md", "report.html"):
        text = (quantised[0] / page).read_text()
        assert "pruned and quantised (ships)" in text, page
    assert (
        "`model.quantised.onnx` runs on onnxruntime by itself (written by dynamo, opset 20)."
        in (quantised[0] / "README.md").read_text()
    )


def test_variants_with_fixed_shapes_lie_beside(quantised):
    folder, _ = quantised
    one = np.random.default_rng(0).normal(size=(1, 1, 8, 8)).astype(np.float32)
    for name in EDGE:
        expected = outputs(folder / f"{name.removesuffix('.edge')}.onnx", one)
        for suffix in ("onnx", "ort"):
            np.testing.assert_allclose(outputs(folder / f"{name}.{suffix}", one), expected, rtol=1e-4, atol=1e-4)
        assert (folder / f"{name}.required_operators.config").exists()
        assert json.loads((folder / f"{name}.onnx.json").read_text())["made"]["settings"]["ort"]
    assert not [path.name for path in folder.iterdir() if path.name.endswith(".partial")]
    assert {*OUTPUTS} <= {path.name for path in folder.iterdir()}


def test_overwriting_leaves_no_old_variant(quantised, secateurs):
    """This test is the last: it replaces the folder that the others read."""
    folder, _ = quantised
    refused = secateurs("run", "examples/quickstart.yaml", "--output", folder, "--overwrite", "--set", "passes=[nope]")
    assert refused.code == 2
    assert (folder / "model.quantised.onnx").exists(), "nothing goes before the recipe is checked"
    options = ("--set", "recovery.epochs=0", "--set", "passes=[{magnitude: {target_units: 0.9}}]", "--set", "budget={}")
    again = secateurs(
        "run", "examples/quickstart.yaml", "--output", folder, "--overwrite", *options, "--set", "targets.0.repeats=4"
    )
    assert again.code == 0, again.err
    left = {path.name for path in folder.iterdir()}
    assert not [name for name in left if "edge" in name or "quantised" in name]
    assert {*OUTPUTS} <= left
    assert json.loads((folder / "report.json").read_text())["variants"] == []
