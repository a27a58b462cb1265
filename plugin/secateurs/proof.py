"""The proof of a run: both files measured side by side on every target, and judged by the budget."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from secateurs.budget import Budget, judge, verdict
from secateurs.data import Dataset
from secateurs.interfaces import Artifact, Measurement, Metric, ProgressEvent, Target, ratio
from secateurs.report import Environment, Estimate, LatencyRatio, Ratios, Report, Side, TargetFigures
from secateurs.settings import TargetSettings

__all__ = ["Compared", "Structure", "compare", "environment", "prove"]

_PACKAGES = (
    "secateurs",
    "torch",
    "torch-pruning",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxscript",
    "numpy",
    "safetensors",
)


@dataclass(frozen=True)
class Structure:
    """What is counted on the torch network: parameters, and multiply-accumulates of one example where they can be told."""

    params: int
    macs: int | None


def prove(
    baseline: Artifact,
    candidate: Artifact,
    targets: Sequence[tuple[Target, TargetSettings]],
    *,
    budget: Budget,
    evaluation: Dataset | None,
    metric: Metric,
    seed: int = 0,
    structures: tuple[Structure, Structure] | None = None,
    reasons: Sequence[str] = (),
    progress: Callable[[ProgressEvent], None] | None = None,
) -> Report:
    """Measure both files on every target and judge them.

    Args:
        baseline: the file before.
        candidate: the file after.
        targets: where to measure, in order.
        budget: the ceilings.
        evaluation: labelled examples for accuracy; None reports agreement on seeded inputs.
        metric: computed on the evaluation data.
        seed: for the environment block.
        structures: counts of the torch networks, baseline and candidate, where there are any.
        reasons: other reasons to fail the verdict, for example a target that was missed.
        progress: told of every step.

    Returns:
        The report, without passes.
    """
    found = compare(
        baseline,
        candidate,
        targets,
        evaluation=evaluation,
        metric=metric,
        structures=structures,
        decided=_latency_decided(budget),
        progress=progress,
    )
    rows = judge(budget, found.after, found.ratios)
    every = [*reasons, *(reason for one in found.measured for reason in one.violations), *_not_finite(found.after)]
    return Report(
        verdict=verdict(rows, every),
        reasons=every,
        baseline=found.before,
        candidate=found.after,
        ratios=found.ratios,
        parity=candidate.parity,
        budget=rows,
        notes=list(dict.fromkeys(note for one in found.measured for note in one.notes)),
        environment=environment(seed, targets[0][1].threads if targets else 1),
    )


@dataclass(frozen=True)
class Compared:
    """Two files measured beside each other: both sides, the ratios, and what each target said."""

    before: Side
    after: Side
    ratios: Ratios
    measured: list[Measurement]


def compare(
    baseline: Artifact,
    candidate: Artifact,
    targets: Sequence[tuple[Target, TargetSettings]],
    *,
    evaluation: Dataset | None,
    metric: Metric,
    structures: tuple[Structure, Structure] | None = None,
    decided: Callable[[Estimate], bool] | None = None,
    progress: Callable[[ProgressEvent], None] | None = None,
) -> Compared:
    """Measure both files on every target; arguments as for `prove`, `decided` as for `Target.measure`."""
    found = [
        target.measure(
            baseline,
            candidate,
            settings,
            evaluation=evaluation,
            metric=metric,
            decided=decided,
            progress=progress,
        )
        for target, settings in targets
    ]
    before = _side(baseline, [one.baseline for one in found], None if structures is None else structures[0])
    after = _side(candidate, [one.candidate for one in found], None if structures is None else structures[1])
    ratios = Ratios(
        params=ratio(after.params, before.params),
        macs=ratio(after.macs, before.macs),
        artifact_bytes=ratio(after.artifact_bytes, before.artifact_bytes),
        targets=[one.ratios for one in found],
    )
    return Compared(before, after, ratios, found)


def _not_finite(candidate: Side) -> list[str]:
    """Say where a candidate's metric has no value: its verdict fails, whatever the budget limits."""
    return [
        f"{one.accuracy.metric} of the candidate is not finite on {one.label}"
        for one in candidate.targets
        if one.accuracy is not None and one.accuracy.value is None
    ]


def _side(artifact: Artifact, figures: list[TargetFigures], structure: Structure | None) -> Side:
    return Side(
        file=artifact.path.name,
        exporter=artifact.exporter or None,
        opset=artifact.opset,
        params=None if structure is None else structure.params,
        macs=None if structure is None else structure.macs,
        weight_bytes=artifact.weight_bytes,
        artifact_bytes=artifact.artifact_bytes,
        accuracy=next((one.accuracy for one in figures if one.accuracy is not None), None),
        targets=figures,
    )


def _latency_decided(budget: Budget) -> Callable[[Estimate], bool]:
    def decided(estimate: Estimate) -> bool:
        typical = estimate.candidate_ms if isinstance(estimate, LatencyRatio) else None
        return _settled(budget.latency_ratio, estimate) and _settled(budget.latency_ms, typical)

    return decided


def _settled(limit: float | None, estimate: Estimate | None) -> bool:
    """Return whether a limit lies outside an interval, so that more repeats would hardly change the verdict."""
    if limit is None or estimate is None or estimate.ci95 is None:
        return True
    return not estimate.ci95[0] <= limit < estimate.ci95[1]


def environment(seed: int, threads: int) -> Environment:
    """Return the versions, processor and git revision that figures were measured with."""
    versions = {"python": platform.python_version(), "system": platform.platform()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Environment(versions=versions, cpu=_cpu(), threads=threads, seed=seed, git=_revision())


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = []
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()} ({os.cpu_count()} logical cores)"


def _revision() -> str | None:
    """Return the revision of the working directory, or None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)  # noqa: S603 - a fixed command
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
