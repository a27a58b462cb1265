"""The training loop that prunes: it learns on after the pruning, and what it saves is the network that it ended with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import secateurs

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def script(*arguments):
    command = [sys.executable, "-W", "error", EXAMPLES / "training_loop.py", *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)


def test_a_network_is_pruned_in_the_middle_of_its_training(tmp_path, monkeypatch):
    ended = script("--epochs", 3, "--prune-after", 2, "--output", tmp_path / "out")
    assert ended.returncode == 0, ended.stderr
    left = float(re.search(r"([\d.]+) of the MACs left", ended.stdout)[1])
    assert left <= 0.5
    reached = float(re.findall(r"accuracy ([\d.]+)", ended.stdout)[-1])
    assert reached > 0.93

    monkeypatch.syspath_prepend(EXAMPLES)
    import training_loop

    network = secateurs.load(tmp_path / "out", build=training_loop.build).eval()
    assert training_loop.accuracy(network, training_loop.batches_of("evaluation")) == pytest.approx(reached, abs=6e-4)
    before = sum(p.numel() for p in training_loop.build().parameters())
    assert sum(p.numel() for p in network.parameters()) < 0.8 * before
    assert json.loads((tmp_path / "out" / "report.json").read_text())["passes"][0]["name"] == "mi-nodes"
    assert torch.is_grad_enabled()


def test_nothing_to_train_after_the_pruning_is_refused():
    ended = script("--epochs", 2, "--prune-after", 2)
    assert ended.returncode == 2
    assert "--prune-after" in ended.stderr
