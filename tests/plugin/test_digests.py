"""Hashes of what a result was made from: each file that counts changes them, and nothing else does."""

from __future__ import annotations

import hashlib

import pytest

from secateurs import digests
from secateurs.digests import file_digest, module_files
from secateurs.recipe import parse_recipe


def test_a_file_has_its_sha256_and_a_folder_that_of_names_and_contents(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    assert file_digest(tmp_path / "a") == hashlib.sha256(b"1").hexdigest()
    first = file_digest(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert file_digest(tmp_path) != first


def test_a_folder_may_leave_one_below_it_out(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"1")
    first = file_digest(tmp_path)
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "deep" / "b").write_bytes(b"2")
    monkeypatch.chdir(tmp_path)
    assert file_digest(tmp_path, without=(tmp_path / "out").relative_to(tmp_path)) == first
    assert file_digest(tmp_path) != first


def test_of_a_large_folder_sizes_count(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "WHOLE", 3)
    (tmp_path / "a").write_bytes(b"1234")
    first = file_digest(tmp_path)
    assert file_digest(tmp_path) == first
    (tmp_path / "a").write_bytes(b"12345")
    assert file_digest(tmp_path) != first


def test_a_module_brings_what_it_imports_from_its_folder(tmp_path):
    (tmp_path / "package").mkdir()
    for name, text in {
        "net.py": "import json\nimport parts\nfrom package import inner\n",
        "parts.py": "import net\n",
        "package/__init__.py": "",
        "package/inner.py": "",
        "unrelated.py": "",
    }.items():
        (tmp_path / name).write_text(text)
    assert {str(path.relative_to(tmp_path)) for path in module_files("net", tmp_path)} == {
        "net.py",
        "parts.py",
        "package/__init__.py",
        "package/inner.py",
    }
    (tmp_path / "parts.py").write_text("no python (")
    assert tmp_path / "parts.py" in module_files("net", tmp_path)
    assert module_files("json", tmp_path) == set()


def test_a_module_of_a_package_brings_what_it_imports_relatively(tmp_path):
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    (tmp_path / "outer" / "apart").mkdir()
    for name, text in {
        "outer/__init__.py": "from .begin import *\n",
        "outer/begin.py": "",
        "outer/layers.py": "import shared\n",
        "outer/names.py": "",
        "outer/unrelated.py": "",
        "outer/inner/__init__.py": "",
        "outer/inner/net.py": "from ..layers import GAIN\nfrom . import beside, SIZE\nfrom .. import names\nfrom ..apart import x\n",
        "outer/inner/beside.py": "from ....beyond import x\n",
        "outer/inner/unrelated.py": "",
        "outer/apart/__init__.py": "",
        "outer/apart/x.py": "import by_package\n",
        "shared.py": "",
        "by_package.py": "",
        "beyond.py": "",
        "layers.py": "",
        "outer/layers/no_package.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert {path.relative_to(tmp_path).as_posix() for path in module_files("outer.inner.net", tmp_path)} == {
        "outer/__init__.py",
        "outer/begin.py",
        "outer/layers.py",
        "outer/names.py",
        "outer/inner/__init__.py",
        "outer/inner/net.py",
        "outer/inner/beside.py",
        "outer/apart/__init__.py",
        "outer/apart/x.py",
        "shared.py",
        "by_package.py",
    }


def test_a_package_comes_before_a_module_of_its_name(tmp_path):
    (tmp_path / "net").mkdir()
    (tmp_path / "net.py").touch()
    (tmp_path / "net" / "__init__.py").touch()
    assert module_files("net", tmp_path) == {tmp_path / "net" / "__init__.py"}


@pytest.mark.parametrize("name", ["train.npz", "net.py", "parts.py", "more.txt", "pictures/a.png"])
def test_the_digest_of_a_recipe_follows_every_file_that_it_reads(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for file in ("train.npz", "parts.py", "more.txt", "pictures/a.png", "unrelated.py"):
        (tmp_path / file).write_text("x = 1")
    (tmp_path / "net.py").write_text("import parts")
    body = {
        "model": {"factory": "net:build", "arguments": {"names": ["more.txt"]}},
        "data": {
            "calibration": {"source": "npz", "file": "train.npz"},
            "evaluation": {"source": "image_folder", "folder": "pictures"},
        },
        "passes": ["magnitude"],
    }
    first = parse_recipe(body, folder=tmp_path).digest()
    (tmp_path / "unrelated.py").write_text("x = 2")
    assert parse_recipe(body, folder=tmp_path).digest() == first
    (tmp_path / name).write_text("x = 2")
    assert parse_recipe(body, folder=tmp_path).digest() != first
