"""Whatever a file holds, a reader returns or refuses it in words; properties over damaged and hostile files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from mutants import mutants
from readers import ROOT, readers

READERS = {reader.name: reader for reader in readers()}
REFUSED_BUT_FOR_OTHER_FILES = {"onnx", "zoo"}
"""Their good files name others that are not there."""


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", READERS)
def test_good_files_are_read(name, tmp_path):
    reader = READERS[name]
    path = tmp_path / f"file{reader.suffix}"
    (tmp_path / "v.data").write_bytes(bytes(16))
    path.write_bytes(reader.good[0])
    assert reader.survives(path) or name == "zoo"


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_read_or_refused_in_words(name, data, tmp_path):
    reader = READERS[name]
    path = tmp_path / f"file{reader.suffix}"
    (tmp_path / "v.data").write_bytes(bytes(16))
    path.write_bytes(data.draw(mutants(reader.good)))
    reader.survives(path)  # raises what is no SecateursError


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_plain_file_is_refused(name, tmp_path):
    reader = READERS[name]
    if name in ("recipe", "zoo", "job", "image"):
        pytest.skip("the path is the user's own, or was listed as a file before")
    import os

    pipe = tmp_path / f"pipe{reader.suffix}"
    os.mkfifo(pipe)
    assert not reader.survives(pipe), "a pipe would never end"
    assert not reader.survives(tmp_path)
    assert not reader.survives(tmp_path / f"none{reader.suffix}")
