"""Ten thousand cases over all readers, guided by coverage: none may crash one."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_no_file_crashes_a_reader():
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed: pip install -e '.[fuzz]'")
    command = [sys.executable, str(Path(__file__).parent / "fuzz_readers.py"), "10000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(found)
    assert sum(found["cases"].values()) >= 10_000
    assert not found["crashes"]
    assert done.returncode == 0, done.stderr[-2000:]
