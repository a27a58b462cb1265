"""The example plugin, installed as a user would, beside plugins that are broken in every way a stranger's can be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONTRACT = """
import sys
sys.path.insert(0, {folder!r})
from networks import images, mlp, residual, vectors
from secateurs.testing import PassContract
from secateurs_drop_last.drop_last import DropLastBlock

outcome = PassContract(lambda: DropLastBlock(count=2), residual(), images(32)).check()
assert [edit.path for edit in outcome.plan.edits] == ["layers.3", "layers.1"], outcome.plan
assert outcome.plan.edits[0].reason == "number 1 from the output of 3 removable blocks", outcome.plan

short = PassContract(lambda: DropLastBlock(count=9), residual(), images(32)).check()
assert len(short.plan) == 3
assert any("`count` is 9, and only 3 of 4 blocks" in item.reason for item in short.records[0].skipped)

none = PassContract(DropLastBlock, mlp(), vectors(32)).check()
assert not none.plan
assert none.records[0].skipped[0].where == "the network"
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return a folder with the example plugin as pip installs it."""
    target = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-build-isolation",
    ]
    done = subprocess.run(
        [*command, "--no-index", "--target", str(target), str(ROOT / "examples" / "plugin_example")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return target


def project(folder: Path, name: str, source: str) -> Path:
    """Write a plugin as an installed distribution: one module and the metadata that names it."""
    module = name.replace("-", "_")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-1.2.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2.3\n")
    (info / "entry_points.txt").write_text(f"[secateurs]\n{name} = {module}\n")
    return folder


def python(*arguments: str, path: list[Path]) -> subprocess.CompletedProcess[str]:
    """Run Python with folders of plugins in front of everything that is installed."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "COLUMNS": "200",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("SECATEURS_DISABLE_PLUGINS", None)
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False, cwd=path[0]
    )


def listed(*path: Path) -> tuple[subprocess.CompletedProcess[str], dict[str, dict]]:
    """Return `secateurs passes --json` with plugins, and its passes by name."""
    done = python("-m", "secateurs", "passes", "--json", path=list(path))
    return done, {item["name"]: item for item in json.loads(done.stdout)} if done.returncode == 0 else {}


REGISTERS = """
from secateurs import hookimpl

@hookimpl
def secateurs_register_passes(register):
    register("drop-last-block", "somewhere:Else", summary="another one")
"""
BROKEN = {
    "missing-runtime": ("raise ImportError('no runtime here')\n", "cannot be imported (ImportError: no runtime here)"),
    "bad-syntax": ("def (:\n", "cannot be imported (SyntaxError"),
    "misspelt-hook": (
        "from secateurs import hookimpl\n\n\n@hookimpl\ndef secateurs_register_pases(register):\n    pass\n",
        "secateurs_register_pases",
    ),
    "wrong-argument": (
        "from secateurs import hookimpl\n\n\n@hookimpl\ndef secateurs_register_passes(registrar):\n    pass\n",
        "registrar",
    ),
    "raises": (
        "from secateurs import hookimpl\n\n\n@hookimpl\ndef secateurs_register_passes(register):\n    1 / 0\n",
        "failed while registering (ZeroDivisionError",
    ),
}


def test_the_installed_pass_is_listed_with_its_options(installed):
    done, passes = listed(installed)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    entry = passes["drop-last-block"]
    assert entry["plugin"] == "drop-last"
    assert entry["settings"]["count"]["default"] == 1
    assert {"cka-cluster", "mi-nodes", "magnitude"} <= set(passes)


def test_the_installed_pass_keeps_the_contract(installed):
    done = python("-c", CONTRACT.format(folder=str(Path(__file__).parent)), path=[installed])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("source", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_plugin_is_named_and_stops_nothing(request, installed, tmp_path, source, reason):
    name = request.node.callspec.id
    done, passes = listed(project(tmp_path / "broken", name, source), installed)
    warning = " ".join(done.stderr.split())
    assert done.returncode == 0, done.stderr
    assert f"warning: plugin {name!r} of {name} 1.2.3" in warning
    assert reason in warning
    assert f"SECATEURS_DISABLE_PLUGINS={name}" in warning
    assert {"cka-cluster", "mi-nodes", "magnitude", "drop-last-block"} <= set(passes)


def test_two_owners_of_one_name_are_both_named(installed, tmp_path):
    done, _ = listed(project(tmp_path / "second", "rival", REGISTERS), installed)
    message = " ".join(done.stderr.split())
    assert done.returncode == 2, done.stderr
    assert "two plugins register the pass 'drop-last-block'" in message
    assert "'drop-last'" in message
    assert "'rival'" in message
    assert "secateurs_drop_last.drop_last:DropLastBlock" in message
    assert "somewhere:Else" in message
