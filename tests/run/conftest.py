"""Runs of the command line in this process, and one whole run of the quickstart that the tests of this folder share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from secateurs import cli

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Finished:
    """What a command ended with."""

    code: int
    out: str
    err: str


@pytest.fixture
def secateurs(capsys, monkeypatch):
    """Return a function that runs `secateurs ARGUMENTS...` from the repository's root."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Finished:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Finished(ended.value.code, captured.out, " ".join(captured.err.split()))

    return run


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory):
    """Return the output folder of one run of the quickstart and its exit code."""
    folder = tmp_path_factory.mktemp("quickstart") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        with pytest.raises(SystemExit) as ended:
            cli.main(["run", "examples/quickstart.yaml", "--output", str(folder)])
    return folder, ended.value.code
