"""The leaderboard: one row per model and target, with every verdict and reason, as CSV and JSON.

The rows follow from the results alone, so that an interrupted and resumed zoo ends with the table of an undisturbed one.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from secateurs.report import Side
from secateurs_adapters.junit import Case, suite_xml
from secateurs_adapters.zoo.results import Job, Result

__all__ = ["MEASURED", "OPEN", "Row", "counts", "leaderboard_csv", "leaderboard_json", "leaderboard_junit", "rows"]

OPEN = "not run"
"""The status of a model that has no result yet."""
MEASURED = frozenset(
    {"latency_ms", "latency_ratio", "peak_memory_bytes", "peak_memory_ratio", "seconds", "peak_rss_bytes"}
)
"""Columns that differ from run to run."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What makes a spreadsheet take a text for a formula."""


class Row(BaseModel):
    """One model on one target; ratios are candidate over baseline.

    Attributes:
        name: of the entry.
        status: of the model over all its targets.
        reason: all reasons.
        target: provider, batch size, length and threads.
        macs_ratio: of the networks.
        parameters_ratio: of the networks.
        artifact_ratio: of all files.
        accuracy_baseline: the recipe's metric on evaluation data.
        accuracy: the same of the candidate.
        accuracy_drop: how much worse; positive is worse.
        agreement: where there are no labels.
        latency_ms: median of the candidate.
        latency_ratio: of the medians.
        peak_memory_bytes: of the candidate.
        peak_memory_ratio: of the peaks.
        attempts: processes that were started.
        seconds: that the last of them took.
        peak_rss_bytes: its largest resident set.
        recipe: the recipe's file.
        folder: the model's output folder, relative to the zoo's.
        log: what its process printed, relative to the zoo's folder.
        key: hash of everything that determines the result.
    """

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="null")

    name: str
    status: str
    reason: str = ""
    target: str = ""
    macs_ratio: float | None = None
    parameters_ratio: float | None = None
    artifact_ratio: float | None = None
    accuracy_baseline: float | None = None
    accuracy: float | None = None
    accuracy_drop: float | None = None
    agreement: float | None = None
    latency_ms: float | None = None
    latency_ratio: float | None = None
    peak_memory_bytes: int | None = None
    peak_memory_ratio: float | None = None
    attempts: int | None = None
    seconds: float | None = None
    peak_rss_bytes: int | None = None
    recipe: str = ""
    folder: str = ""
    log: str = ""
    key: str = ""


def rows(jobs: Sequence[Job], results: Mapping[str, Result]) -> list[Row]:
    """Return the rows of all jobs, in their order.

    Args:
        jobs: of the zoo.
        results: those there are, by key.
    """
    found: list[Row] = []
    for job in jobs:
        result = results.get(job.key)
        if result is None:
            found.append(Row(name=job.name, status=OPEN, recipe=job.source, key=job.key))
        else:
            found += _rows_of(job, result)
    return found


def counts(found: Sequence[Row]) -> dict[str, int]:
    """Return how many models have each status, most first, then by name."""
    tally = Counter({row.name: row.status for row in found}.values())
    return dict(sorted(tally.items(), key=lambda item: (-item[1], item[0])))


def leaderboard_csv(found: Sequence[Row]) -> str:
    """Return the rows as CSV; texts that a spreadsheet would take for formulas begin with an apostrophe."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(Row.model_fields), lineterminator="\n")
    writer.writeheader()
    for row in found:
        values = row.model_dump(mode="json")
        writer.writerow({name: _harmless(value) for name, value in values.items()})
    return text.getvalue()


def leaderboard_json(found: Sequence[Row], results: Mapping[str, Result]) -> str:
    """Return the rows, the counts and the budget of every model as JSON."""
    body = {
        "schema_version": 1,
        "counts": counts(found),
        "rows": [row.model_dump(mode="json") for row in found],
        "budgets": {
            result.key: [row.model_dump(mode="json") for row in result.figures.budget]
            for result in results.values()
            if result.figures is not None
        },
    }
    return json.dumps(body, indent=2) + "\n"


def leaderboard_junit(found: Sequence[Row]) -> str:
    """Return the rows as JUnit XML, a test case per model: a verdict that does not pass is a failure, no verdict an error."""
    cases = []
    for row in {row.name: row for row in found}.values():
        outcome: Literal["failure", "error"] | None = None
        if row.status != "pass":
            outcome = "failure" if row.status in ("fail", "undecided") else "error"
        cases.append(Case("zoo", row.name, outcome, row.status, row.reason, row.seconds))
    return suite_xml(cases)


def _rows_of(job: Job, result: Result) -> list[Row]:
    row = Row(
        name=job.name,
        status=result.status,
        reason="; ".join(result.reasons),
        attempts=result.attempts,
        seconds=result.seconds,
        peak_rss_bytes=result.peak_rss_bytes,
        recipe=job.source,
        folder=result.folder if result.figures is not None else "",
        log=result.log,
        key=result.key,
    )
    figures = result.figures
    if figures is None:
        return [row]
    row.macs_ratio, row.parameters_ratio = figures.ratios.macs, figures.ratios.params
    row.artifact_ratio = figures.ratios.artifact_bytes
    if not figures.candidate.targets:
        return [row]
    return [row.model_copy(update=_measured(result, number)) for number in range(len(figures.candidate.targets))]


def _measured(result: Result, number: int) -> dict[str, object]:
    """Return the columns that belong to one target."""
    assert result.figures is not None
    figures = result.figures
    target, ratios = figures.candidate.targets[number], figures.ratios.targets[number]
    drop = ratios.accuracy_drop
    return {
        "target": target.label,
        "accuracy_baseline": _accuracy(figures.baseline, number),
        "accuracy": _accuracy(figures.candidate, number),
        "accuracy_drop": None if drop is None else drop.value,
        "agreement": ratios.agreement,
        "latency_ms": None if target.latency_ms is None else target.latency_ms.p50,
        "latency_ratio": None if ratios.latency_p50 is None else ratios.latency_p50.value,
        "peak_memory_bytes": target.peak_memory_bytes,
        "peak_memory_ratio": ratios.peak_memory,
    }


def _accuracy(side: Side, number: int) -> float | None:
    accuracy = side.targets[number].accuracy
    return None if accuracy is None else accuracy.value


def _harmless(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
