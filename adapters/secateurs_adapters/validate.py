"""Two files on one or more targets: what they cost, how right they are, and whether that is within the budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from secateurs.interfaces import Measurement, ProgressEvent, WidthMultiple, ratio
from secateurs.intervals import binomial_interval, paired_difference_interval
from secateurs.proof import prove
from secateurs.report import Accuracy, Estimate, Pairs, TargetFigures, TargetRatios
from secateurs_adapters.accuracy import SEEDED_EXAMPLES, Comparison, agreement, compare_accuracy
from secateurs_adapters.artifact import read_artifact
from secateurs_adapters.latency import LatencyFigures, measure_latency
from secateurs_adapters.placement import Placement, place, violation
from secateurs_adapters.schedule import fit_schedule
from secateurs_adapters.session import Session, SessionOptions, check_options, check_provider
from secateurs_adapters.vetting import limits_for, vet_file
from secateurs_adapters.views import Views, take_views
from secateurs_adapters.widths import preferred_multiple

if TYPE_CHECKING:
    from pathlib import Path

    from secateurs.budget import Budget
    from secateurs.data import Dataset
    from secateurs.interfaces import Artifact, Metric
    from secateurs.report import Report
    from secateurs.settings import TargetSettings

__all__ = ["OnnxRuntimeTarget", "onnxruntime_target", "validate_files"]

FEW_REPEATS = 0.95
"""Repeated evaluation examples that cost less than a twentieth of what all of them tell are let pass."""

Progress = Callable[[ProgressEvent], None]

SEED = 0
"""Of every seeded input."""


class OnnxRuntimeTarget:
    """Implements `secateurs.interfaces.Target` on onnxruntime's execution providers.

    Args:
        examples: seeded inputs on which agreement is taken where there are no labels.
    """

    def __init__(self, examples: int = SEEDED_EXAMPLES) -> None:
        self.examples = examples

    def check(self, settings: TargetSettings) -> None:
        """Refuse a provider, or options of it, that cannot be had here; see `Target.check`."""
        check_provider(settings.provider)
        check_options(settings.provider, settings.options)

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
        comparison, agreed = _compare(baseline, candidate, settings, evaluation, metric, self.examples)
        if comparison is not None and evaluation is not None:
            comparison = _discounted(comparison, evaluation.effective_share)
        latency = measure_latency(
            baseline.path,
            candidate.path,
            settings,
            decided=decided,
            progress=lambda done, total: tell(1, f"latency, process {done} of {total}"),
            seed=SEED,
        )
        views = take_views([baseline, candidate], settings, seed=SEED, tell=lambda view: tell(2, view))
        tell(3, "placement")
        placed = [place(file.path, settings, seed=SEED) for file in (baseline, candidate)]
        tell(4, "done")
        first = _figures(settings, placed[0], latency.baseline, views[0])
        second = _figures(settings, placed[1], latency.candidate, views[1])
        if comparison is not None:
            first.accuracy, second.accuracy = comparison.baseline, comparison.candidate
        ratios = TargetRatios(
            latency_p50=latency.ratio,
            peak_memory=ratio(second.peak_memory_bytes, first.peak_memory_bytes),
            fits=ratio(second.fits_bytes, first.fits_bytes),
            accuracy_drop=None if comparison is None else comparison.drop,
            accuracy_pairs=None if comparison is None else comparison.pairs,
            agreement=None if agreed is None else next(iter(agreed.values())),
            agreement_per_output=agreed,
        )
        found = [violation(side, one, settings) for side, one in zip(("baseline", "candidate"), placed, strict=True)]
        violations = tuple(reason for reason in found if reason is not None)
        return Measurement(first, second, ratios, violations, (*_repeated(evaluation), *_notes(settings, views)))


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
    adopt_batch: bool = False,
    time_limit: float | None = None,
    memory_limit_mib: int | None = None,
) -> Report:
    """Measure a candidate file against a baseline file on every target, and judge it by a budget.

    Nothing is known of the files, so each is tried in a process with limits before anything else is done with it; a file whose runs take long
    is run less often.

    Args:
        baseline: ONNX file of the network before.
        candidate: ONNX file of the network after.
        targets: where to measure, in order.
        budget: the ceilings.
        evaluation: labelled examples; None reports agreement on seeded inputs instead of accuracy.
        metric: computed on the evaluation data.
        progress: told of every step.
        adopt_batch: take the batch size that the files fix instead of refusing another.
        time_limit: seconds that runs may take per target and per first try; None lets the limit grow with the files.
        memory_limit_mib: MiB that a file may take at the first try; None lets the limit grow with the file.

    Returns:
        The report; nothing is written.

    Raises:
        UserError: a file, a provider or the data cannot be used.
    """
    start = time.perf_counter()
    for settings in targets:
        onnxruntime_target.check(settings)
    files = (read_artifact(baseline), read_artifact(candidate))
    measured = [
        _vetted(files, settings, adopt_batch=adopt_batch, time_limit=time_limit, memory_limit_mib=memory_limit_mib)
        for settings in targets
    ]
    report = prove(
        *files,
        [(target, settings) for target, settings, _ in measured],
        budget=budget,
        evaluation=evaluation,
        metric=metric,
        seed=SEED,
        progress=progress,
    )
    report.notes += [note for _, _, notes in measured for note in notes]
    if evaluation is None:
        report.notes.append(
            "no data was given: the agreement is on seeded random inputs, and says nothing of accuracy on real ones"
        )
    elif evaluation.labels is None:
        report.notes.append(
            f"the data has no labels, so that agreement takes the place of {metric.name}: its arrays are {sorted(evaluation.inputs)}, and an "
            ".npz has labels in the array `labels`"
        )
    report.seconds = time.perf_counter() - start
    return report


def _vetted(
    files: tuple[Artifact, Artifact],
    settings: TargetSettings,
    *,
    adopt_batch: bool,
    time_limit: float | None,
    memory_limit_mib: int | None,
) -> tuple[OnnxRuntimeTarget, TargetSettings, list[str]]:
    """Try both files on a target; return how to measure them within the time, and what was changed for that."""
    slowest, notes = 0.0, []
    for artifact in files:
        limits = limits_for(artifact, seconds=time_limit, memory_mib=memory_limit_mib)
        vetted = vet_file(artifact, settings, limits, adopt_batch=adopt_batch, seed=SEED)
        adopt_batch = False
        if vetted.sequence_length is not None and settings.sequence_length is None:
            notes.append(
                f"dynamic axes other than the batch are {vetted.sequence_length} long, since {artifact.path.name} does not run at 16; "
                "`--sequence-length` sets another length"
            )
        settings = settings.model_copy(
            update={
                "batch_size": vetted.batch_size,
                "sequence_length": settings.sequence_length or vetted.sequence_length,
            }
        )
        slowest = max(slowest, vetted.run_ms)
    allowed = time_limit if time_limit is not None else 12 + 12 * max(file.artifact_bytes for file in files) / 2**20
    schedule = fit_schedule(settings, SEEDED_EXAMPLES, slowest, allowed)
    return OnnxRuntimeTarget(schedule.examples), schedule.settings, notes + list(schedule.notes)


def _compare(
    baseline: Artifact,
    candidate: Artifact,
    settings: TargetSettings,
    evaluation: Dataset | None,
    metric: Metric,
    examples: int,
) -> tuple[Comparison | None, dict[str, float] | None]:
    """Return the metric's comparison where there are labels, else the agreement of the outputs."""
    options = SessionOptions(settings.provider, settings.threads, settings.options)
    before, after = Session(baseline.path, options), Session(candidate.path, options)
    if evaluation is not None and evaluation.labels is not None:
        return compare_accuracy(before, after, evaluation, metric, batch_size=settings.batch_size), None
    inputs = None if evaluation is None else evaluation.inputs
    agreed = agreement(
        before,
        after,
        inputs=inputs,
        batch_size=settings.batch_size,
        length=settings.sequence_length,
        examples=examples,
        seed=SEED,
    )
    return None, agreed


def _discounted(comparison: Comparison, share: float) -> Comparison:
    """Return a comparison whose intervals, and the pairs behind them, rest on a share of the examples; the figures stay.

    Args:
        comparison: of all examples.
        share: `Dataset.effective_share`, in (0, 1].
    """
    pairs, drop = comparison.pairs, comparison.drop
    if share >= FEW_REPEATS or pairs is None or drop is None:
        return comparison
    lost, gained, n = (round(count * share) for count in (pairs.lost, pairs.gained, pairs.n))
    n = max(n, lost + gained, 1)
    interval = paired_difference_interval(lost, gained, n)
    return Comparison(
        _rated(comparison.baseline, n),
        _rated(comparison.candidate, n),
        Estimate(value=drop.value, ci95=interval),
        Pairs(lost=lost, gained=gained, n=n),
    )


def _rated(accuracy: Accuracy, n: int) -> Accuracy:
    """Return an accuracy with the interval that it has on `n` examples."""
    hits = round((accuracy.value or 0.0) * n)
    return accuracy.model_copy(update={"ci95": binomial_interval(hits, n)})


def _repeated(evaluation: Dataset | None) -> tuple[str, ...]:
    """Say how many examples are distinct, where many repeat others."""
    if evaluation is None or evaluation.effective_share >= FEW_REPEATS:
        return ()
    return (
        f"only {len(evaluation.repeats[0])} of {len(evaluation)} evaluation examples are distinct: intervals, and `accuracy_confidence`, count "
        f"them as {len(evaluation) * evaluation.effective_share:.0f} independent ones; more distinct examples narrow them",
    )


def _notes(settings: TargetSettings, views: Sequence[Views]) -> tuple[str, ...]:
    """Say why a figure that was asked for is missing or approximate."""
    reasons = [
        f"{view} memory on {settings.provider}: {reason}"
        for one in views
        for view, reason in one.memory.reasons.items()
        if view != "fits" or settings.fits
    ]
    return tuple(dict.fromkeys(reasons))


def _figures(settings: TargetSettings, placed: Placement, latency: LatencyFigures, views: Views) -> TargetFigures:
    return TargetFigures(
        provider=settings.provider,
        provider_obtained=placed.obtained,
        threads=settings.threads,
        batch_size=settings.batch_size,
        sequence_length=settings.sequence_length,
        latency_ms=latency.latency,
        session_ms=latency.session_ms,
        first_run_ms=latency.first_run_ms,
        peak_memory_bytes=views.measured.peak_memory_bytes,
        resident_memory_bytes=views.measured.resident_memory_bytes,
        proportional_memory_bytes=views.measured.proportional_memory_bytes,
        activation_bytes_planned=views.planned,
        activation_bytes_profiled=views.profiled,
        fits_bytes=views.fits,
        memory=views.memory,
        nodes_per_provider=None if placed.nodes is None else dict(placed.nodes),
        time_per_provider=None if placed.time is None else dict(placed.time),
    )
