"""Reports in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from secateurs.tables import TRIAL_HEADINGS, VARIANT_HEADINGS, counted, figure_rows, trial_rows, variant_rows
from secateurs.terminal import escape

if TYPE_CHECKING:
    from secateurs.report import Report, Trial, Variant

__all__ = ["CLOSE", "print_report", "print_verdict", "trial_table"]

CLOSE: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0)}
"""Style of tables that have to fit 80 columns."""
_COLOURS = {"pass": "green", "fail": "red", "undecided": "yellow"}


def print_report(console: Console, report: Report, output: Path) -> None:
    """Print the report of a run: trials, figures, variants, what each pass did, and the verdict.

    Args:
        console: where.
        report: of the run.
        output: its folder.
    """
    if report.trials:
        console.print(trial_table(report.trials))
    console.print(_figures(report))
    if report.variants:
        console.print(_variants(report.variants))
    for record in report.passes:
        certificate = record.certificate
        proof = (
            ""
            if certificate is None
            else f", certified to {certificate.max_abs:.2g} on a scale of {certificate.scale:.3g}"
        )
        console.print(
            f"{escape(record.name)}: {counted(record.edits, 'edit')}, {len(record.skipped)} skipped{proof} [dim]({record.seconds:.1f} s)[/]"
        )
    _print_reasons(console, report)
    seconds = "" if report.seconds is None else f" in {report.seconds:.1f} s"
    unlimited = _unlimited(report, "`budget` in the recipe sets some")
    console.print(f"{_verdict(report)}{unlimited}{seconds}; everything is in {escape(str(output))}", soft_wrap=True)


def print_verdict(console: Console, report: Report) -> None:
    """Print the report of two files: figures, notes, and the verdict."""
    console.print(_figures(report))
    _print_reasons(console, report)
    for note in report.notes:
        console.print(escape(f"note: {note}"), soft_wrap=True)
    console.print(_verdict(report) + _unlimited(report, "`--budget` names a file with some"), soft_wrap=True)


def trial_table(trials: Sequence[Trial]) -> Table:
    """Return the table of the networks that a search tried."""
    table = Table(title="trials of the search, on validation data", **CLOSE)
    for heading in TRIAL_HEADINGS:
        table.add_column(heading, justify="right")
    for trial, row in zip(trials, trial_rows(trials), strict=True):
        table.add_row(*row, style="bold green" if trial.chosen and trial.accepted else None)
    return table


def _print_reasons(console: Console, report: Report) -> None:
    """Print why the verdict is no pass."""
    for reason in report.reasons:
        console.print(f"[red]{escape(reason)}[/]", soft_wrap=True)
    for row in report.budget:
        if row.status != "pass":
            measured = "nothing" if row.measured is None else f"{row.measured:.4g}"
            reason = f" ({row.reason})" if row.reason else ""
            where = f" on {row.target}" if row.target else ""
            told = f"{row.status}: {row.name}{where} measured {measured}, allowed {row.limit:g}{reason}"
            console.print(f"[red]{escape(told)}[/]", soft_wrap=True)


def _verdict(report: Report) -> str:
    return f"verdict: [bold {_COLOURS[report.verdict]}]{report.verdict}[/]"


def _unlimited(report: Report, remedy: str) -> str:
    """Return what has to be said of a verdict that passes because nothing was asked."""
    return f" (no limits were given: {remedy})" if not report.budget and report.verdict == "pass" else ""


def _variants(variants: Sequence[Variant]) -> Table:
    """Return the table of the files that quantisation leads to."""
    table = Table(title="pruning and quantisation, each file beside the dense one", **CLOSE)
    table.add_column(VARIANT_HEADINGS[0], min_width=10)
    for heading in VARIANT_HEADINGS[1:]:
        table.add_column(heading, justify="right", max_width=10)
    for one in variant_rows(variants):
        table.add_row(*one)
    return table


def _figures(report: Report) -> Table:
    """Return the table baseline | candidate | ratio | budget | verdict, a section per target."""
    table = Table(title="baseline and candidate, on the exported files", **CLOSE)
    table.add_column("figure", min_width=16)
    for heading in ("baseline", "candidate", "ratio", "budget"):
        table.add_column(heading, justify="right")
    table.add_column("verdict", min_width=9)
    where = ""
    for row in figure_rows(report):
        if row.where != where:
            where = row.where
            table.add_section()
            table.add_row(f"[bold]{escape(where)}[/]")
        verdict = f"[{_COLOURS[row.status]}]{row.status}[/]" if row.status else ""
        table.add_row(escape(row.what), row.baseline, row.candidate, row.ratio, row.budget, verdict)
    return table
