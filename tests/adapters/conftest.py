"""Makes the modules beside the tests importable, and exports each of their networks once."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Return a function that exports a network of `shipped.py`, by its name, and gives its file."""
    from shipped import export

    files = {}

    def file(name):
        if name not in files:
            files[name] = export(name, tmp_path_factory.mktemp(name) / "model.onnx")
        return files[name]

    return file
