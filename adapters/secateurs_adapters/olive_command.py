"""The sub-commands of `secateurs` for Microsoft Olive. Light: what a command needs is imported when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["olive", "olive_config"]


def olive(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.json", help="An Olive configuration, JSON or YAML.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print where the model is and its metrics as JSON.")] = False,
) -> None:
    """Run an Olive workflow that may contain passes and the evaluator of Secateurs, and fail where it fails.

    `olive run` ends with exit code 0 where a pass failed. This exits with 3 then, with 2 for wrong settings, and with 1
    where a target is missed or our evaluator's verdict is no pass.
    """
    from secateurs_adapters.olive_workflow import EVALUATOR, run_workflow

    best = run_workflow(config).get_best_candidate()
    metrics = {name: item["value"] for name, item in (best.metrics_value or {}).items()}
    _print(str(best.model_path), metrics, as_json)
    raise typer.Exit(0 if metrics.get(f"{EVALUATOR}-verdict", 1) == 1 else 1)


def olive_config(
    path: Annotated[Path, typer.Argument(metavar="FILE.json", help="Where it is written.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print where it is as JSON.")] = False,
) -> None:
    """Write Olive's list of passes with ours added, for `olive run --package-config FILE.json`."""
    from secateurs_adapters.olive_workflow import write_package_config

    write_package_config(path)
    if as_json:
        typer.echo(json.dumps({"package_config": str(path)}, indent=2))
        return
    typer.echo(f"`olive run --package-config {path} --config CONFIG.json` knows the passes of Secateurs")


def _print(path: str, metrics: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"model_path": path, "metrics": metrics}, indent=2))
        return
    for name, value in metrics.items():
        typer.echo(f"{name}: {value:.4g}")
    typer.echo(f"the model is {path}")
