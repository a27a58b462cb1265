"""Bad input: a clear error on stderr, exit code 2, and nothing written."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from secateurs.run_folder import open_folder

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "examples/quickstart.yaml"


@pytest.fixture
def refuse(secateurs, tmp_path):
    """Return a function that runs the quickstart with overrides, expects exit code 2 and no output, and returns the message."""

    def run(*overrides: str, recipe: object = RECIPE) -> str:
        out = tmp_path / "out"
        ended = secateurs("run", recipe, "--output", out, *(part for item in overrides for part in ("--set", item)))
        assert ended.code == 2, ended
        assert ended.err.startswith("error:")
        assert "Traceback" not in ended.err
        assert not out.exists()
        return ended.err

    return run


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        pytest.param(["passes.0.mi-node={}"], ["mi-node"], id="unknown pass among others"),
        pytest.param(["passes=[mi-node]"], ["unknown pass 'mi-node'", "Did you mean 'mi-nodes'"], id="unknown pass"),
        pytest.param(["pases=[]"], ["unknown recipe key", "'passes'"], id="unknown key"),
        pytest.param(
            ["data.calibration.source=digit"], ["unknown data source 'digit'", "'digits'"], id="unknown source"
        ),
        pytest.param(["data.calibration.spilt=train"], ["unknown option 'spilt'", "'split'"], id="unknown data option"),
        pytest.param(["data.test={source: digits}"], ["unknown data role 'test'"], id="unknown role"),
        pytest.param(["metric=acuracy"], ["unknown metric 'acuracy'", "'accuracy'"], id="unknown metric"),
        pytest.param(["export.exporter=dinamo"], ["unknown exporter 'dinamo'", "'dynamo'"], id="unknown exporter"),
        pytest.param(
            ["export.exporter=torchscript", "export.options={traced_branch: true}"],
            ["export.options: unknown option 'traced_branch'", "'traced_branches'"],
            id="unknown option of an exporter",
        ),
        pytest.param(
            ["export.edge.batchsize=1"],
            ["export.edge: unknown option 'batchsize'", "'batch_size'"],
            id="unknown option of the edge variant",
        ),
        pytest.param(
            ["quantise.mode=statik"], ["unknown mode 'statik'", "'static'"], id="unknown mode of quantisation"
        ),
        pytest.param(
            ["quantise.mode=static", "data={calibration: {source: digits, split: train}}", "budget={}"],
            ["`quantise` needs an `evaluation` role"],
            id="nothing to judge a quantised file by",
        ),
        pytest.param(
            ["targets.0.provider=CPUExecutionProvidr"],
            ["unknown provider 'CPUExecutionProvidr'", "'CPUExecutionProvider'"],
            id="unknown provider",
        ),
        pytest.param(
            ["targets.0.provider=CUDAExecutionProvider"],
            ["CUDAExecutionProvider", "CPUExecutionProvider", "onnxruntime-gpu"],
            id="provider not available",
        ),
        pytest.param(
            ["passes.cka-cluster.threshold=1.5"],
            ["threshold", "1.5", "less than or equal to 1"],
            id="threshold too large",
        ),
        pytest.param(["passes.cka-cluster.threshold=-0.1"], ["threshold", "-0.1"], id="threshold negative"),
        pytest.param(
            ["passes.mi-nodes.target_mac=0.5"],
            ["unknown option 'target_mac'", "'target_macs'"],
            id="unknown pass option",
        ),
        pytest.param(
            ["passes.mi-nodes.target_units=0.5"], ["exactly one of", "target_macs, target_units"], id="two targets"
        ),
        pytest.param(
            ["budget.latency_ratio=-1"], ["budget.latency_ratio", "greater than 0", "-1"], id="negative budget"
        ),
        pytest.param(
            ["budget.latencyratio=1"], ["unknown budget 'latencyratio'", "'latency_ratio'"], id="unknown budget"
        ),
        pytest.param(
            ["budget.accuracy_drop=5"], ["budget.accuracy_drop", "less than or equal to 1"], id="drop in points"
        ),
        pytest.param(
            ["data.evaluation={source: digits, split: train}"], ["overlap", "calibration"], id="overlap by origin"
        ),
        pytest.param(["model.factory=digits_resnet:biuld"], ["biuld", "'build'"], id="factory misspelt"),
        pytest.param(["model.factory=no_such_module:build"], ["no_such_module"], id="factory not importable"),
        pytest.param(
            ["model.factory=json:dumps", "model.arguments={obj: 1}"], ["json", "Module"], id="factory returns no module"
        ),
        pytest.param(["model.arguments={width: 3}"], ["width"], id="factory arguments"),
        pytest.param(
            ["model.arguments={widths: [8, 16, 24]}"], ["(16, 1, 3, 3)", "(8, 1, 3, 3)"], id="weights do not fit"
        ),
        pytest.param(["model.weights=examples/none.safetensors"], ["none.safetensors"], id="weights missing"),
        pytest.param(["model.weights=README.md"], ["README.md", "safetensors"], id="weights not safetensors"),
        pytest.param(
            ["search.resolutoin=0.1"],
            ["search: unknown option 'resolutoin'", "'resolution'"],
            id="unknown search option",
        ),
        pytest.param(["search={}"], ["`search`", "leave out"], id="search with nothing open"),
        pytest.param(
            ["passes=[mi-nodes]", "budget={}"],
            ["'mi-nodes' has no target", "`target_macs`", "`budget.accuracy_drop`"],
            id="no target and no budget",
        ),
        pytest.param(
            ["passes=[mi-nodes]", "search.cost=mac"], ["`search.cost`", "'mac'", "`target_macs`"], id="search cost"
        ),
        pytest.param(
            ["passes=[mi-nodes]", "metric=f1-macro", "budget.accuracy_confidence=0.95"],
            ["`budget.accuracy_confidence`", "no exact interval"],
            id="search by an interval that there is not",
        ),
        pytest.param(["schema=2"], ["`schema` must be 1"], id="schema"),
        pytest.param(["nothing"], ["key=value"], id="set without a value"),
        pytest.param(["model={}"], ["no `model`"], id="no model"),
        pytest.param(["seed=abc"], ["seed", "abc"], id="seed"),
    ],
)
def test_a_wrong_recipe_is_refused(refuse, overrides, parts):
    message = refuse(*overrides)
    for part in parts:
        assert part in message, message


ANOTHER_OUTPUT_FIRST = """
import torch
from digits_resnet import build as dense

class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.aside = dense(), torch.nn.Linear(64, 10)

    def forward(self, images):
        return {"aside": self.aside(images.flatten(1)), "logits": self.net(images)}
"""


def test_a_network_whose_first_output_is_not_its_prediction_is_refused(refuse, tmp_path, monkeypatch):
    """A file is judged by its first output, and passes by the prediction."""
    (tmp_path / "two_outputs.py").write_text(ANOTHER_OUTPUT_FIRST)
    monkeypatch.syspath_prepend(tmp_path)
    message = refuse("model.factory=two_outputs:Two", "model.weights=null")
    assert "return the prediction (the entry `logits` where there is one" in message


@pytest.mark.parametrize(
    ("arrays", "part"),
    [
        pytest.param(
            {"images": np.zeros((0, 8, 8, 1), np.float32), "labels": np.zeros(0, np.int64)}, "empty", id="empty"
        ),
        pytest.param(
            {"images": np.full((20, 1, 8, 8), np.nan, np.float32), "labels": np.arange(20) % 10}, "NaN", id="NaN"
        ),
        pytest.param(
            {"images": np.random.default_rng(0).random((20, 3, 8, 8), np.float32), "labels": np.arange(20) % 10},
            "does not run on the calibration data",
            id="wrong channels",
        ),
        pytest.param({"images": np.zeros((20, 1, 8, 8), np.float32), "labels": np.arange(7)}, "labels", id="labels"),
        pytest.param({"pictures": np.zeros((20, 1, 8, 8), np.float32)}, "pictures", id="key"),
    ],
)
def test_a_malformed_data_set_is_refused(refuse, tmp_path, arrays, part):
    file = tmp_path / "data.npz"
    np.savez(file, **arrays)
    message = refuse(f"data.calibration={{source: npz, file: {file}, layout: NCHW}}")
    assert part in message, message


def test_roles_that_overlap_by_content_are_refused(refuse, tmp_path):
    images = np.random.default_rng(0).random((40, 1, 8, 8), np.float32)
    for name, rows in (("a.npz", slice(0, 30)), ("b.npz", slice(20, 40))):
        np.savez(tmp_path / name, images=images[rows], labels=np.arange(40)[rows] % 10)
    spec = "{{source: npz, file: {}, layout: NCHW}}"
    message = refuse(
        f"data.calibration={spec.format(tmp_path / 'a.npz')}", f"data.evaluation={spec.format(tmp_path / 'b.npz')}"
    )
    assert "10 of 30 examples are the same by content" in message


def test_a_file_that_is_no_recipe_is_refused(refuse, tmp_path):
    missing = refuse(recipe=tmp_path / "none.yaml")
    assert "cannot read the recipe" in missing
    assert "none.yaml': No such file or directory. Give the path of a YAML file." in missing
    file = tmp_path / "recipe.yaml"
    file.write_text("model: [")
    assert "is not YAML" in refuse(recipe=file)
    file.write_text("- 1\n- 2\n")
    assert "a recipe is a mapping" in refuse(recipe=file)
    file.write_bytes(b"\xff\xfe\x00")
    assert "cannot read the recipe" in refuse(recipe=file)


def test_a_folder_with_other_content_is_refused(secateurs, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    ended = secateurs("run", RECIPE, "--output", tmp_path)
    assert ended.code == 2
    assert "not empty (notes.txt)" in ended.err
    assert "--overwrite" in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert secateurs("run", RECIPE, "--output", tmp_path, "--resume").code == 2
    assert secateurs("run", RECIPE, "--output", tmp_path, "--resume", "--overwrite").code == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("option", ["--overwrite", "--resume"])
def test_a_folder_with_a_link_is_refused(secateurs, tmp_path, option):
    other, output = tmp_path / "other", tmp_path / "out"
    other.mkdir()
    (output / ".secateurs").mkdir(parents=True)
    (output / ".secateurs" / "pass1").symlink_to(other)
    ended = secateurs("run", RECIPE, "--output", output, option)
    assert ended.code == 2
    assert "symbolic link '.secateurs/pass1'" in ended.err
    output.rename(tmp_path / "elsewhere")
    output.symlink_to(tmp_path / "elsewhere")
    assert "is not a plain folder" in secateurs("run", RECIPE, "--output", output, option).err
    assert list(other.iterdir()) == []


def test_overwrite_replaces_a_run_and_nothing_else(secateurs, tmp_path):
    mine = dict.fromkeys(("README.md", "config.json", "model.onnx", "recipe.yaml"), "mine")
    for name, text in mine.items():
        (tmp_path / name).write_text(text)
    ended = secateurs("run", RECIPE, "--output", tmp_path, "--overwrite")
    assert ended.code == 2
    assert "holds no run" in ended.err
    assert "--output" in ended.err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == mine


@pytest.mark.parametrize("left", [[".secateurs/pass1/plan.json"], ["report.json", "recipe.yaml", "model.edge.onnx"]])
def test_overwrite_clears_what_a_run_left(tmp_path, left, monkeypatch):
    """Of one that was killed, and of one that ended; one that is killed while it clears can be overwritten too."""
    for name in ("notes.txt", *left):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "glob", _killed)
        with pytest.raises(KeyboardInterrupt):
            open_folder(tmp_path, "0" * 64, resume=False, overwrite=True)
    assert open_folder(tmp_path, "0" * 64, resume=False, overwrite=True) is None
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [".secateurs", "notes.txt"]


def _killed(*_):
    raise KeyboardInterrupt


def test_weights_of_another_network_are_listed_by_name(refuse, tmp_path):
    file = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"layer.weight": torch.zeros(2, 2)}, file)
    message = refuse(f"model.weights={file}")
    assert "layer.weight" in message
    assert "stem" in message


@pytest.mark.parametrize("content", [b"", b"not an onnx file", b"\x08\x07" * 100], ids=["empty", "text", "bytes"])
def test_a_file_that_is_not_onnx_is_refused(secateurs, tmp_path, content):
    file = tmp_path / "bad.onnx"
    file.write_bytes(content)
    ended = secateurs("validate", file, file)
    assert ended.code == 2
    assert "bad.onnx" in ended.err
    assert "ONNX" in ended.err


def test_nothing_prunable_ends_with_exit_code_1_and_says_so(secateurs, tmp_path):
    ended = secateurs(
        "run",
        RECIPE,
        "--output",
        tmp_path / "out",
        "--set",
        "passes=[{cka-cluster: {threshold: 1.0}}]",
        "--set",
        "budget={}",
    )
    assert ended.code == 1
    assert "nothing could be pruned" in ended.out


def test_an_unreachable_target_ends_with_exit_code_1_and_says_by_how_much(secateurs, tmp_path):
    ended = secateurs(
        "run", RECIPE, "--dry-run", "--set", "passes=[{mi-nodes: {target_macs: 0.01, grid: 2, min_units: 8}}]"
    )
    assert ended.code == 1
    assert "`target_macs` 0.01 was not reached" in ended.out


def test_ctrl_c_leaves_no_file_under_a_final_name(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "secateurs", "run", RECIPE, "--output", str(out)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background hands down an ignored interrupt.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 240
    while not out.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert out.exists()
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 3, error
    assert "interrupted" in error
    assert "Traceback" not in error
    assert [path.name for path in out.iterdir()] == [".secateurs"]
