"""Whole runs whose recovery is shared by several processes, fails in one of them, or is interrupted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from secateurs import runner
from secateurs.manager import create_manager
from secateurs.pipeline import run_passes
from secateurs.plan import Plan
from secateurs.recipe import load_recipe
from secateurs.run_folder import OUTPUTS

ROOT = Path(__file__).resolve().parents[2]

RECIPE = """
schema: 1
model: {model}
data:
  calibration: {{source: digits, split: train}}
  evaluation: {{source: digits, split: evaluation}}
metric: accuracy
passes:
  - magnitude: {{target_macs: 0.7}}
recovery: {{epochs: 3, precision: no, gradient_accumulation: 2}}
"""

FAILING = """
import digits_resnet
from secateurs import processes

class Network(digits_resnet.DigitsResNet):
    def forward(self, images):
        if self.training and processes.rank() == 1:
            raise RuntimeError("out of luck")
        return super().forward(images)

def build():
    return Network((16, 32, 48), 3, 10)
"""


WEIGHTS = ROOT / "examples" / "digits_resnet.safetensors"
TRAINED = f'{{factory: "digits_resnet:build", weights: {WEIGHTS}}}'
FAILS = f'{{factory: "failing_network:build", weights: {WEIGHTS}}}'
TINY = '{factory: "digits_resnet:build", arguments: {widths: [8, 12], blocks: 1}}'


def written(folder: Path, model: str = TRAINED) -> Path:
    """Write the recipe, and what its factory needs, into a folder."""
    (folder / "digits_resnet.py").write_bytes((ROOT / "examples" / "digits_resnet.py").read_bytes())
    (folder / "failing_network.py").write_text(FAILING)
    (folder / "recipe.yaml").write_text(RECIPE.format(model=model))
    return folder / "recipe.yaml"


def launched(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `secateurs ARGUMENTS...` as two processes with accelerate's launcher, on the CPU."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    return subprocess.run(
        [*command, "--main_process_port", "0", "-m", "secateurs", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        check=False,
    )


@pytest.mark.long
def test_two_processes_give_one_folder_and_one_report(tmp_path):
    recipe, out = written(tmp_path), tmp_path / "out"
    done = launched("run", recipe, "--output", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("verdict: pass") == 1
    assert set(OUTPUTS) <= {path.name for path in out.iterdir()}
    assert not (out / ".secateurs").exists()
    assert json.loads((out / "report.json").read_text())["verdict"] == "pass"
    prepared = runner.prepare(load_recipe(recipe), create_manager())
    alone = run_passes(prepared.session, prepared.passes, prepared.manager)
    assert Plan.load(out / "plan.json") == alone.plan
    trained = safetensors.torch.load_file(out / "model.safetensors")
    pruned = alone.model.state_dict()
    assert {name: value.shape for name, value in trained.items()} == {
        name: value.shape for name, value in pruned.items()
    }
    again = launched("run", recipe, "--output", out, "--resume", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["verdict"] == "pass"


@pytest.mark.long
def test_what_the_user_got_wrong_is_said_once(tmp_path):
    done = launched("run", written(tmp_path), "--output", tmp_path / "out", "--set", "recovery.epoch=1")
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert "unknown option 'epoch'" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_all_end_when_one_process_fails(tmp_path):
    done = launched("run", written(tmp_path, FAILS), "--output", tmp_path / "out")
    assert done.returncode == 1
    assert "error: process 1: the run failed: RuntimeError: out of luck" in " ".join(done.stderr.split())
    assert "verdict" not in done.stdout


class Interrupted(Exception):
    pass


@pytest.mark.usefixtures("fresh_example_modules")
def test_a_run_resumes_in_the_middle_of_its_recovery(tmp_path):
    recipe = load_recipe(written(tmp_path, TINY))
    seen = []

    def prepared(stop):
        def progress(event):
            seen.append((event.task, event.detail))
            if (event.task, event.done) == ("recovery", stop):
                raise Interrupted

        seen.clear()
        # The files are exported, but not measured: only the training matters here.
        return replace(runner.prepare(recipe, create_manager(), progress), targets=[])

    runner.run(prepared(None), tmp_path / "whole")
    epochs = [detail for task, detail in seen if task == "recovery" and detail.startswith("epoch")]
    steps = sum(task == "recovery" for task, _ in seen) - len(epochs)
    with pytest.raises(Interrupted):
        runner.run(prepared(steps - 1), tmp_path / "out")
    assert (tmp_path / "out" / ".secateurs" / "recovery").is_dir()
    runner.run(prepared(None), tmp_path / "out", resume=True)
    assert [detail for task, detail in seen if task == "recovery" and detail.startswith("epoch")] == epochs[2:]
    assert not any(task == "magnitude" for task, _ in seen)
    whole, out = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(value, out[name]) for name, value in whole.items())
    assert not (tmp_path / "out" / ".secateurs").exists()


@pytest.mark.usefixtures("fresh_example_modules")
def test_settings_that_cannot_work_are_found_before_anything_is_pruned(secateurs, tmp_path):
    failed = secateurs(
        "run",
        written(tmp_path),
        "--output",
        tmp_path / "out",
        "--set",
        "recovery.loop=plain",
        "--set",
        "recovery.precision=bf16",
    )
    assert failed.code == 2
    assert "`recovery.precision: bf16` needs accelerate" in failed.err
    assert not (tmp_path / "out").exists()
