"""What must start without torch, and the documentation that must run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "onnx", "onnxruntime", "transformers", "sklearn")


@pytest.mark.parametrize(
    "statement",
    [
        "import secateurs",
        "import secateurs.cli as c, contextlib\nwith contextlib.suppress(SystemExit): c.main(['--help'])",
        "import secateurs.cli as c, contextlib\nwith contextlib.suppress(SystemExit): c.main(['passes'])",
        "import secateurs.cli as c, contextlib\nwith contextlib.suppress(SystemExit): c.main(['passes', '--json'])",
        "import secateurs.cli as c, contextlib\nwith contextlib.suppress(SystemExit): c.main(['validate', '--help'])",
        "import secateurs.cli as c, contextlib\nwith contextlib.suppress(SystemExit): c.main(['zoo', '--help'])",
        "import secateurs_adapters.zoo.batch, secateurs_adapters.zoo.executors, secateurs_adapters.zoo.ray_executor",
    ],
    ids=["import", "help", "passes", "passes --json", "validate --help", "zoo", "zoo's process"],
)
def test_it_starts_without_torch(statement):
    program = f"import sys\n{statement}\nprint()\nprint([n for n in {HEAVY!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_passes_lists_every_option_with_its_default(secateurs):
    listed = {item["name"]: item for item in json.loads(secateurs("passes", "--json").out)}
    assert {"cka-cluster", "mi-nodes", "magnitude"} <= set(listed)
    assert listed["cka-cluster"]["plugin"] == "secateurs"
    assert listed["cka-cluster"]["settings"]["threshold"]["default"] == 0.98
    for item in listed.values():
        assert item["summary"]
        assert all(setting["description"] for setting in item["settings"].values()), item["name"]


def _blocks(language: str, page: str = "README.md") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def test_the_readme_has_exactly_one_run_command_and_one_test_command():
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- run-command -->") == 1
    assert text.count("<!-- test-command -->") == 1


@pytest.mark.parametrize("block", _blocks("python", "CONTRIBUTING.md"))
def test_what_contributors_are_told_is_short(block):
    assert len(block.splitlines()) < 30


@pytest.mark.parametrize(
    "block",
    [*_blocks("python"), *_blocks("python", "CONTRIBUTING.md")],
    ids=lambda block: block.strip().splitlines()[0],
)
def test_the_python_of_the_pages_runs(block, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_the_commands_of_the_readme_are_known(secateurs):
    for line in "\n".join(_blocks("sh")).splitlines():
        for command in re.findall(r"(?:^|\s|/)secateurs (\w+)", line):
            assert secateurs(command, "--help").code == 0, line


def test_the_recipes_of_the_examples_resolve():
    from secateurs.recipe import load_recipe

    for path in sorted((ROOT / "examples").glob("*.yaml")):
        if path.name == "zoo.yaml":  # not a recipe; tests/zoo reads it
            continue
        recipe = load_recipe(path)
        assert recipe.passes
        assert recipe.folder == path.parent
