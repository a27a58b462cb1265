"""Settings that all tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import settings

# The same examples are tried each time, so that a change is judged and not luck; HYPOTHESIS_SEARCH=1 looks for new ones.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile("search" if os.environ.get("HYPOTHESIS_SEARCH") else "same")

TOGETHER = {
    "tests/adapters/test_bundle.py",
    "tests/adapters/test_converters.py",
    "tests/adapters/test_pages_in_chromium.py",
    "tests/architectures/test_decoders.py",
    "tests/architectures/test_stories260k.py",
    "tests/examples/test_own_architecture.py",
    "tests/examples/test_tiny_llama.py",
    "tests/huggingface/test_runs.py",
    "tests/olive/test_workflow.py",
    "tests/plugin/test_plugin_example.py",
    "tests/plugin/test_search.py",
    "tests/run/test_package.py",
    "tests/run/test_quantise.py",
    "tests/run/test_quickstart.py",
    "tests/run/test_readme.py",
    "tests/run/test_search.py",
    "tests/run/test_terminal.py",
    "tests/zoo/test_zoo.py",
}
"""Files whose tests share what takes long to make. (The marks of pytest-xdist 3.8 for this have no effect with pytest 9.2.)"""
SAME = dict.fromkeys(["tests/run/test_readme.py", "tests/run/test_terminal.py"], "tests/run/test_quickstart.py")
"""Files that share with another file."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give all tests of a file in `TOGETHER` to one worker, and the others one by one."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return SAME.get(file, file) if file in TOGETHER else nodeid

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def _own_environment():
    """Undo what a test or a library changes in the environment: the programs that later tests start would inherit it."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def fresh_example_modules():
    """Forget the modules of the examples for one test, which imports copies of its own."""
    names = {path.stem for path in (Path(__file__).resolve().parents[1] / "examples").glob("*.py")}
    before = {name: sys.modules.pop(name) for name in names & set(sys.modules)}
    yield
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(before)
