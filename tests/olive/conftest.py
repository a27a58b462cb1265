"""What the tests of Olive share: no telemetry, the repository as working directory, and the example's configuration."""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from olive_example import CALIBRATION, QUICK, ROOT

os.environ["OLIVE_DISABLE_TELEMETRY"] = "1"
os.environ["CI"] = "1"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Let paths of the example be found."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def example():
    """Return the configuration in `examples/olive`, with quicker settings of pruning and fewer images."""
    config = json.loads((ROOT / "examples/olive/digits.json").read_text())
    config["passes"]["prune"] |= {**QUICK, "data": {"calibration": CALIBRATION}}
    return config


@pytest.fixture
def workflow(example, tmp_path):
    """Return a function of settings to a configuration of the pruning pass alone, on a smaller network, in folders of its own."""

    def made(**settings):
        config = copy.deepcopy(example)
        config["passes"] = {"prune": {**config["passes"]["prune"], **settings}}
        small = {"model_script": "tests/olive/small_digits.py", "model_loader": "load_small", "model_path": None}
        config["input_model"] |= small
        del config["evaluator"], config["evaluators"]
        return {**config, "cache_dir": str(tmp_path / "cache"), "output_dir": str(tmp_path / "out")}

    return made
