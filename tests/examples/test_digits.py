"""The digits example: its weights fit, reach their accuracy, and can be trained again."""

from __future__ import annotations

import doctest
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from secateurs_adapters.datasets import DigitsSettings, load_digits
from secateurs_adapters.models import load_factory

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WEIGHTS = EXAMPLES / "digits_resnet.safetensors"


def build(weights=None, **arguments):
    return load_factory("digits_resnet:build", arguments=arguments, weights=weights, folder=EXAMPLES)


def test_weights_are_small_and_complete():
    assert WEIGHTS.stat().st_size < 1_000_000
    assert load_file(WEIGHTS).keys() == build().state_dict().keys()


@pytest.mark.parametrize(("split", "examples", "floor"), [("train", 1347, 0.995), ("evaluation", 450, 0.985)])
def test_accuracy(split, examples, floor):
    data = load_digits(DigitsSettings(split=split))
    with torch.inference_mode():
        scores = build(WEIGHTS)(torch.from_numpy(data.inputs["input"]))
    assert len(data) == examples
    assert (scores.argmax(1).numpy() == data.labels).mean() >= floor


def test_splits_share_no_image():
    train, evaluation = (load_digits(DigitsSettings(split=split)) for split in ("train", "evaluation"))
    assert (len(train), len(evaluation)) == (1347, 450)
    assert not set(train.fingerprints()) & set(evaluation.fingerprints())


@pytest.mark.parametrize("module", ["digits_resnet", "cifar_resnet"])
def test_doctests(module, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize("arguments", [{"widths": []}, {"widths": [4, 0]}, {"blocks": 0}, {"classes": 0}])
def test_sizes(arguments):
    with pytest.raises(Exception, match="must be positive"):
        build(**arguments)


def test_training_reproduces(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for name in ("a", "b"):
        command = [sys.executable, EXAMPLES / "train_digits.py", "--epochs", "2", "--output", tmp_path / name]
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        assert "of 450" in said
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
