"""Running Olive workflows that contain passes of Secateurs, so that a failure is one.

Olive looks for passes in one package configuration, and a file given with `--package-config` replaces its own; the one
made here has both. Olive ends normally where a pass failed or was refused; `run_workflow` and `require_output` do not.
"""

from __future__ import annotations

import copy
import importlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateurs.errors import PluginError, RecipeError, SecateursError
from secateurs.files import write_text

__all__ = ["EVALUATOR", "package_config", "require_output", "run_workflow", "within_budget", "write_package_config"]

EVALUATOR = "secateurs"
"""The type of our evaluator in an Olive configuration."""
_PASSES = ("SecateursCkaCluster", "SecateursCkaSegment", "SecateursMiNodes", "SecateursRecipe")


def package_config() -> dict[str, Any]:
    """Return Olive's own package configuration with the passes of Secateurs added, for `olive.workflows.run`.

    Raises:
        PluginError: Olive is not installed.
    """
    try:
        from olive.package_config import OlivePackageConfig
    except ImportError as error:
        raise PluginError(f"Olive cannot be imported ({error}); pip install 'secateurs[olive]'.") from None
    text = Path(OlivePackageConfig.get_default_config_path()).read_text(encoding="utf-8")
    merged: dict[str, Any] = json.loads(text)
    everywhere = {f"supported_{what}": ["*"] for what in ("providers", "accelerators", "precisions", "algorithms")}
    for name in _PASSES:
        merged["passes"][name] = {
            "module_path": f"secateurs_adapters.olive_pass.{name}",
            **everywhere,
            "supported_quantization_encodings": ["*"],
            "dataset": "dataset_required",
            "module_dependencies": ["secateurs[olive]"],
        }
    return merged


def write_package_config(path: Path) -> None:
    """Write `package_config` as JSON, for `olive run --package-config`."""
    write_text(path, json.dumps(package_config(), indent=4) + "\n")


def run_workflow(config: Mapping[str, Any] | Path, **options: Any) -> Any:
    """Run an Olive workflow in which passes and the evaluator of Secateurs are known.

    Args:
        config: an Olive configuration, or the path of its JSON or YAML file; it is not changed.
        options: further arguments of `olive.workflows.run`.

    Returns:
        Olive's `WorkflowOutput`, with at least one model.

    Raises:
        RecipeError: the configuration cannot be read, or Olive refuses it.
        SecateursError: a pass failed, or no model came out.
    """
    package = package_config()
    from olive.common.config_utils import load_config_file
    from olive.workflows import run

    try:
        body = load_config_file(config) if isinstance(config, Path) else copy.deepcopy(dict(config))
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot read the Olive configuration {str(config)!r}: {error}.") from None
    if _has_our_evaluator(body):
        _prepare_evaluator(body)
    heard = _Heard()
    logging.getLogger("olive").addHandler(heard)
    try:
        output = run(body, package_config=package, **options)
    except ValueError as error:
        if isinstance(error, SecateursError):
            raise
        raise RecipeError(f"Olive refuses the workflow: {error}") from error
    finally:
        logging.getLogger("olive").removeHandler(heard)
    return require_output(output, heard.reason)


def require_output(output: Any, reason: str = "see Olive's log") -> Any:
    """Return what `olive.workflows.run` returned, where it holds a model.

    Args:
        output: a `WorkflowOutput`.
        reason: why there may be none.

    Raises:
        SecateursError: it holds none: a pass failed or was refused, which Olive only logs.
    """
    if output is None or not output.has_output_model():
        raise SecateursError(f"the Olive workflow produced no model: {reason}.")
    return output


def within_budget(output: Any) -> list[Any]:
    """Return the models of a `WorkflowOutput` that our evaluator passed, in Olive's order.

    Olive's search does not know our budgets, and takes other models too.
    """
    found = [(model, model.metrics_value or {}) for model in output.get_output_models()]
    return [model for model, metrics in found if metrics.get(f"{EVALUATOR}-verdict", {}).get("value") == 1]


def _has_our_evaluator(body: Mapping[str, Any]) -> bool:
    evaluators = dict(body.get("evaluators") or {})
    return any(isinstance(item, Mapping) and item.get("type") == EVALUATOR for item in evaluators.values())


def _prepare_evaluator(body: dict[str, Any]) -> None:
    """Register our evaluator, and have it asked again: Olive's cache of evaluations does not know its settings."""
    importlib.import_module("secateurs_adapters.olive_evaluator")
    (body["engine"] if isinstance(body.get("engine"), dict) else body)["clean_evaluation_cache"] = True


class _Heard(logging.Handler):
    """Remembers the last thing that Olive warned of with an exception, or else the last thing it warned of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._error = self._text = ""

    @property
    def reason(self) -> str:
        return self._error or self._text or "see Olive's log"

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            self._error = f"{type(error).__name__}: {error}".rstrip(".")
        elif not record.getMessage().startswith("No output model produced"):
            self._text = record.getMessage().rstrip(".")
