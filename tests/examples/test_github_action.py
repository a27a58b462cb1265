"""The GitHub Action of the examples: its commands exist, run, and fail where a budget breaks."""

from __future__ import annotations

import re
import shlex
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import yaml

from secateurs import cli
from secateurs.manager import create_manager

ROOT = Path(__file__).resolve().parents[2]
ACTION = yaml.safe_load((ROOT / "examples/ci/github-action.yml").read_text())
STEPS = ACTION["jobs"]["budget"]["steps"]
COMMANDS = [shlex.split(step["run"])[1:] for step in STEPS if step.get("run", "").startswith("secateurs ")]
SMALL = {
    "model": {"factory": "digits_resnet:build", "arguments": {"widths": [16], "blocks": 1}},
    "data": {"calibration": {"source": "digits", "split": "train", "samples": 64}},
    "passes": [{"magnitude": {"target_macs": 0.5}}],
    "export": {"exporter": "torchscript"},
    "budget": {"macs_ratio": 0.5},
    "targets": [{"repeats": 4, "warmup": 1, "max_processes": 5, "memory_repeats": 1}],
}


def ended(command):
    with pytest.raises(SystemExit) as caught:
        cli.main(command)
    return caught.value.code


@pytest.fixture
def checkout(tmp_path, monkeypatch, fresh_example_modules):
    """Change into a copy of the examples, in which recipe and zoo are small."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    Path("examples/quickstart.yaml").write_text(yaml.safe_dump(SMALL))
    zoo = {"schema": 1, "entries": [{"name": "one", "recipe": "examples/quickstart.yaml"}]}
    Path("examples/zoo.yaml").write_text(yaml.safe_dump(zoo))
    return tmp_path


def test_it_runs_on_pull_requests_and_every_step_does_something():
    assert ACTION[True] == "pull_request"  # `on` is a truth value in YAML 1.1
    assert [command[0] for command in COMMANDS] == ["run", "validate", "zoo"]
    for step in STEPS:
        assert ("run" in step) != ("uses" in step)
        assert "uses" not in step or re.fullmatch(r"[\w/.-]+@v\d+", step["uses"])


def test_every_option_and_file_exists():
    group = cli.build_app(create_manager())
    for name, *arguments in COMMANDS:
        known = {option for parameter in group.commands[name].params for option in parameter.opts}
        assert {word for word in arguments if word.startswith("-")} <= known
        for word in arguments:
            assert not word.startswith("examples/") or (ROOT / word).is_file()


def test_all_verdicts_pass_and_are_written_for_the_server(checkout):
    for command in COMMANDS:
        assert ended(command) == 0, command
    for name in ("validate", "zoo"):
        suites = ET.parse(checkout / "junit" / f"{name}.xml").getroot()
        assert int(suites.find("testsuite").get("tests")) > 0
        assert suites.find(".//failure") is None
    kept = next(step["with"]["path"].split() for step in STEPS if step.get("uses", "").startswith("actions/upload"))
    assert all((checkout / path).exists() for path in kept)

    Path("examples/ci/budget.yaml").write_text("artifact_mib: 0.0001\n")
    assert ended(COMMANDS[1]) == 1
    assert ET.parse(checkout / "junit" / "validate.xml").getroot().find(".//failure") is not None
