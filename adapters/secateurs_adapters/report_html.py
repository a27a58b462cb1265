"""`report.html`: one self-contained page drawn from a report. No network, no script; light and dark; readable on a phone, printable.

Everything that comes from a report is escaped, and a policy in the page forbids it to load or to run anything.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from secateurs.files import write_text
from secateurs.tables import TRIAL_HEADINGS, VARIANT_HEADINGS, figure_rows, metric_text, trial_rows, variant_rows
from secateurs_adapters.report_figures import details_of, figures_of_pass, figures_of_report

if TYPE_CHECKING:
    from pathlib import Path

    from secateurs.report import BudgetRow, PassRecord, Report

__all__ = ["render", "verdict_in_words", "write_report_page"]

_TEMPLATE = "report.html.jinja"
_LARGEST_RECIPE = 64 * 1024
"""Bytes of a recipe that is shown whole."""
_MIB = 2**20
_UNITS = {"mib": "MiB", "ms": "ms"}
_WORDS = {"mib": "", "ms": "", "ratio": ", candidate / baseline"}
_NAMES = {"macs": "MACs", "artifact": "size of all files", "fits": "smallest memory limit"}
_TIMES = "\N{MULTIPLICATION SIGN}"


# --- words --------------------------------------------------------------------------------------------------------------------------------


def verdict_in_words(report: Report) -> str:
    """Return the verdict as a sentence: how many limits hold, and what else is wrong."""
    limits = report.budget
    held = sum(row.status == "pass" for row in limits)
    told = "no limit was asked for" if not limits else f"{held} of {len(limits)} limits hold"
    if limits and held == len(limits):
        told = "the one limit holds" if held == 1 else f"all {held} limits hold"
    more = len(report.reasons)
    other = "" if not more else f", and {more} other check{'s fail' if more > 1 else ' fails'}"
    word = {"pass": "Passes", "fail": "Fails", "undecided": "Undecided"}[report.verdict]
    return f"{word}: {told}{other}."


@dataclass(frozen=True)
class _Limit:
    """One row of the budget, in words."""

    name: str
    measured: str
    allowed: str
    status: str
    reason: str


def _limit(row: BudgetRow) -> _Limit:
    stem, _, kind = row.name.rpartition("_")
    name = row.name.replace("_", " ")
    if kind in _WORDS:
        name = _NAMES.get(stem, stem.replace("_", " ")) + _WORDS[kind]
    unit = f" {_UNITS[kind]}" if kind in _UNITS else ""
    spread = "" if row.ci95 is None else f" [{row.ci95[0]:.4g}, {row.ci95[1]:.4g}]"
    measured = "not measured" if row.measured is None else f"{row.measured:.4g}{unit}{spread}"
    where = f" ({row.target})" if row.target else ""
    return _Limit(name + where, measured, f"at most {row.limit:g}{unit}", row.status, row.reason or "")


@dataclass(frozen=True)
class _Tile:
    """One figure in large: the ratio, and what it is of."""

    name: str
    large: str
    small: str


def _tiles(report: Report) -> Iterator[_Tile]:
    before, after, ratios = report.baseline, report.candidate, report.ratios
    for name, share, one, other in (
        ("parameters", ratios.params, before.params, after.params),
        ("MACs", ratios.macs, before.macs, after.macs),
    ):
        if share is not None and one is not None and other is not None:
            yield _Tile(name, f"{_TIMES} {share:.2f}", f"{one:,} → {other:,}")
    if ratios.artifact_bytes is not None and before.artifact_bytes and after.artifact_bytes:
        sizes = f"{before.artifact_bytes / _MIB:.3g} → {after.artifact_bytes / _MIB:.3g} MiB"
        yield _Tile("files", f"{_TIMES} {ratios.artifact_bytes:.2f}", sizes)
    if not (before.targets and after.targets and ratios.targets):
        return
    first, second, share_of = before.targets[0], after.targets[0], ratios.targets[0]
    if share_of.latency_p50 is not None and first.latency_ms and second.latency_ms:
        yield _Tile(
            "latency",
            f"{_TIMES} {share_of.latency_p50.value:.2f}",
            f"{first.latency_ms.p50:.3g} → {second.latency_ms.p50:.3g} ms",
        )
    if share_of.peak_memory is not None and first.peak_memory_bytes and second.peak_memory_bytes:
        peaks = f"{first.peak_memory_bytes / _MIB:.3g} → {second.peak_memory_bytes / _MIB:.3g} MiB"
        yield _Tile("peak memory", f"{_TIMES} {share_of.peak_memory:.2f}", peaks)
    if first.accuracy is not None and second.accuracy is not None:
        was, now = (metric_text(one, ".4g") for one in (first.accuracy, second.accuracy))
        yield _Tile(first.accuracy.metric, now, f"was {was}")


# --- the page -----------------------------------------------------------------------------------------------------------------------------


def _pass(record: PassRecord) -> dict[str, Any]:
    details = details_of(record)
    return {
        "record": record,
        "figures": list(figures_of_pass(details)),
        "dropped": details.dropped,
        "rounds": details.rounds,
        "settings": [(name, "none" if value is None else str(value)) for name, value in record.settings.items()],
    }


def render(report: Report, recipe: str | None = None) -> str:
    """Return the page as HTML text; everything that comes from the report is escaped.

    Args:
        report: what to draw.
        recipe: text of the resolved recipe that lies beside the report; None where there is none.
    """
    import jinja2

    source = importlib.resources.files("secateurs_adapters").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source).render(
        report=report,
        verdict=verdict_in_words(report),
        limits=[_limit(row) for row in report.budget],
        tiles=list(_tiles(report)),
        rows=figure_rows(report),
        figures=list(figures_of_report(report)),
        passes=[_pass(record) for record in report.passes],
        trials=[
            (*row, "" if trial.latency_ratio is None else f"{trial.latency_ratio:.3f}", "; ".join(trial.reasons))
            for trial, row in zip(report.trials, trial_rows(report.trials), strict=True)
        ],
        trial_headings=(*TRIAL_HEADINGS, "latency, predicted", "why"),
        variants=variant_rows(report.variants),
        variant_headings=VARIANT_HEADINGS,
        recipe=recipe,
    )


def write_report_page(report: Report, folder: Path) -> None:
    """Write `report.html` into `folder`, whole or not at all; the recipe there, if it is a plain file, is shown in it."""
    path = folder / "recipe.yaml"
    recipe = None
    if path.is_file() and not path.is_symlink() and path.stat().st_size <= _LARGEST_RECIPE:
        recipe = path.read_text(encoding="utf-8", errors="replace")
    write_text(folder / "report.html", render(report, recipe))
