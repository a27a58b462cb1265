"""A report's figures and trials as rows of text: the same rows in the terminal, in the model card and in the HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from secateurs.report import Accuracy, BudgetRow, Latency, Report, Status, TargetFigures, TargetRatios, Trial, Variant

__all__ = [
    "TRIAL_HEADINGS",
    "VARIANT_HEADINGS",
    "FigureRow",
    "counted",
    "figure_rows",
    "metric_text",
    "trial_rows",
    "variant_rows",
]

TRIAL_HEADINGS = ("trial", "blocks", "target", "cost", "MACs", "params", "metric", "drop", "-/+", "kept")
"""Of the rows of `trial_rows`; -/+ are the examples that only the baseline, and only the candidate, gets right."""
VARIANT_HEADINGS = ("file", "MiB", "ratio", "metric", "drop", "latency p50, ms", "ratio", "peak memory, MiB", "ratio")
"""Of the rows of `variant_rows`; ratios and drop are to the dense file."""
_MIB = 1024 * 1024


@dataclass(frozen=True)
class FigureRow:
    """One figure: baseline, candidate, ratio, and the budget with its status where there is one.

    Attributes:
        what: was measured, with its unit.
        baseline: the figure of the dense network.
        candidate: of the pruned one.
        ratio: of the two, or the drop.
        budget: the limits on it.
        status: whether they hold.
        where: the target that it was measured on; empty for what depends on none.
    """

    what: str
    baseline: str
    candidate: str
    ratio: str = ""
    budget: str = ""
    status: Status | None = None
    where: str = ""

    @property
    def name(self) -> str:
        """What was measured, and where."""
        return f"{self.what} ({self.where})" if self.where else self.what


def figure_rows(report: Report) -> list[FigureRow]:
    """Return every figure that was measured or has a budget, in the order in which people ask for them."""
    b, c, r = report.baseline, report.candidate, report.ratios
    budget = {(row.name, row.target): row for row in report.budget}
    rows: list[FigureRow | None] = [
        _row("parameters", b.params, c.params, r.params, budget.get(("parameters_ratio", None)), count=True),
        _row("MACs", b.macs, c.macs, r.macs, budget.get(("macs_ratio", None)), count=True),
        _row(
            "all files, MiB",
            _mib(b.artifact_bytes),
            _mib(c.artifact_bytes),
            r.artifact_bytes,
            budget.get(("artifact_mib", None)),
            budget.get(("artifact_ratio", None)),
        ),
    ]
    for before, after, ratios in zip(b.targets, c.targets, r.targets, strict=True):
        rows += _target_rows(before, after, ratios, budget)
    return [row for row in rows if row is not None]


def trial_rows(trials: Sequence[Trial]) -> list[tuple[str, ...]]:
    """Return the networks that a search tried, in order; costs are ratios to the baseline."""
    return [
        (
            str(trial.number),
            str(trial.blocks),
            *(
                "" if value is None else f"{value:.3f}"
                for value in (trial.target, trial.cost_ratio, trial.macs_ratio, trial.params_ratio)
            ),
            *("not finite" if value is None else f"{value:.4f}" for value in (trial.validation, trial.drop)),
            "" if trial.n is None else f"{trial.lost}/{trial.gained}",
            "chosen" if trial.chosen else "yes" if trial.accepted else "no",
        )
        for trial in trials
    ]


def variant_rows(variants: Sequence[Variant]) -> list[tuple[str, ...]]:
    """Return the files that quantisation leads to, with the first target's figures; the one that ships says so."""

    def text(value: float | None, form: str = ".4g") -> str:
        return "" if value is None else format(value, form)

    rows: list[tuple[str, ...]] = []
    for one in variants:
        target = one.side.targets[0] if one.side.targets else None
        ratios = one.ratios.targets[0] if one.ratios and one.ratios.targets else TargetRatios()
        latency = target.latency_ms if target else None
        rows.append(
            (
                f"{one.name} (ships)" if one.ships else one.name,
                text(_mib(one.side.artifact_bytes)),
                text(one.ratios.artifact_bytes if one.ratios else None, ".3f"),
                metric_text(one.side.accuracy, ".4f") if one.side.accuracy else text(ratios.agreement, ".4f"),
                text(ratios.accuracy_drop.value if ratios.accuracy_drop else None, ".4f"),
                text(latency.p50 if latency else None),
                text(ratios.latency_p50.value if ratios.latency_p50 else None, ".3f"),
                text(_mib(target.peak_memory_bytes) if target else None),
                text(ratios.peak_memory, ".3f"),
            )
        )
    return rows


def counted(number: int, what: str) -> str:
    """Return a number of things as text.

    >>> counted(1, "edit"), counted(2, "edit")
    ('1 edit', '2 edits')
    """
    return f"{number} {what}{'' if number == 1 else 's'}"


def metric_text(accuracy: Accuracy, form: str) -> str:
    """Return the value of a metric as text."""
    return "not finite" if accuracy.value is None else format(accuracy.value, form)


def _target_rows(
    before: TargetFigures, after: TargetFigures, ratios: TargetRatios, budget: dict[tuple[str, str | None], BudgetRow]
) -> list[FigureRow | None]:
    label = before.label
    where = f"{before.provider.removesuffix('ExecutionProvider')}, batch {before.batch_size}, {counted(before.threads, 'thread')}"
    where += "" if before.sequence_length is None else f", length {before.sequence_length}"
    accuracy = latency = None
    if before.accuracy is not None and after.accuracy is not None:
        row = budget.get(("accuracy_drop", label))
        drop = ratios.accuracy_drop
        accuracy = FigureRow(
            f"{before.accuracy.metric}, {before.accuracy.n} examples",
            metric_text(before.accuracy, ".4f"),
            metric_text(after.accuracy, ".4f"),
            "" if drop is None else f"drop {drop.value:.4f}",
            "" if row is None else f"drop <= {row.limit:g}",
            None if row is None else row.status,
            where,
        )
    elif ratios.agreement is not None:
        accuracy = FigureRow("agreement of the outputs", "", f"{ratios.agreement:.4f}", where=where)
    if before.latency_ms is not None and after.latency_ms is not None:
        measured = ratios.latency_p50
        rows = [row for name in ("latency_ratio", "latency_ms") if (row := budget.get((name, label)))]
        spread = (
            "" if measured is None or measured.ci95 is None else f" [{measured.ci95[0]:.3f}, {measured.ci95[1]:.3f}]"
        )
        latency = FigureRow(
            "latency p50, ms",
            f"{before.latency_ms.p50:.4g}",
            f"{after.latency_ms.p50:.4g}",
            "" if measured is None else f"{measured.value:.3f}{spread}",
            _limits(rows),
            _worst(rows),
            where,
        )
    activations = (before.activation_bytes_profiled, after.activation_bytes_profiled)
    planned = (before.activation_bytes_planned, after.activation_bytes_planned)
    return [
        accuracy,
        latency,
        *_spread_rows(before.latency_ms, after.latency_ms, where),
        _row(
            "peak memory, MiB",
            _mib(before.peak_memory_bytes),
            _mib(after.peak_memory_bytes),
            ratios.peak_memory,
            budget.get(("peak_memory_mib", label)),
            budget.get(("peak_memory_ratio", label)),
            where=where,
        ),
        _row("activation peak, MiB", _mib(activations[0]), _mib(activations[1]), _share(*activations), where=where),
        _row("activation peak as planned, MiB", _mib(planned[0]), _mib(planned[1]), _share(*planned), where=where),
        _row(
            "smallest memory limit, MiB",
            _mib(before.fits_bytes),
            _mib(after.fits_bytes),
            ratios.fits,
            budget.get(("fits_mib", label)),
            where=where,
        ),
    ]


def _spread_rows(before: Latency | None, after: Latency | None, where: str) -> list[FigureRow | None]:
    """Return tails and noise of the latency: a percentile only where there were runs enough for it."""
    if before is None or after is None:
        return []
    rows = [
        _row(f"latency {name}, ms", getattr(before, name), getattr(after, name), None, where=where)
        for name in ("p95", "p99")
    ]
    noise, other = (f"{one.cv:.0%} of {one.n} runs" for one in (before, after))
    return [*rows, FigureRow("latency noise, cv", noise, other, where=where)]


def _row(
    name: str,
    before: float | None,
    after: float | None,
    share: float | None,
    *limits: BudgetRow | None,
    count: bool = False,
    where: str = "",
) -> FigureRow | None:
    if before is None and after is None:
        return None
    rows = [row for row in limits if row is not None]

    def text(value: float | None) -> str:
        return "not measured" if value is None else f"{int(value):,}" if count else f"{value:.4g}"

    return FigureRow(
        name, text(before), text(after), "" if share is None else f"{share:.3f}", _limits(rows), _worst(rows), where
    )


def _limits(rows: list[BudgetRow]) -> str:
    units = {"latency_ms": " ms", "artifact_mib": " MiB", "peak_memory_mib": " MiB", "fits_mib": " MiB"}
    return ", ".join(f"<= {row.limit:g}{units.get(row.name, '')}" for row in rows)


def _worst(rows: list[BudgetRow]) -> Status | None:
    found = {row.status for row in rows}
    return next((status for status in ("fail", "undecided", "pass") if status in found), None)


def _share(before: int | None, after: int | None) -> float | None:
    """Return candidate over baseline, or None where either was not measured."""
    return None if after is None or not before else after / before


def _mib(value: int | None) -> float | None:
    return None if value is None else value / _MIB
