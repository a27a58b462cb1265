"""Passes for Microsoft Olive: layer pruning, node pruning, and whole recipes, as steps of an Olive workflow.

Olive finds passes by its package configuration alone, which `secateurs_adapters.olive_workflow.package_config` extends by
these. It goes on quietly after most errors, ends with exit code 0, and ignores settings that it does not know; these passes
therefore raise errors of the kinds that Olive lets through, and refuse unknown settings.
"""

from __future__ import annotations

import copy
import logging
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import yaml
from olive.data.config import DataConfig
from olive.model import HfModelHandler
from olive.passes import Pass
from olive.passes.pass_config import DEFAULT_SET, PassConfigParam
from olive.search.search_parameter import Categorical, SearchParameter, SpecialParamValue
from pydantic import BaseModel
from torch import nn

from secateurs import checkpoint, runner
from secateurs.errors import RecipeError, SecateursError, unknown_name
from secateurs.files import write_text
from secateurs.pipeline import Outcome, build_pass, recover
from secateurs.plan import Plan
from secateurs.recipe import ModelSpec, Recipe, load_recipe, parse_recipe, settings_from
from secateurs.report import Report
from secateurs.script import pruning_report
from secateurs.settings import CkaClusterSettings, CkaSegmentSettings, MiNodesSettings, PassSettings
from secateurs_adapters.olive_input import LOADER, algorithm_version, fingerprint, manager_for
from secateurs_adapters.olive_model import Given, read_handler, write_handler

if TYPE_CHECKING:
    from secateurs.interfaces import ProgressEvent
    from secateurs.manager import Manager

__all__ = ["PassError", "SecateursCkaCluster", "SecateursCkaSegment", "SecateursMiNodes", "SecateursRecipe"]

ROLES = ("calibration", "training", "validation")
_log = logging.getLogger("olive.secateurs")


class PassError(SecateursError, ValueError):
    """A pass cannot do what it was asked for. Olive lets a `ValueError` through and swallows most others.

    Args:
        text: what is wrong.
        exit_code: of the command line.
    """

    def __init__(self, text: str, exit_code: int = 3) -> None:
        super().__init__(text)
        self.exit_code = exit_code


@contextmanager
def _visible(name: str) -> Iterator[None]:
    """Turn every error of a block into one that Olive lets through."""
    try:
        yield
    except PassError:
        raise
    except SecateursError as error:
        raise PassError(f"{name}: {error}", error.exit_code) from error
    except Exception as error:
        raise PassError(f"{name}: the pass failed: {type(error).__name__}: {error}") from error


_COMMON: dict[str, tuple[Any, Any, str]] = {
    "strict": (
        bool,
        True,
        "fail where a target is missed or nothing can be pruned; false goes on with the best network",
    ),
    "algorithm_version": (str, None, "part of Olive's cache key; None is the version of the code, which is right"),
    "fingerprint": (
        str,
        None,
        "part of Olive's cache key: a hash of the files that the settings name; always computed",
    ),
}
_DATA: dict[str, tuple[Any, Any, str]] = {
    "data": (dict, None, "the roles calibration, training and validation, as in a recipe"),
    "metric": (str, "accuracy", "a registered metric, for decisions on validation data"),
    "recovery": (dict, None, "training after the pass, as in a recipe; None trains nothing"),
    "target": (dict, None, "the device that latency and peak memory are asked for, as in a recipe"),
    "seed": (int, 0, "of everything random"),
}


class PruningPass(Pass):  # type: ignore[misc]  # Olive has no type annotations that mypy could use
    """What all passes of Secateurs for Olive share.

    Attributes:
        searched: values that Olive's search tries by default, by option.
        either: options of which one is given; where the user gives one, Olive's search leaves the others alone.
    """

    searched: ClassVar[Mapping[str, list[Any]]] = {}
    either: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, PassConfigParam]:  # noqa: ARG003
        params = {
            name: PassConfigParam(type_=type_, default_value=default, description=text)
            for name, (type_, default, text) in cls._extras().items()
        }
        for name, field in cls._settings().model_fields.items():
            values = cls.searched.get(name)
            params[name] = PassConfigParam(
                type_=field.annotation,
                default_value=field.default,
                search_defaults=None if values is None else Categorical(list(values)),
                description=field.description,
            )
        return params

    @classmethod
    def _settings(cls) -> type[PassSettings]:
        """Return the model of the options that our own pass takes."""
        return PassSettings

    @classmethod
    @abstractmethod
    def _extras(cls) -> dict[str, tuple[Any, Any, str]]:
        """Return type, default and description of the other settings."""

    @classmethod
    @abstractmethod
    def _recipe(cls, options: Mapping[str, Any]) -> Recipe:
        """Return what to do as a recipe; its model stands for the network that Olive hands over."""

    @classmethod
    def get_config_params(cls, accelerator_spec: Any, config: Any = None, disable_search: bool = False) -> Any:
        """Check the settings before Olive does, which ignores unknown ones; see `olive.passes.Pass`.

        Raises:
            PassError: a setting is unknown or has a value that is not allowed.
        """
        given = _mapping(config)
        with _visible(cls.__name__):
            known = cls.default_config(accelerator_spec)
            for name in given:
                if name not in known:
                    raise RecipeError(unknown_name("setting", name, known))
            given |= _checked(cls._settings(), given, cls.searched)
        chosen = [name for name in cls.either if given.get(name) is not None]
        if chosen:
            given |= {name: None for name in cls.either if name not in chosen}
        return super().get_config_params(accelerator_spec, given, disable_search)

    @classmethod
    def generate_config(
        cls, accelerator_spec: Any, config: Any = None, point: Any = None, disable_search: bool = False
    ) -> Any:
        """Complete the settings by what Olive's cache has to know; see `olive.passes.Pass`.

        Raises:
            PassError: see `get_config_params`.
        """
        given = _mapping(config)
        with _visible(cls.__name__):
            given["algorithm_version"] = given.get("algorithm_version") or algorithm_version()
            given["fingerprint"] = cls._fingerprint(given)
        return super().generate_config(accelerator_spec, given, point, disable_search)

    @classmethod
    def _fingerprint(cls, given: Mapping[str, Any]) -> str:
        return fingerprint({name: value for name, value in given.items() if name == "data" or name.endswith("_config")})

    @classmethod
    def validate_config(cls, config: Any, accelerator_spec: Any) -> bool:
        """Refuse settings that cannot work together, loudly: Olive only warns where this returns False.

        Raises:
            PassError: it says which settings, and what is allowed.
        """
        with _visible(cls.__name__):
            if not super().validate_config(config, accelerator_spec):
                return False
            options = _options(config)
            recipe = cls._recipe(options)
            manager = manager_for(nn.Identity(), _data_configs(options))
            for spec in recipe.passes:
                build_pass(spec, manager)
            for role, data in recipe.data.items():
                settings_from(manager.registries.datasets[data.source].load_settings(), data.options, f"data.{role}")
            manager.registries.metrics[recipe.metric]
        return True

    def _run_for_config(self, model: Any, config: Any, output_model_path: str) -> Any:
        name = type(self).__name__
        with _visible(name):
            options = _options(config)
            given = read_handler(model)
            manager = manager_for(given.network, _data_configs(options))
            recipe = self._recipe(options)
            if isinstance(model, HfModelHandler):
                recipe = _with_processors(recipe, str(model.model_path), manager)
            folder = Path(output_model_path)
            prepared = runner.prepare(recipe, manager, _tell)
            report, plan = self._work(prepared, given, folder, options)
            if report.verdict != "pass":
                _complain(name, report, folder, strict=options["strict"])
            return write_handler(model, given, plan, folder, prepared.session.roles.calibration)

    def _work(
        self,
        prepared: runner.Prepared,
        given: Given,
        folder: Path,
        options: Mapping[str, Any],  # noqa: ARG002
    ) -> tuple[Report, Plan]:
        """Prune, train where that is asked for, and write what reloads the network; return the report and the plan."""
        return _prune(prepared, given, folder)


class AlgorithmPass(PruningPass):
    """One of our passes, with its options as settings and data of its own.

    Attributes:
        algorithm: the pass's name in recipes.
    """

    algorithm: ClassVar[str]

    @classmethod
    @abstractmethod
    def _settings(cls) -> type[PassSettings]:
        """Return the model of the options that our own pass takes."""

    @classmethod
    def _extras(cls) -> dict[str, tuple[Any, Any, str]]:
        # Olive asks for the type `DataConfig` where a name ends in `data_config`.
        text = "Olive's data config of the {} examples, instead of `data`"
        configs = {f"{role}_data_config": (DataConfig | dict, None, text.format(role)) for role in ROLES}
        return {**_DATA, **configs, **_COMMON}

    @classmethod
    def _recipe(cls, options: Mapping[str, Any]) -> Recipe:
        data = dict(options.get("data") or {})
        data |= {role: {"source": LOADER, "role": role} for role in _data_configs(options)}
        if "calibration" not in data:
            raise RecipeError(
                "there is no calibration data: give `data: {calibration: {source: ...}}` as in a recipe, or `calibration_data_config`."
            )
        if cls.either and all(options.get(name) is None for name in cls.either):
            raise RecipeError(
                f"it is not said how much to remove: give one of {', '.join(cls.either)}; a budget of accuracy is searched by "
                f"`SecateursRecipe`."
            )
        body = {
            "seed": options["seed"],
            "model": {LOADER: "input"},
            "data": data,
            "metric": options["metric"],
            "passes": [
                {cls.algorithm: {name: options[name] for name in cls._settings().model_fields if name in options}}
            ],
            "recovery": options.get("recovery") or {},
            "targets": [options.get("target") or {}],
        }
        return parse_recipe(body, folder=Path.cwd())


class SecateursCkaCluster(AlgorithmPass):
    """Remove layers whose output hardly differs from the one before (MPruner): our pass `cka-cluster`."""

    algorithm = "cka-cluster"
    searched: ClassVar[Mapping[str, list[Any]]] = {"threshold": [0.9, 0.95, 0.98]}

    @classmethod
    def _settings(cls) -> type[PassSettings]:
        return CkaClusterSettings


class SecateursCkaSegment(AlgorithmPass):
    """Remove layers segment by segment until a budget is met (SGLP): our pass `cka-segment`."""

    algorithm = "cka-segment"
    searched: ClassVar[Mapping[str, list[Any]]] = {"blocks": [1, 2, 3]}
    either = ("blocks", "target_macs", "target_parameters")

    @classmethod
    def _settings(cls) -> type[PassSettings]:
        return CkaSegmentSettings


class SecateursMiNodes(AlgorithmPass):
    """Remove channels, neurons and attention heads by mutual information (MIPP): our pass `mi-nodes`."""

    algorithm = "mi-nodes"
    searched: ClassVar[Mapping[str, list[Any]]] = {"target_macs": [0.75, 0.5, 0.25]}
    either = ("target_macs", "target_parameters", "target_latency", "target_peak_memory", "target_units", "confidence")

    @classmethod
    def _settings(cls) -> type[PassSettings]:
        return MiNodesSettings


class SecateursRecipe(PruningPass):
    """Run a whole recipe on the network that Olive hands over; the recipe's own `model` is not loaded."""

    @classmethod
    def _extras(cls) -> dict[str, tuple[Any, Any, str]]:
        return {
            **_COMMON,
            "recipe": (str | dict, None, "a recipe file, or a recipe as data"),
            "overrides": (list, None, "`key=value` texts, as `--set` of `secateurs run`"),
            "prove": (
                bool,
                True,
                "also export, measure and judge as `secateurs run` does, and fail where its verdict does; false leaves that to Olive",
            ),
        }

    @classmethod
    def _recipe(cls, options: Mapping[str, Any]) -> Recipe:
        recipe, overrides = options.get("recipe"), options.get("overrides") or []
        if not recipe:
            raise RecipeError("`recipe` is missing; give the path of a recipe file, or a recipe as data.")
        if isinstance(recipe, str):
            loaded = load_recipe(Path(recipe), overrides)
        else:
            loaded = parse_recipe({"model": {LOADER: "input"}, **recipe}, folder=Path.cwd(), overrides=overrides)
        return loaded.model_copy(update={"model": ModelSpec(loader=LOADER, value="input")})

    @classmethod
    def _fingerprint(cls, given: Mapping[str, Any]) -> str:
        if not given.get("recipe"):
            return ""  # `validate_config` says that it is missing
        resolved: dict[str, Any] = yaml.safe_load(cls._recipe(given).to_yaml())
        del resolved["folder"]  # where a factory would be imported from
        return fingerprint(resolved)

    def _work(
        self, prepared: runner.Prepared, given: Given, folder: Path, options: Mapping[str, Any]
    ) -> tuple[Report, Plan]:
        if not options["prove"]:
            return _prune(prepared, given, folder)
        report = runner.run(prepared, folder, overwrite=True)
        return report, Plan.load(folder / checkpoint.PLAN)


# --- settings ---------------------------------------------------------------------------------------------------------------------------


def _mapping(config: Any) -> dict[str, Any]:
    return dict(config.model_dump() if isinstance(config, BaseModel) else config or {})


def _checked(model: type[PassSettings], given: Mapping[str, Any], searched: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Check the values that are fixed, and those that a search is to try, one by one; return the fixed ones as JSON has them."""
    fixed: dict[str, Any] = {}
    for name, value in given.items():
        if name not in model.model_fields or _is_open(value):
            continue
        if name in searched and isinstance(value, list):
            for one in value:
                settings_from(model, {name: one}, "settings")
        else:
            fixed[name] = value
    settings: PassSettings = settings_from(model, fixed, "settings")
    return settings.model_dump(mode="json", include=set(fixed))


def _is_open(value: Any) -> bool:
    """Tell whether Olive is to fill in a value: a default, or what its search tries."""
    named = isinstance(value, str) and value in {*map(str, DEFAULT_SET), *map(str, SpecialParamValue)}
    return named or isinstance(value, SearchParameter) or (isinstance(value, dict) and "olive_parameter_type" in value)


def _options(config: Any) -> dict[str, Any]:
    """Return an Olive configuration as a mapping, without what a search point leaves out."""
    return {name: value for name, value in config.model_dump().items() if value != SpecialParamValue.IGNORED}


def _data_configs(options: Mapping[str, Any]) -> dict[str, Any]:
    return {role: options[f"{role}_data_config"] for role in ROLES if options.get(f"{role}_data_config")}


def _with_processors(recipe: Recipe, network: str, manager: Manager) -> Recipe:
    """Return a recipe whose data is read with the processor of the input network, where it takes one and names none."""
    data = dict(recipe.data)
    for role, spec in recipe.data.items():
        settings = manager.registries.datasets[spec.source].load_settings()
        if settings is not None and "processor" in settings.model_fields:
            data[role] = spec.model_copy(update={"options": {"processor": network, **spec.options}})
    return recipe.model_copy(update={"data": data})


# --- work -------------------------------------------------------------------------------------------------------------------------------


def _prune(prepared: runner.Prepared, given: Given, folder: Path) -> tuple[Report, Plan]:
    """Run the passes, or the search, and the training at the end; write plan, weights and report."""
    session, recipe = prepared.session, prepared.recipe
    found = runner.dry_run(prepared)
    outcome: Outcome = found.outcome
    network = copy.deepcopy(outcome.model)
    if recipe.recovery.epochs and outcome.plan.removes:
        recover(session, network, recipe.recovery)
    total = given.plan + outcome.plan
    checkpoint.save(network, total, folder)
    example = session.roles.calibration.take(range(min(2, len(session.roles.calibration))))
    said = prepared.manager.hook.secateurs_save_model(model=network, plan=total, example=example, folder=folder)
    report = pruning_report(session, outcome, network, math.fsum(record.seconds for record in outcome.records))
    report.trials, report.notes = found.trials, [*report.notes, *said]
    write_text(folder / "report.json", report.to_json())
    return report, outcome.plan


def _complain(name: str, report: Report, folder: Path, *, strict: bool) -> None:
    rows = [
        f"{row.name} measured {row.measured}, allowed {row.limit:g}: {row.status}"
        for row in report.budget
        if row.status != "pass"
    ]
    reasons = "; ".join([*report.reasons, *rows]) or f"the verdict is {report.verdict}"
    if strict:
        raise PassError(
            f"{name}: {reasons}. The best network is in {str(folder)!r}, with report.json; `strict: false` goes on with it.",
            1,
        )
    _log.error("%s: %s; the workflow goes on, as `strict` is false", name, reasons)


def _tell(event: ProgressEvent) -> None:
    _log.debug("%s: %d of %d %s", event.task, event.done, event.total, event.detail)
