"""An evaluator for Microsoft Olive: what our validation measures of the exported file, and its verdict, as Olive metrics.

Importing this module registers it under the type `secateurs`. Olive's own `custom` metrics fail in 0.13.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from olive.evaluator.metric_result import MetricResult, SubMetricResult
from olive.evaluator.olive_evaluator import OliveEvaluator
from olive.evaluator.registry import Registry
from olive.model import ONNXModelHandler
from pydantic import Field

from secateurs.budget import MIB, parse_budget
from secateurs.data import Dataset
from secateurs.errors import RecipeError
from secateurs.files import write_text
from secateurs.forward import to_dataset
from secateurs.manager import Manager, create_manager
from secateurs.recipe import parse_data, settings_from
from secateurs.report import Report
from secateurs.settings import PassSettings, TargetSettings
from secateurs.sources import load_examples
from secateurs_adapters.artifact import read_artifact
from secateurs_adapters.export import dynamo
from secateurs_adapters.validate import validate_files

__all__ = ["EvaluatorSettings", "VerdictEvaluator", "secateurs_evaluator"]

NAME = "secateurs"
OPSET = 20
_RATIOS = ("accuracy_drop", "latency_ratio", "peak_memory_ratio", "artifact_ratio")
"""Limits that need a file to compare with."""
_log = logging.getLogger("olive.secateurs")


class EvaluatorSettings(PassSettings):
    """What an Olive configuration says of the evaluator `secateurs`."""

    baseline: Path | None = Field(None, description="ONNX file of the network before, made by the same passes but ours")
    data: dict[str, Any] | None = Field(None, description="labelled evaluation data, as in a recipe")
    metric: str = Field("accuracy", description="a registered metric")
    budget: dict[str, Any] = Field(default_factory=dict, description="limits, as in a recipe")
    targets: list[dict[str, Any]] = Field(
        default_factory=list, description="where to measure, as in a recipe; empty takes Olive's execution provider"
    )
    report: Path | None = Field(None, description="where report.json of the last evaluation goes")


def secateurs_evaluator(**settings: Any) -> VerdictEvaluator:
    """Return the evaluator; a function, since Olive looks for the source of what is registered, and fails on classes."""
    return VerdictEvaluator(settings)


Registry.register(NAME)(secateurs_evaluator)


class VerdictEvaluator(OliveEvaluator):  # type: ignore[misc]  # Olive has no type annotations that mypy could use
    """Measures a file beside the baseline, as `secateurs validate` does.

    Args:
        settings: see `EvaluatorSettings`.

    Raises:
        RecipeError: a setting is unknown, or a limit needs a baseline that is not given.
        BudgetError: a limit is unknown or impossible.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.settings: EvaluatorSettings = settings_from(EvaluatorSettings, settings, "evaluator")
        self.budget = parse_budget(self.settings.budget)
        self.targets = [
            settings_from(TargetSettings, item, f"evaluator.targets.{number}")
            for number, item in enumerate(self.settings.targets)
        ]
        relative = [name for name in _RATIOS if getattr(self.budget, name) is not None]
        if relative and self.settings.baseline is None:
            raise RecipeError(
                f"evaluator: {', '.join(relative)} compares with the network before; give its ONNX file as `baseline`."
            )

    def evaluate(self, model: Any, metrics: Any, device: Any = "cpu", execution_providers: Any = None) -> Any:
        """Measure a model and judge it.

        Args:
            model: an Olive handler; a PyTorch network is exported first.
            metrics: Olive's own, measured by its own evaluator; they alone steer Olive's search.
            device: for these.
            execution_providers: for these, and for our figures where the settings name no target.

        Returns:
            `secateurs-verdict` (1 passes, 0 does not), one `secateurs-within_...` per limit, and the figures; sizes in MiB, latency in ms.
        """
        found: dict[str, Any] = {}
        if metrics:
            own = Registry.get(str(model.framework))()
            found |= own.evaluate(model, metrics, device, execution_providers).root
        names = [execution_providers] if isinstance(execution_providers, str) else list(execution_providers or [])
        targets = self.targets or [TargetSettings(provider=names[0])] if names else self.targets or [TargetSettings()]
        report = self._report(model, targets)
        if report.verdict != "pass":
            rows = [f"{row.name} {row.status}" for row in report.budget if row.status != "pass"]
            _log.error("secateurs: the verdict is %s: %s", report.verdict, "; ".join([*report.reasons, *rows]))
        found |= {
            f"{NAME}-{name}": SubMetricResult(value=value, priority=-1, higher_is_better=higher)
            for name, value, higher in _figures(report)
            if value is not None
        }
        return MetricResult.model_validate(found)

    def _report(self, model: Any, targets: list[TargetSettings]) -> Report:
        manager = create_manager()
        data = self._evaluation(manager)
        with tempfile.TemporaryDirectory(prefix="secateurs-") as folder:
            path = _file(model, data, Path(folder))
            report = validate_files(
                self.settings.baseline or path,
                path,
                targets=targets,
                budget=self.budget,
                evaluation=None if data is None else _named(data, read_artifact(path).inputs),
                metric=manager.registries.metrics[self.settings.metric].make(),
            )
        if self.settings.report is not None:
            write_text(self.settings.report, report.to_json())
        return report

    def _evaluation(self, manager: Manager) -> Dataset | None:
        if self.settings.data is None:
            return None
        spec = parse_data(self.settings.data, "evaluator.data")
        return load_examples(spec, "evaluator.data", manager).sampled(spec.samples, 0)


def _file(model: Any, data: Dataset | None, folder: Path) -> Path:
    """Return the ONNX file of a handler; a PyTorch network is written by our exporter."""
    if isinstance(model, ONNXModelHandler):
        return Path(model.model_path)
    example = to_dataset(model.get_dummy_inputs()) if data is None else data
    return dynamo(model.load_model(), example, folder / "model.onnx", opset=OPSET).path


def _named(data: Dataset, names: tuple[str, ...]) -> Dataset:
    """Return data whose inputs are called as in the file, in order, where their own names tell nothing."""
    if data.keyword or len(names) != len(data.inputs):
        return data
    return replace(data, inputs=dict(zip(names, data.inputs.values(), strict=True)))


def _figures(report: Report) -> Iterator[tuple[str, float | None, bool]]:
    """Yield name, value and whether higher is better of everything that a report holds."""
    yield "verdict", int(report.verdict == "pass"), True
    yield "artifact_mib", _mib(report.candidate.artifact_bytes), False
    yield "artifact_ratio", report.ratios.artifact_bytes, False
    several = len(report.candidate.targets) > 1
    for side, ratios in zip(report.candidate.targets, report.ratios.targets, strict=True):
        where = f"{side.label} " if several else ""
        latency, drop = ratios.latency_p50, ratios.accuracy_drop
        yield f"{where}accuracy", None if side.accuracy is None else side.accuracy.value, True
        yield f"{where}accuracy_drop", None if drop is None else drop.value, False
        yield f"{where}agreement", ratios.agreement, True
        yield f"{where}latency_ms", None if side.latency_ms is None else side.latency_ms.p50, False
        yield f"{where}latency_ratio", None if latency is None else latency.value, False
        yield f"{where}peak_memory_mib", _mib(side.peak_memory_bytes), False
        yield f"{where}peak_memory_ratio", ratios.peak_memory, False
        yield f"{where}activation_mib", _mib(side.activation_bytes_profiled), False
    for row in report.budget:
        where = f"{row.target} " if several and row.target else ""
        yield f"{where}within_{row.name}", int(row.status == "pass"), True


def _mib(value: int | None) -> float | None:
    return None if value is None else value / MIB
