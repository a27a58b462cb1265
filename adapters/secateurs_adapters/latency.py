"""Latency of two files side by side: both sessions in each of several fresh processes, interleaved A B B A.

Noise between processes (memory layout, clock, neighbours) dwarfs the noise within one, so the process is the unit of
the statistics: each gives one log ratio of medians, and Student's t over these gives the interval. Two copies of one
file get an interval that holds 1 about as often as it claims to; a bootstrap over the runs of a single process does
not.

Run as `python -m secateurs_adapters.latency REQUEST.json` this module is the measuring process; it then imports numpy
and onnxruntime only.
"""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from secateurs_adapters.fresh import in_fresh_process, serve
from secateurs_adapters.session import Session, SessionOptions, seeded_inputs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from secateurs.report import Estimate, Latency, LatencyRatio
    from secateurs.settings import TargetSettings

__all__ = ["LatencyFigures", "LatencyResult", "latency_result", "latency_summary", "measure_latency", "ratio_estimate"]

_NS_PER_MS = 1e6


@dataclass(frozen=True)
class LatencyFigures:
    """One file, in milliseconds: a batch over the runs of all processes; medians of session creation and first run."""

    latency: Latency
    session_ms: float
    first_run_ms: float


@dataclass(frozen=True)
class LatencyResult:
    """Baseline beside candidate.

    Attributes:
        baseline: figures of the baseline.
        candidate: figures of the candidate.
        ratio: candidate over baseline, with its 95 % interval over processes.
        log_ratios: natural logarithm of the ratio of medians of each process.
    """

    baseline: LatencyFigures
    candidate: LatencyFigures
    ratio: Estimate
    log_ratios: tuple[float, ...]


def measure_latency(
    baseline: Path,
    candidate: Path,
    settings: TargetSettings,
    *,
    decided: Callable[[Estimate], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
    seed: int = 0,
) -> LatencyResult:
    """Measure both files in fresh processes, on seeded inputs placed on the device beforehand.

    Args:
        baseline: the baseline file.
        candidate: the candidate file.
        settings: provider, threads, batch size, processes, rounds per process.
        decided: whether an estimate answers the caller's question; asked after `settings.processes` processes and
            after each one more, up to `settings.max_processes`. It gets a `LatencyRatio`. Asking again makes the last
            interval a little optimistic. None asks nothing.
        progress: called with the processes done and the processes planned.
        seed: of the inputs.

    Raises:
        SecateursError: a process failed.
    """
    request: dict[str, Any] = {
        "files": {"baseline": str(baseline.resolve()), "candidate": str(candidate.resolve())},
        "provider": settings.provider,
        "options": settings.options,
        "threads": settings.threads,
        "batch_size": settings.batch_size,
        "length": settings.sequence_length,
        "repeats": settings.repeats,
        "warmup": settings.warmup,
        "seed": seed,
    }
    answers: list[dict[str, Any]] = []
    planned = settings.processes
    while len(answers) < planned:
        order = ["baseline", "candidate"] if len(answers) % 2 == 0 else ["candidate", "baseline"]
        answers.append(in_fresh_process("secateurs_adapters.latency", {**request, "order": order}))
        if progress is not None:
            progress(len(answers), planned)
        if len(answers) == planned < settings.max_processes and decided is not None and not decided(_so_far(answers)):
            planned += 1
    return latency_result(answers)


def latency_result(answers: Sequence[Mapping[str, Any]]) -> LatencyResult:
    """Return the figures of processes that each measured both files.

    Args:
        answers: of each process: for `baseline` and `candidate`, `samples_ms`, `session_ms` and `first_run_ms`.
    """
    logs = _log_ratios(answers)
    return LatencyResult(
        _figures(answers, "baseline"), _figures(answers, "candidate"), ratio_estimate(logs), tuple(logs)
    )


def ratio_estimate(log_ratios: list[float]) -> Estimate:
    """Return the geometric mean ratio of processes with Student's 95 % interval.

    >>> ratio_estimate([0.0, 0.0]).value
    1.0
    """
    from secateurs.intervals import student_interval
    from secateurs.report import Estimate

    low, high = student_interval(log_ratios)
    return Estimate(value=math.exp(statistics.fmean(log_ratios)), ci95=(math.exp(low), math.exp(high)))


def latency_summary(processes_ms: Sequence[Sequence[float]]) -> Latency:
    """Return median, tails and spread of the runs of each process; p95 from 40 runs on, p99 from 200, since a tail needs runs beyond it.

    >>> latency_summary([[1.0, 2.0, 3.0]]).p50
    2.0
    """
    from secateurs.report import Latency

    samples = [sample for process in processes_ms for sample in process]
    n = len(samples)
    p50, p95, p99 = (float(value) for value in np.percentile(samples, [50, 95, 99]))
    spread = float(np.std(samples, ddof=1) / np.mean(samples)) if n > 1 else 0.0
    medians = [math.log(statistics.median(process)) for process in processes_ms]
    return Latency(
        p50=p50,
        p95=p95 if n >= 40 else None,
        p99=p99 if n >= 200 else None,
        n=n,
        cv=spread,
        processes=len(processes_ms),
        p50_ci95=ratio_estimate(medians).ci95 if len(medians) > 1 else None,
    )


def _log_ratios(answers: Sequence[Mapping[str, Any]]) -> list[float]:
    medians = [
        {side: statistics.median(answer[side]["samples_ms"]) for side in ("baseline", "candidate")}
        for answer in answers
    ]
    return [math.log(median["candidate"] / median["baseline"]) for median in medians]


def _so_far(answers: Sequence[Mapping[str, Any]]) -> LatencyRatio:
    """Return what is known after some processes: the ratio, and the candidate's own latency."""
    from secateurs.report import Estimate, LatencyRatio

    found = latency_result(answers)
    own = found.candidate.latency
    return LatencyRatio(
        value=found.ratio.value, ci95=found.ratio.ci95, candidate_ms=Estimate(value=own.p50, ci95=own.p50_ci95)
    )


def _figures(answers: Sequence[Mapping[str, Any]], side: str) -> LatencyFigures:
    return LatencyFigures(
        latency=latency_summary([answer[side]["samples_ms"] for answer in answers]),
        session_ms=statistics.median(answer[side]["session_ms"] for answer in answers),
        first_run_ms=statistics.median(answer[side]["first_run_ms"] for answer in answers),
    )


def _measure_here(request: dict[str, Any]) -> Mapping[str, Any]:
    """Build both sessions in this process, warm them up, and time them A B B A."""
    answer: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], None]] = {}
    for side in request["order"]:
        answer[side], runs[side] = _prepare(Path(request["files"][side]), request)
    for _ in range(request["warmup"]):
        for run in runs.values():
            run()
    first, second = request["order"]
    clock = time.perf_counter_ns
    gc.disable()
    for _ in range(request["repeats"]):
        for side in (first, second, second, first):
            run = runs[side]
            start = clock()
            run()
            answer[side]["samples_ms"].append((clock() - start) / _NS_PER_MS)
    return answer


def _prepare(path: Path, request: Mapping[str, Any]) -> tuple[dict[str, Any], Callable[[], None]]:
    options = SessionOptions(
        provider=request["provider"], threads=request["threads"], provider_options=request["options"]
    )
    start = time.perf_counter_ns()
    session = Session(path, options)
    created = time.perf_counter_ns()
    feeds = seeded_inputs(session, request["batch_size"], request["seed"], request["length"])
    made = time.perf_counter_ns()
    outputs = session.run(feeds)
    finished = time.perf_counter_ns()
    times = {
        "session_ms": (created - start) / _NS_PER_MS,
        "first_run_ms": (finished - made) / _NS_PER_MS,
        "samples_ms": [],
    }
    return times, session.bind(feeds, outputs)


if __name__ == "__main__":
    serve(_measure_here, sys.argv[1:])
