"""Tracking with MLflow: a plugin that writes each run of a recipe into the tracking server that MLflow's own settings name.

It does something only where `MLFLOW_TRACKING_URI` is set or an MLflow run is active, as in a training script. Light: mlflow
is imported when a run has ended.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateurs import hookimpl

if TYPE_CHECKING:
    from secateurs.report import Report

__all__ = ["figures", "log_run", "secateurs_after_run", "settings"]

EXPERIMENT = "secateurs"
"""The experiment, where `MLFLOW_EXPERIMENT_NAME` and `MLFLOW_EXPERIMENT_ID` name none."""
_AT_ONCE = 100
"""Parameters that MLflow takes in one request."""
_LONGEST = 500
"""Characters of a parameter that every MLflow server keeps."""


@hookimpl(trylast=True)  # after the plugin that draws report.html
def secateurs_after_run(report: Report, folder: Path) -> None:
    """Log a finished run; a server that does not answer costs a warning and never the run."""
    active = getattr(sys.modules.get("mlflow"), "active_run", lambda: None)
    if not os.environ.get("MLFLOW_TRACKING_URI") and active() is None:
        return
    try:
        log_run(report, folder)
    except ImportError as error:
        _warn(f"MLFLOW_TRACKING_URI is set, but mlflow cannot be imported ({error}); pip install 'secateurs[mlflow]'")
    except Exception as error:  # whatever a server or a network says
        _warn(f"{type(error).__name__}: {' '.join(str(error).split())}")


def log_run(report: Report, folder: Path) -> str:
    """Log what a run did: settings as parameters, figures as metrics, trials as steps, and its files as artifacts.

    Args:
        report: of the run.
        folder: its output.

    Returns:
        The MLflow run's id; it is the active run where there is one, and a new one otherwise.
    """
    import mlflow

    active = mlflow.active_run()
    if active is not None:
        _log(mlflow, report, folder)
        return str(active.info.run_id)
    with mlflow.start_run(run_name=folder.resolve().name, experiment_id=_experiment(mlflow)) as run:
        _log(mlflow, report, folder)
        return str(run.info.run_id)


def figures(report: Report) -> dict[str, float]:
    """Return every number that a report holds of the two networks, their ratios and the budget, by a path such as `ratios/macs`."""
    found: dict[str, float] = {"pass": float(report.verdict == "pass"), "seconds": report.seconds or 0.0}
    for name in ("baseline", "candidate", "ratios"):
        found |= dict(_numbers(getattr(report, name).model_dump(), name))
    for row in report.budget:
        where = "/".join(["budget", row.name, *([row.target] if row.target else [])])
        found[f"{where}/limit"] = row.limit
        if row.measured is not None:
            found[f"{where}/measured"] = row.measured
    return {_allowed(name): value for name, value in found.items()}


def settings(folder: Path) -> dict[str, str]:
    """Return what the resolved recipe of a run says, by a dotted path such as `passes.0.mi-nodes.target_macs`."""
    import yaml

    path = folder / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {_allowed(name): str(value)[:_LONGEST] for name, value in _leaves(recipe, "")}


def _experiment(mlflow: Any) -> str | None:
    """Return the experiment's id; None leaves it to MLflow's own settings."""
    if {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID"} & os.environ.keys():
        return None
    found = mlflow.get_experiment_by_name(EXPERIMENT)
    return str(mlflow.create_experiment(EXPERIMENT) if found is None else found.experiment_id)


def _log(mlflow: Any, report: Report, folder: Path) -> None:
    given = iter(settings(folder).items())
    while some := dict(islice(given, _AT_ONCE)):
        mlflow.log_params(some)
    mlflow.log_metrics(figures(report))
    for trial in report.trials:
        measured = dict(_numbers(trial.model_dump(exclude={"number"}), "trial"))
        mlflow.log_metrics({_allowed(name): value for name, value in measured.items()}, step=trial.number)
    tags = {"secateurs.verdict": report.verdict, "secateurs.reasons": "; ".join(report.reasons)}
    mlflow.set_tags({name: value[:_LONGEST] for name, value in tags.items() if value})
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            mlflow.log_artifact(str(path))


def _numbers(value: Any, where: str) -> Iterator[tuple[str, float]]:
    """Yield the numbers of nested mappings and of the targets in them; other lists are curves, which are in report.json."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(inner, f"{where}/{name}")
    elif isinstance(value, list) and where.endswith("/targets"):
        for number, inner in enumerate(value):
            yield from _numbers(inner, f"{where}/{number}")
    elif isinstance(value, (bool, int, float)):
        yield where, float(value)


def _leaves(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Yield what is not nested any further; an empty list or mapping counts as a value."""
    if not value or not isinstance(value, (Mapping, list)):
        if where:
            yield where, value
        return
    for name, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
        yield from _leaves(inner, f"{where}.{name}" if where else str(name))


def _allowed(name: str) -> str:
    """Return a name in the characters that MLflow takes."""
    return "".join(letter if letter.isascii() and (letter.isalnum() or letter in "_-. /") else "_" for letter in name)


def _warn(text: str) -> None:
    warnings.warn(f"this run is not in MLflow: {text}", UserWarning, stacklevel=3)
