"""What determines a result, as one hash: recipe, weights, data, source code, libraries.

Two runs with the same key would find the same; so a result that is there is never made again, and one that anything
has changed under is never taken for new.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from secateurs.recipe import Recipe

__all__ = ["code_digest", "environment_digest", "file_digest", "library_versions", "result_key"]

_PACKAGE, _GROUP = "secateurs", "secateurs"
_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)")
_WHOLE = 4 * 2**30
"""Bytes up to which the files of a folder are hashed whole; of a larger one, names, sizes and times of change count."""


def result_key(recipe: Recipe, environment: str) -> str:
    """Return the key of a recipe's result, 32 hexadecimal digits.

    Args:
        recipe: resolved; its provider and targets are in it.
        environment: from `environment_digest`.
    """
    parts = {
        "recipe": yaml.safe_load(recipe.to_yaml()),
        "files": {str(path): file_digest(path) for path in _files(recipe)},
        "environment": environment,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _files(recipe: Recipe) -> Iterator[Path]:
    """Yield the files and folders that a recipe names: weights, data, arguments, and the factory's own modules."""
    named = [recipe.model.weights, recipe.model.value, *_texts(recipe.model.arguments)]
    named += [text for spec in recipe.data.values() for text in _texts(spec.options)]
    for name in named:
        if name and (path := Path(name)).exists():
            yield path
    if recipe.model.loader == "factory":
        yield from sorted(_modules(recipe.model.value.partition(":")[0], recipe.folder, set()))


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in nested options that could be a path."""
    if isinstance(value, str) and 0 < len(value) < 1024 and "\0" not in value and "\n" not in value:
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _modules(name: str, folder: Path, found: set[Path]) -> set[Path]:
    """Return the files of a module in the recipe's folder and of what it imports from there."""
    stem = folder.joinpath(*name.split("."))
    file = next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()), None)
    if file is None or file in found:
        return found
    found.add(file)
    if file.name == "__init__.py":
        found.update(file.parent.rglob("*.py"))
    for imported in _imports(file.read_text(encoding="utf-8", errors="replace")):
        _modules(imported, folder, found)
    return found


def _imports(source: str) -> set[str]:
    """Return the names of the modules that a source imports absolutely; none if it is not Python."""
    import ast

    try:
        tree = ast.parse(source)
    except SyntaxError:
        return set()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
    return names


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of everything in a folder; one that has not changed is read once."""
    if path.is_file():
        seen = path.stat()
        return _content(path.resolve(), seen.st_size, seen.st_mtime_ns)
    return _combined(path, [file for file in sorted(path.rglob("*")) if file.is_file()])


@functools.cache
def _content(path: Path, _size: int, _changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _combined(root: Path, files: Iterable[Path]) -> str:
    stats = {file: file.stat() for file in files}
    whole = sum(stat.st_size for stat in stats.values()) <= _WHOLE
    hashed = hashlib.sha256()
    for file, stat in stats.items():
        content = file_digest(file) if whole else f"{stat.st_size} {stat.st_mtime_ns}"
        hashed.update(f"{file.relative_to(root)}\0{content}\n".encode())
    return hashed.hexdigest()


def environment_digest() -> str:
    """Return a hash of source code and library versions: what has to be the same on every machine of a zoo."""
    return hashlib.sha256(json.dumps([code_digest(), library_versions()]).encode()).hexdigest()


def code_digest() -> str:
    """Return a hash of the source of Secateurs and of every plugin that is installed."""
    names = {_PACKAGE, *(entry.value.split(":")[0] for entry in importlib.metadata.entry_points(group=_GROUP))}
    hashed = hashlib.sha256()
    for name in sorted({name.split(".")[0] for name in names}):
        spec = importlib.util.find_spec(name)
        if spec is None:
            continue
        roots = [Path(place) for place in spec.submodule_search_locations or ()]
        single = [] if roots or not spec.origin else [Path(spec.origin)]
        for root in roots:
            hashed.update(_combined(root, sorted(root.rglob("*.py"))).encode())
        for file in single:
            hashed.update(file_digest(file).encode())
    return hashed.hexdigest()


def library_versions() -> dict[str, str]:
    """Return Python's version and those of the installed libraries that Secateurs may use, by name."""
    found = {"python": platform.python_version(), _PACKAGE: importlib.metadata.version(_PACKAGE)}
    for requirement in importlib.metadata.requires(_PACKAGE) or ():
        name = _REQUIREMENT.match(requirement)
        if name is None or "extra == 'dev'" in requirement.replace('"', "'"):
            continue
        try:
            found[name[1]] = importlib.metadata.version(name[1])
        except importlib.metadata.PackageNotFoundError:
            continue
    return dict(sorted(found.items()))
