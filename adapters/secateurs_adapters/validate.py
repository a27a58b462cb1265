"""Two files on one or more targets: what they cost, how right they are, and whether that is within the budget."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from secateurs.interfaces import Measurement, ProgressEvent, WidthMultiple, ratio
from secateurs.proof import prove
from secateurs.report import TargetFigures, TargetRatios
from secateurs_adapters.accuracy import Comparison, agreement, compare_accuracy
from secateurs_adapters.artifact import read_artifact
from secateurs_adapters.latency import LatencyFigures, measure_latency
from secateurs_adapters.memory import MemoryFigures, measure_memory, profile_memory
from secateurs_adapters.session import Session, SessionOptions, check_provider
from secateurs_adapters.widths import preferred_multiple

if TYPE_CHECKING:
    from pathlib import Path

    from secateurs.budget import Budget
    from secateurs.data import Dataset
    from secateurs.interfaces import Artifact, Metric
    from secateurs.report import Estimate, Report
    from secateurs.settings import TargetSettings

__all__ = ["OnnxRuntimeTarget", "onnxruntime_target", "validate_files"]

Progress = Callable[[ProgressEvent], None]

SEED = 0
"""Of every seeded input."""
_log = logging.getLogger(__name__)


class OnnxRuntimeTarget:
    """Implements `secateurs.interfaces.Target` on onnxruntime's execution providers."""

    def check(self, settings: TargetSettings) -> None:
        """Refuse a provider that is not available here; see `Target.check`."""
        check_provider(settings.provider)

    def width_multiple(self, settings: TargetSettings) -> WidthMultiple:
        """Return the channels whose multiples the provider's kernels like; see `Target`."""
        return preferred_multiple(settings)

    def measure(
        self,
        baseline: Artifact,
        candidate: Artifact,
        settings: TargetSettings,
        *,
        evaluation: Dataset | None,
        metric: Metric,
        decided: Callable[[Estimate], bool] | None = None,
        progress: Progress | None = None,
    ) -> Measurement:
        """Measure both files: providers and accuracy here, latency and memory in fresh processes; see `Target.measure`.

        Args:
            baseline: the file before.
            candidate: the file after.
            settings: provider, threads, batch size, processes, repeats.
            evaluation: labelled examples; without labels, or without data, agreement takes the place of the metric.
            metric: computed on the evaluation data.
            decided: whether a latency ratio settles the verdict; while it does not, latency takes more processes, up to
                `settings.max_processes`. None never asks.
            progress: told of every step.

        Raises:
            ProviderError: the provider is not available.
            DataError: a file cannot be loaded or run, or the evaluation data does not fit it.
        """
        self.check(settings)

        def tell(done: int, detail: str) -> None:
            if progress is not None:
                progress(ProgressEvent(f"measure on {settings.provider}", done, 4, detail))

        tell(0, "accuracy")
        comparison, agreed, placed = _inspect(baseline, candidate, settings, evaluation, metric)
        latency = measure_latency(
            baseline.path,
            candidate.path,
            settings,
            decided=decided,
            progress=lambda done, total: tell(1, f"latency, process {done} of {total}"),
            seed=SEED,
        )
        tell(2, "memory")
        memory = measure_memory([baseline.path, candidate.path], settings, seed=SEED)
        if memory[0].reason:
            _log.warning("memory on %s: %s", settings.provider, memory[0].reason)
        tell(3, "profile")
        profiled = [profile_memory(file.path, settings, seed=SEED) for file in (baseline, candidate)]
        tell(4, "done")
        first = _figures(settings, placed[0], latency.baseline, memory[0], profiled[0])
        second = _figures(settings, placed[1], latency.candidate, memory[1], profiled[1])
        if comparison is not None:
            first.accuracy, second.accuracy = comparison.baseline, comparison.candidate
        ratios = TargetRatios(
            latency_p50=latency.ratio,
            peak_memory=ratio(second.peak_memory_bytes, first.peak_memory_bytes),
            accuracy_drop=None if comparison is None else comparison.drop,
            accuracy_pairs=None if comparison is None else comparison.pairs,
            agreement=agreed,
        )
        return Measurement(first, second, ratios, (*_violations("baseline", first), *_violations("candidate", second)))


onnxruntime_target = OnnxRuntimeTarget()


def validate_files(
    baseline: Path,
    candidate: Path,
    *,
    targets: Sequence[TargetSettings],
    budget: Budget,
    evaluation: Dataset | None,
    metric: Metric,
    progress: Progress | None = None,
) -> Report:
    """Measure a candidate file against a baseline file on every target, and judge it by a budget.

    Args:
        baseline: ONNX file of the network before.
        candidate: ONNX file of the network after.
        targets: where to measure, in order.
        budget: the ceilings.
        evaluation: labelled examples; None reports agreement on seeded inputs instead of accuracy.
        metric: computed on the evaluation data.
        progress: told of every step.

    Returns:
        The report; nothing is written.

    Raises:
        UserError: a file, a provider or the data cannot be used.
    """
    start = time.perf_counter()
    for settings in targets:
        onnxruntime_target.check(settings)
    report = prove(
        read_artifact(baseline),
        read_artifact(candidate),
        [(onnxruntime_target, settings) for settings in targets],
        budget=budget,
        evaluation=evaluation,
        metric=metric,
        seed=SEED,
        progress=progress,
    )
    report.seconds = time.perf_counter() - start
    return report


@dataclass(frozen=True)
class _Placement:
    """Which providers a file's nodes were assigned to."""

    obtained: str
    nodes: dict[str, int] | None


def _inspect(
    baseline: Artifact, candidate: Artifact, settings: TargetSettings, evaluation: Dataset | None, metric: Metric
) -> tuple[Comparison | None, float | None, list[_Placement]]:
    """Return the metric's comparison where there are labels, else the agreement of the outputs; and where both ran."""
    options = SessionOptions(settings.provider, settings.threads, settings.options, record_assignment=True)
    before, after = Session(baseline.path, options), Session(candidate.path, options)
    comparison, agreed = None, None
    if evaluation is None:
        agreed = agreement(before, after, batch_size=settings.batch_size, seed=SEED)
    elif evaluation.labels is None:
        agreed = agreement(before, after, inputs=evaluation.inputs, batch_size=settings.batch_size)
    else:
        comparison = compare_accuracy(before, after, evaluation, metric, batch_size=settings.batch_size)
    placed = [_Placement(session.provider_obtained(), session.nodes_per_provider()) for session in (before, after)]
    return comparison, agreed, placed


def _figures(
    settings: TargetSettings, placed: _Placement, latency: LatencyFigures, memory: MemoryFigures, profiled: int | None
) -> TargetFigures:
    return TargetFigures(
        provider=settings.provider,
        provider_obtained=placed.obtained,
        threads=settings.threads,
        batch_size=settings.batch_size,
        latency_ms=latency.latency,
        session_ms=latency.session_ms,
        first_run_ms=latency.first_run_ms,
        peak_memory_bytes=memory.peak_memory_bytes,
        resident_memory_bytes=memory.resident_memory_bytes,
        activation_bytes_profiled=profiled,
        nodes_per_provider=placed.nodes,
    )


def _violations(side: str, figures: TargetFigures) -> list[str]:
    """Return why no claim about a provider can stand: it did not run the file, or not all of it."""
    if figures.provider_obtained != figures.provider:
        return [f"the {side} was asked to run on {figures.provider} but ran on {figures.provider_obtained}"]
    nodes = figures.nodes_per_provider
    if nodes is None:
        return (
            []
            if figures.provider == "CPUExecutionProvider"
            else [f"this onnxruntime does not tell where the nodes of the {side} ran"]
        )
    elsewhere = {name: count for name, count in nodes.items() if name != figures.provider}
    if not elsewhere:
        return []
    listed = ", ".join(f"{count} on {name}" for name, count in sorted(elsewhere.items()))
    return [
        f"{sum(elsewhere.values())} of {sum(nodes.values())} nodes of the {side} did not run on {figures.provider}: "
        f"{listed}"
    ]
