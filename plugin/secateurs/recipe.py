"""Recipes: what a run does, as YAML.

`${name}` is replaced by the variable of that name (a value that is nothing but `${name}` keeps the variable's type); `--set key=value` sets a
variable or a dotted key. Unknown keys are errors with the nearest known key. Nothing in a recipe runs code except the factory that it names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from secateurs.budget import Budget, parse_budget
from secateurs.data import ROLES
from secateurs.digests import file_digest, module_files
from secateurs.errors import RecipeError, UserError, shown, unknown_name
from secateurs.overrides import Substitution, override, plain_data
from secateurs.plain_yaml import load_yaml, read_yaml, to_yaml
from secateurs.settings import (
    EdgeSettings,
    ExportSettings,
    QuantiseSettings,
    RecoverySettings,
    SearchSettings,
    TargetSettings,
)

__all__ = [
    "DataSpec",
    "ModelSpec",
    "PassSpec",
    "Recipe",
    "load_recipe",
    "parse_data",
    "parse_pass",
    "parse_recipe",
    "settings_from",
]

MAX_SEED = 2**32 - 1
"""Largest seed that torch, numpy and scikit-learn all take."""
_MODEL_ARGUMENTS = ("task", "revision")
"""Arguments of a loader that may stand beside its name, without `arguments`."""
_PATHS = ("file", "folder")
_PATHS_OR_NAMES = ("hf", "dataset", "processor", "tokenizer")
"""Options that name something on this machine or elsewhere."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSpec(_Section):
    """Which network: the loader's name (`factory`, ...), what it loads, its arguments and weights."""

    loader: str
    value: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    weights: Path | None = None


class DataSpec(_Section):
    """Where the examples of one role come from; `options` are the source's own settings."""

    source: str
    samples: int | None = Field(None, ge=1)
    options: dict[str, Any] = Field(default_factory=dict)


class PassSpec(_Section):
    """One pass with its options, as written."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


class Recipe(_Section):
    """A whole recipe, resolved: variables replaced, paths absolute."""

    seed: int = Field(0, ge=0, le=MAX_SEED)
    folder: Path
    model: ModelSpec
    data: dict[str, DataSpec]
    metric: str = "accuracy"
    passes: tuple[PassSpec, ...] = Field(min_length=1)
    search: SearchSettings | None = None
    recovery: RecoverySettings = RecoverySettings()
    export: ExportSettings = ExportSettings()
    quantise: QuantiseSettings | None = None
    budget: Budget = Budget()
    targets: tuple[TargetSettings, ...] = (TargetSettings(),)

    @field_validator("data")
    @classmethod
    def _known_roles(cls, value: dict[str, DataSpec]) -> dict[str, DataSpec]:
        for role in value:
            if role not in ROLES:
                raise RecipeError(unknown_name("data role", role, ROLES))
        return value

    def to_yaml(self) -> str:
        """Return the resolved recipe in the form that `secateurs run` reads."""
        model: dict[str, Any] = {self.model.loader: self.model.value}
        if self.model.arguments:
            model["arguments"] = self.model.arguments
        if self.model.weights is not None:
            model["weights"] = str(self.model.weights)
        data = {
            role: {"source": spec.source, **({} if spec.samples is None else {"samples": spec.samples}), **spec.options}
            for role, spec in self.data.items()
        }
        body = {
            "schema": 1,
            "seed": self.seed,
            "folder": str(self.folder),
            "model": model,
            "data": data,
            "metric": self.metric,
            "passes": [{spec.name: spec.options} for spec in self.passes],
            **({} if self.search is None else {"search": self.search.model_dump(mode="json")}),
            "recovery": self.recovery.model_dump(mode="json"),
            "export": self.export.model_dump(mode="json"),
            **({} if self.quantise is None else {"quantise": self.quantise.model_dump(mode="json")}),
            "budget": self.budget.model_dump(mode="json", exclude_none=True),
            "targets": [target.model_dump(mode="json") for target in self.targets],
        }
        return to_yaml(body)

    def files(self) -> Iterator[Path]:
        """Yield the files and folders that determine the result: weights, data, whatever else an option names, and the factory's modules.

        Of a name on a hub there is nothing here to read.
        """
        named = [self.model.weights, self.model.value, *_texts(self.model.arguments)]
        named += [text for spec in self.data.values() for text in _texts(spec.options)]
        yield from (Path(name) for name in named if name and _exists(str(name)))
        if self.model.loader == "factory":
            yield from sorted(module_files(self.model.value.partition(":")[0], self.folder))

    def digest(self, without: Path | None = None) -> str:
        """Return a hash of everything that determines the result: the recipe, and the content of its `files`.

        Args:
            without: a folder whose content does not count where it lies in one of these: the output.
        """
        parts = {
            "recipe": read_yaml(self.to_yaml(), "the recipe"),
            "files": {str(path): file_digest(path, without) for path in self.files()},
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


_KEYS = (
    "schema",
    "variables",
    "seed",
    "folder",
    "model",
    "data",
    "metric",
    "passes",
    "search",
    "recovery",
    "export",
    "quantise",
    "budget",
    "targets",
)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file.

    Args:
        path: of the YAML file.
        overrides: `key=value` strings; a key is a variable or a dotted path (list items by number, passes by name too).

    Raises:
        RecipeError: it is missing, not YAML, or does not follow the form.
    """
    data = load_yaml(path, "recipe")
    return parse_recipe(data, folder=path.resolve().parent, overrides=overrides)


def parse_recipe(data: Any, *, folder: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Check and resolve a recipe given as data.

    Args:
        data: what the YAML holds.
        folder: where the recipe lies; its factory is imported from there.
        overrides: see `load_recipe`.

    Raises:
        RecipeError: it does not follow the form; the message names the key.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(f"a recipe is a mapping with the keys {', '.join(_KEYS)}; got {type(data).__name__}.")
    data = plain_data(data, "the recipe")
    variables = dict(_mapping(data.get("variables") or {}, "variables"))
    for text in overrides:
        override(data, variables, text, _KEYS)
    data.pop("variables", None)
    for name, value in list(variables.items()):
        others = {known: variables[known] for known in variables if known != name}
        variables[name] = Substitution(others).of(value, f"variables.{name}")
    data = Substitution(variables).of(data, "")
    for key in data:
        if key not in _KEYS:
            raise RecipeError(unknown_name("recipe key", str(key), _KEYS))
    if data.pop("schema", 1) != 1:
        raise RecipeError("`schema` must be 1, the only version there is.")
    for key in ("model", "data", "passes"):
        if not data.get(key):
            raise RecipeError(f"the recipe has no `{key}`; see the README for a complete one.")
    try:
        return Recipe(
            seed=data.get("seed", 0),
            folder=_file(data.get("folder") or str(folder), "folder"),
            model=_model(data["model"]),
            data={str(role): parse_data(spec, f"data.{role}") for role, spec in _mapping(data["data"], "data").items()},
            metric=data.get("metric", "accuracy"),
            passes=tuple(parse_pass(item) for item in _list(data["passes"], "passes")),
            search=None if data.get("search") is None else _section(SearchSettings, data["search"], "search"),
            recovery=_section(RecoverySettings, data.get("recovery"), "recovery"),
            export=_export(data.get("export")),
            quantise=None if data.get("quantise") is None else _section(QuantiseSettings, data["quantise"], "quantise"),
            budget=parse_budget(_mapping(data.get("budget") or {}, "budget")),
            targets=tuple(
                _section(TargetSettings, item, f"targets.{number}")
                for number, item in enumerate(_list(data.get("targets") or [{}], "targets"))
            ),
        )
    except ValidationError as error:
        raise RecipeError(_explain(error, "")) from None


def settings_from(model: type[BaseModel] | None, options: Mapping[str, Any], where: str) -> Any:
    """Build a settings object from options, with the nearest known name for an unknown key.

    Args:
        model: of the settings; None, as a plugin registers what takes no options, makes None.
        options: by name.
        where: what messages call them.

    Raises:
        RecipeError: an unknown key or a value that is not allowed.
    """
    if model is None:
        if options:
            raise RecipeError(
                f"`{where}` takes no options, got {', '.join(map(str, options))}; leave them out, or let its plugin register `settings`."
            )
        return None
    for key in options:
        if key not in model.model_fields:
            raise RecipeError(f"{where}: " + unknown_name("option", str(key), model.model_fields))
    try:
        return model(**options)
    except UserError as error:
        raise RecipeError(f"{where}: {error}") from None
    except ValidationError as error:
        raise RecipeError(_explain(error, where)) from None


def _section(model: type[BaseModel], value: Any, where: str) -> Any:
    return settings_from(model, _mapping(value or {}, where), where)


def _export(value: Any) -> ExportSettings:
    options = dict(_mapping(value or {}, "export"))
    if options.get("edge") is not None:
        options["edge"] = _section(EdgeSettings, options["edge"], "export.edge")
    settings: ExportSettings = settings_from(ExportSettings, options, "export")
    return settings


def _explain(error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    key = ".".join([part for part in (where, *map(str, first["loc"])) if part])
    more = f" ({error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"`{key}`: {first['msg']}; got {shown(first['input'])}.{more}"


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"`{where}` must be a mapping, got {shown(value)}.")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise RecipeError(f"`{where}` must be a list, got {shown(value)}.")
    return value


def _model(value: Any) -> ModelSpec:
    spec = dict(_mapping(value, "model"))
    arguments, weights = spec.pop("arguments", None) or {}, spec.pop("weights", None)
    arguments = {
        **{key: spec.pop(key) for key in _MODEL_ARGUMENTS if key in spec},
        **_mapping(arguments, "model.arguments"),
    }
    if len(spec) != 1:
        raise RecipeError(
            f"`model` names one loader (`factory: module:function`, `hf: NAME`) beside `arguments`, `weights`, "
            f"{', '.join(f'`{key}`' for key in _MODEL_ARGUMENTS)}; got {', '.join(spec) or 'none'}."
        )
    loader, target = next(iter(spec.items()))
    weights = None if weights is None else _file(weights, "model.weights")
    return ModelSpec(loader=loader, value=_path(loader, str(target)), arguments=arguments, weights=weights)


def _path(option: str, value: Any) -> Any:
    """Return an option that may name a file or folder, absolute where it does."""
    named = isinstance(value, str) and (option in _PATHS or (option in _PATHS_OR_NAMES and _exists(value)))
    return str(Path(value).absolute()) if named else value


def _file(value: Any, where: str) -> Path:
    if not isinstance(value, str):
        raise RecipeError(f"`{where}` must be a path, got {shown(value)}.")
    return Path(value).absolute()


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in nested options that could be a path."""
    if isinstance(value, str) and 0 < len(value) < 1024 and "\0" not in value and "\n" not in value:
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _exists(value: str) -> bool:
    try:
        return Path(value).exists()
    except OSError:  # too long for a name
        return False


def parse_data(value: Any, where: str) -> DataSpec:
    """Read what is said of one role: `source`, `samples`, and the source's own options.

    Args:
        value: plain data.
        where: what messages call it, for example `data.evaluation`.

    Raises:
        RecipeError: it does not follow the form.
    """
    spec = dict(_mapping(value, where))
    if "source" not in spec:
        raise RecipeError(f"`{where}` has no `source`; name a registered data source, for example `source: npz`.")
    own: dict[str, Any] = {key: spec.pop(key) for key in ("source", "samples") if key in spec}
    options = {key: _path(key, item) for key, item in spec.items()}
    found: DataSpec = settings_from(DataSpec, {**own, "options": options}, where)
    return found


def parse_pass(value: Any) -> PassSpec:
    """Read one item of `passes`: a name, or a mapping of one name to its options."""
    if isinstance(value, str):
        return PassSpec(name=value)
    item = dict(_mapping(value, "passes"))
    if len(item) != 1:
        raise RecipeError(
            f"each item of `passes` is one name with its options (`- mi-nodes: {{target_macs: 0.5}}`); got {shown(item)}."
        )
    name, options = next(iter(item.items()))
    return PassSpec(name=str(name), options=dict(_mapping(options or {}, f"passes.{name}")))
