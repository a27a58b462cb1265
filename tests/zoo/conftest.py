"""Zoos are run as users run them: in a process of their own, from the repository's root."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
collect_ignore = ["networks.py", "trivial"]


def _trivial() -> Any:
    spec = importlib.util.spec_from_file_location("trivial_zoo", HERE / "trivial" / "trivial_zoo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Ran:
    """A finished command and the zoo's folder."""

    code: int
    err: str
    output: Path

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """The leaderboard's rows by model."""
        body = json.loads((self.output / "leaderboard.json").read_text())
        return {row["name"]: row for row in body["rows"]}


@dataclass(frozen=True)
class Trivial:
    """Trivial zoos: `write(path, count)` writes one, which child processes run in `environment`."""

    write: Callable[..., Path]
    environment: dict[str, str]


@pytest.fixture(scope="session")
def trivial(tmp_path_factory: pytest.TempPathFactory) -> Trivial:
    """Return what trivial zoos are made with."""
    module = _trivial()
    return Trivial(module.write, module.environment_with_plugin(tmp_path_factory.mktemp("plugin")))


@pytest.fixture(scope="session")
def zoo() -> Iterator[Callable[..., Ran]]:
    """Return a function that runs `secateurs zoo FILE --output FOLDER ARGUMENTS...`; nothing of it may be left running."""
    folders: list[Path] = []

    def run(file: Path, output: Path, *arguments: object, environment: dict[str, str] | None = None) -> Ran:
        folders.append(output)
        command = [sys.executable, "-m", "secateurs", "zoo", str(file), "--output", str(output), *map(str, arguments)]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            check=False,
            timeout=3000,
        )
        return Ran(done.returncode, done.stderr, output)

    yield run
    left = [process for folder in folders for process in running(folder)]
    assert not left, left


def running(folder: Path) -> list[psutil.Process]:
    """Return the processes that work in a zoo's folder: those that hold the lock of one of its models."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(Path(file.path).is_relative_to(folder) for file in process.open_files()):
                found.append(process)
        except psutil.Error:
            continue
    return found
