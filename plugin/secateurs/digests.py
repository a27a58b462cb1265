"""Hashes of files, of folders, and of the source of a module: what a result was made from.

A file is read in pieces, and read again only after it has changed.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = ["combined_digest", "file_digest", "module_files"]

WHOLE = 4 * 2**30
"""Bytes up to which the files of a folder are hashed whole; of a larger one, names, sizes and times of change count."""


def file_digest(path: Path, without: Path | None = None) -> str:
    """Return the SHA-256 of a file, or of everything in a folder.

    Args:
        path: of the file or folder; it exists.
        without: a folder below it whose content does not count, such as the one that a run writes.
    """
    if path.is_file():
        seen = path.stat()
        return _content(path.resolve(), seen.st_size, seen.st_mtime_ns)
    root, skipped = path.resolve(), None if without is None else without.resolve()
    files = (file for file in sorted(root.rglob("*")) if file.is_file())
    return combined_digest(root, [file for file in files if skipped not in file.parents])


def combined_digest(root: Path, files: Iterable[Path]) -> str:
    """Return one SHA-256 of the names and contents of files in a folder, in the order given."""
    stats = {file: file.stat() for file in files}
    whole = sum(stat.st_size for stat in stats.values()) <= WHOLE
    hashed = hashlib.sha256()
    for file, stat in stats.items():
        content = file_digest(file) if whole else f"{stat.st_size} {stat.st_mtime_ns}"
        hashed.update(f"{file.relative_to(root)}\0{content}\n".encode())
    return hashed.hexdigest()


def module_files(name: str, folder: Path) -> set[Path]:
    """Return the files of a module in a folder, and of the modules there that it imports, directly or not.

    Args:
        name: dotted, as in `import NAME`; what is installed elsewhere has no files here.
        folder: where the import begins.
    """
    found: set[Path] = set()
    waiting = [name]
    while waiting:
        wanted = waiting.pop()
        for depth in range(1, wanted.count(".") + 2):  # `a.b` runs `a/__init__.py` first
            module = ".".join(wanted.split(".")[:depth])
            for file in _files_of(module, folder, whole=module == wanted) - found:
                found.add(file)
                waiting += _imports(file.read_text(encoding="utf-8", errors="replace"), _package(file, folder))
    return found


def _files_of(module: str, folder: Path, *, whole: bool) -> set[Path]:
    """Return the file of a module, or of a package its `__init__.py`, with `whole` every module in it."""
    stem = folder.joinpath(*module.split("."))
    package = stem / "__init__.py"
    if package.is_file():  # comes before a module of the same name
        return {file for file in stem.rglob("*.py") if file.is_file()} if whole else {package}
    file = stem.with_suffix(".py")
    return {file} if file.is_file() else set()


def _package(file: Path, folder: Path) -> list[str]:
    """Return the parts of the name of the package that a file is in: what `.` means in its relative imports."""
    return list(file.parent.relative_to(folder).parts) if file.is_relative_to(folder) else []


def _imports(source: str, package: Sequence[str]) -> set[str]:
    """Return the names of the modules that a source may import; none if it is not Python.

    Args:
        source: its text.
        package: the parts of the name of the package it is in.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # a null byte in older versions of Python
        return set()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level <= len(package):  # more dots are an error when it runs
            above = package[: len(package) - node.level + 1] if node.level else ()
            owner = ".".join([*above, *([node.module] if node.module else [])])
            given = {alias.name for alias in node.names}
            names.update(f"{owner}.{name}" for name in given - {"*"})
            if node.module or "*" in given:  # `from . import name` needs no more of the package
                names.add(owner)
    return names


@functools.cache
def _content(path: Path, _size: int, _changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
