"""What determines a result, as one hash: recipe, weights, data, source code, libraries.

Two runs with the same key would find the same; so a result that is there is never made again, and one that anything
has changed under is never taken for new.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from secateurs.digests import combined_digest, file_digest

if TYPE_CHECKING:
    from secateurs.recipe import Recipe

__all__ = ["code_digest", "environment_digest", "library_versions", "result_key"]

_PACKAGE, _GROUP = "secateurs", "secateurs"
_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)")


def result_key(recipe: Recipe, environment: str) -> str:
    """Return the key of a recipe's result, 32 hexadecimal digits.

    Args:
        recipe: resolved; its provider and targets are in it.
        environment: from `environment_digest`.
    """
    parts = {
        "recipe": yaml.safe_load(recipe.to_yaml()),
        "files": {str(path): file_digest(path) for path in recipe.files()},
        "environment": environment,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


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
            hashed.update(combined_digest(root, sorted(root.rglob("*.py"))).encode())
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
