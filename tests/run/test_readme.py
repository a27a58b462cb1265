"""Every command and every piece of a recipe in the README, as it stands there; what takes minutes is `long`.

The commands run in order in one folder beside which the examples lie as in a clone, so a command may need what one before it wrote.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from secateurs.manager import create_manager
from secateurs.pipeline import build_pass
from secateurs.recipe import parse_recipe, settings_from

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SHARED = ROOT.parent / "shared"
QUICK = ("secateurs inspect", "secateurs passes", "secateurs validate secateurs-out")
WHOLE = {
    "model": {"factory": "digits_resnet:build"},
    "data": {"calibration": {"source": "digits"}, "evaluation": {"source": "digits", "split": "evaluation"}},
    "passes": ["magnitude"],
}
"""What a piece of a recipe leaves out."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [re.sub(r"\s+#.*", "", line) for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("python3 -m venv")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, quickstart):
    """A folder with the examples, the shared data where it is looked for, and the result of the README's first command."""
    place = tmp_path_factory.mktemp("readme") / "clone"
    shutil.copytree(ROOT / "examples", place / "examples")
    if SHARED.is_dir():
        (place.parent / "shared").symlink_to(SHARED)
    shutil.copytree(quickstart[0], place / "secateurs-out")
    return place


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "command", [line if line.startswith(QUICK) else pytest.param(line, marks=pytest.mark.long) for line in commands()]
)
def test_a_command_ends_well(command, folder):
    if "../shared" in command and not SHARED.is_dir():
        pytest.skip("needs the project's data, which does not lie beside this checkout")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["/bin/sh", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_first_command_works_in_a_clone(tmp_path):
    """It installs from a package index, where the other tests have everything installed."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tmp_path / "clone")], check=True)
    command = next(line for line in blocks("sh") if line.startswith("python3 -m venv"))
    done = subprocess.run(["/bin/sh", "-c", command], cwd=tmp_path / "clone", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "clone" / "secateurs-out" / "report.html").is_file()


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.split(":")[0])
def test_a_piece_of_a_recipe_is_one(block):
    recipe = parse_recipe({**WHOLE, **yaml.safe_load(block)}, folder=ROOT)
    assert parse_recipe(yaml.safe_load(recipe.to_yaml()), folder=ROOT) == recipe
    manager = create_manager()
    known = manager.registries
    assert recipe.metric in known.metrics
    assert recipe.export.exporter in known.exporters
    for spec in recipe.passes:
        build_pass(spec, manager)
    for role, spec in recipe.data.items():
        options = {"processor": "the network's", **spec.options} if spec.source == "hf" else spec.options
        settings_from(known.datasets[spec.source].load_settings(), options, role)


def test_every_language_is_known():
    assert set(re.findall(r"^```(\w+)$", TEXT, flags=re.MULTILINE)) == {"python", "sh", "yaml"}
