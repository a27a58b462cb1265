"""ZOO.yaml: which models are pruned by which recipes for which targets.

```yaml
schema: 1
defaults: {timeout: 1800, memory_mib: 4096, retries: 1, set: {seed: 0}}
entries:
  - {name: digits, recipe: examples/quickstart.yaml, set: {recovery.epochs: 1}, timeout: 300}
matrix:                                # models x recipes x targets: one entry for each combination
  models: {resnet20: {set: {depth: 20}}, resnet56: {set: {depth: 56}}}
  recipes: {half: {recipe: examples/cifar_resnet.yaml, set: {passes.mi-nodes.target_macs: 0.5}}}
  targets: {cpu: {set: {targets: [{threads: 1}]}}}
```

Every part may say `recipe`, `set`, `timeout`, `memory_mib` and `retries`; what is said later wins: defaults, model, recipe, target.
`set` holds what `secateurs run --set` takes. Paths are relative to the working directory.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from secateurs.errors import RecipeError, UserError, unknown_name
from secateurs.plain_yaml import load_yaml
from secateurs.recipe import Recipe, load_recipe, settings_from

if TYPE_CHECKING:
    from secateurs.manager import Manager

__all__ = ["AXES", "Entry", "Limits", "load_zoo", "parse_zoo"]

AXES = ("models", "recipes", "targets")
"""What a matrix multiplies, in the order of the parts of a name."""
_KEYS = ("schema", "defaults", "entries", "matrix")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")


class Limits(BaseModel):
    """What one model may take.

    Attributes:
        timeout: seconds of its process; waiting for its turn to measure does not count.
        memory_mib: resident MiB of its process and of those that it starts; None is no limit.
        retries: how often it is started again after a crash of its process.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    timeout: float = Field(3600.0, gt=0, allow_inf_nan=False)
    memory_mib: int | None = Field(None, ge=1)
    retries: int = Field(1, ge=0, le=10)


@dataclass(frozen=True)
class Entry:
    """One model of the zoo, with the recipe that prunes it.

    Attributes:
        name: unique in the zoo; its files are named after it.
        source: the recipe's file.
        recipe: the recipe with everything that was set, resolved.
        limits: what it may take.
    """

    name: str
    source: Path
    recipe: Recipe
    limits: Limits


class _Part(BaseModel):
    """What defaults, entries and the parts of a matrix may say; None leaves it to the part before."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    timeout: float | None = Field(None, gt=0, allow_inf_nan=False)
    memory_mib: int | None = Field(None, ge=1)
    retries: int | None = Field(None, ge=0, le=10)


class _NamedPart(_Part):
    name: str | None = None


def load_zoo(path: Path, overrides: Sequence[str] = (), manager: Manager | None = None) -> list[Entry]:
    """Read a zoo file and every recipe that it names.

    Args:
        path: of the YAML file.
        overrides: `key=value` strings for every recipe, as `secateurs run --set` takes them.
        manager: where given, passes, data sources, metric, exporter and providers of every recipe must be registered in it.

    Raises:
        RecipeError: a file is missing, is not YAML, or does not follow the form; the message names the entry and the key.
    """
    return parse_zoo(load_yaml(path, "zoo"), overrides, manager)


def parse_zoo(data: Any, overrides: Sequence[str] = (), manager: Manager | None = None) -> list[Entry]:
    """Check a zoo given as data, and read its recipes; arguments and errors as for `load_zoo`."""
    if not isinstance(data, Mapping):
        raise RecipeError(f"a zoo is a mapping with the keys {', '.join(_KEYS)}; got {type(data).__name__}.")
    for key in data:
        if key not in _KEYS:
            raise RecipeError(unknown_name("key of a zoo", str(key), _KEYS))
    if data.get("schema", 1) != 1:
        raise RecipeError("`schema` must be 1, the only version there is.")
    defaults: _Part = _part(_Part, data.get("defaults"), "defaults")
    entries: list[Entry] = []
    for where, name, parts in itertools.chain(_listed(data.get("entries")), _matrices(data.get("matrix"))):
        entry = _entry(where, name, [defaults, *parts], overrides, manager)
        if any(other.name == entry.name for other in entries):
            raise RecipeError(
                f"`{where}`: the name {entry.name!r} is taken by another entry; give each a `name` of its own."
            )
        entries.append(entry)
    if not entries:
        raise RecipeError("the zoo has neither `entries` nor a `matrix`; see examples/zoo.yaml for a complete one.")
    return entries


def _listed(value: Any) -> Iterator[tuple[str, str | None, list[_Part]]]:
    if not isinstance(value or [], list):
        raise RecipeError(f"`entries` must be a list, got {value!r}.")
    for number, item in enumerate(value or []):
        part: _NamedPart = _part(_NamedPart, item, f"entries.{number}")
        yield f"entries.{number}", part.name, [part]


def _matrices(value: Any) -> Iterator[tuple[str, str, list[_Part]]]:
    matrices = value if isinstance(value, list) else [] if value is None else [value]
    for number, matrix in enumerate(matrices):
        where = f"matrix.{number}" if isinstance(value, list) else "matrix"
        if not isinstance(matrix, Mapping) or not matrix:
            raise RecipeError(f"`{where}` must be a mapping with the keys {', '.join(AXES)}; got {matrix!r}.")
        for key in matrix:
            if key not in AXES:
                raise RecipeError(f"{where}: " + unknown_name("axis of a matrix", str(key), AXES))
        axes = [_axis(matrix[axis], f"{where}.{axis}") for axis in AXES if axis in matrix]
        for chosen in itertools.product(*axes):
            name = "-".join(name for name, _ in chosen)
            yield f"{where}, {name}", name, [part for _, part in chosen]


def _axis(value: Any, where: str) -> list[tuple[str, _Part]]:
    if not isinstance(value, Mapping) or not value:
        raise RecipeError(
            f"`{where}` must map names to their parts (`resnet20: {{set: {{depth: 20}}}}`); got {value!r}."
        )
    return [(str(name), _part(_Part, part, f"{where}.{name}")) for name, part in value.items()]


def _part(model: type[_Part], value: Any, where: str) -> Any:
    if not isinstance(value, Mapping | None):
        raise RecipeError(f"`{where}` must be a mapping with the keys {', '.join(model.model_fields)}; got {value!r}.")
    return settings_from(model, {str(key): item for key, item in (value or {}).items()}, where)


def _entry(
    where: str, name: str | None, parts: Sequence[_Part], overrides: Sequence[str], manager: Manager | None
) -> Entry:
    """Put the parts of an entry together, the later ones first, and read its recipe."""
    said: dict[str, Any] = {}
    for part in parts:
        said |= part.model_dump(exclude_none=True, exclude={"set", "name"})
    settings = {key: value for part in parts for key, value in part.set.items()}
    if "recipe" not in said:
        raise RecipeError(f"`{where}` names no recipe; give `recipe: FILE.yaml` in it or in `defaults`.")
    source = Path(said.pop("recipe"))
    name = source.stem if name is None else name
    if not _NAME.fullmatch(name):
        raise RecipeError(
            f"`{where}`: the name {name!r} names files too; use letters, digits and any of `._+-`, at most 128 of them."
        )
    written = [
        f"{key}={yaml.safe_dump(value, default_flow_style=True, width=2**31)}" for key, value in settings.items()
    ]
    try:
        recipe = load_recipe(source, [*written, *overrides])
        if manager is not None:
            _check_names(recipe, manager)
    except UserError as error:
        raise RecipeError(f"{where} ({name}): {error}") from None
    return Entry(name, source, recipe, Limits(**said))


def _check_names(recipe: Recipe, manager: Manager) -> None:
    """Refuse what no plugin registers before anything is run, hours before its turn."""
    known = manager.registries
    known.models[recipe.model.loader]
    known.metrics[recipe.metric]
    known.exporters[recipe.export.exporter]
    for data in recipe.data.values():
        known.datasets[data.source]
    for target in recipe.targets:
        known.targets[target.provider]
    for spec in recipe.passes:
        settings_from(known.passes[spec.name].load_settings(), spec.options, f"passes.{spec.name}")
