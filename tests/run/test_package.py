"""The packages that would be published: everything of the two import packages, and nothing else."""

from __future__ import annotations

import email
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {"secateurs": ROOT / "plugin" / "secateurs", "secateurs_adapters": ROOT / "adapters" / "secateurs_adapters"}
OUTSIDE = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "constraints.txt", ".gitignore"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build the source package, and the wheel from it, with the build backend that is installed."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    [wheel], [source] = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, source


def files(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }


def test_the_wheel_holds_the_two_packages_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        [metadata] = [name for name in wheel.namelist() if name.endswith("/METADATA")]
        about = email.message_from_bytes(wheel.read(metadata))
    assert names == {f"{package}/{name}" for package, folder in SOURCES.items() for name in files(folder)}
    assert {f"{package}/py.typed" for package in SOURCES} <= names
    assert (about["Name"], about["Version"]) == ("secateurs", "0.1.0")
    assert about["License-Expression"] == "Apache-2.0"
    needed = {line.split(";")[0] for line in about.get_all("Requires-Dist") if "extra ==" not in line}
    assert not any(name in line for line in needed for name in ("onnx", "transformers", "olive", "ray", "optimum"))


def test_the_source_package_holds_what_the_tests_need(built):
    with tarfile.open(built[1]) as source:
        names = {name.split("/", 1)[1] for name in source.getnames()}
    for folder in ("plugin", "adapters", "tests", "examples"):
        assert {f"{folder}/{name}" for name in files(ROOT / folder)} == {
            name for name in names if name.startswith(folder + "/")
        }
    assert {name for name in names if "/" not in name} == OUTSIDE | {"PKG-INFO"}
