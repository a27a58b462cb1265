"""The model card of an output folder."""

from __future__ import annotations

from collections.abc import Sequence

from secateurs.recipe import Recipe
from secateurs.report import Report, Trial
from secateurs.tables import TRIAL_HEADINGS, figure_rows, trial_rows

__all__ = ["model_card"]


def model_card(report: Report, recipe: Recipe) -> str:
    """Return the model card of an output folder, as Markdown."""
    rows = "\n".join(
        f"| {row.name} | {row.baseline} | {row.candidate} | {row.ratio} | {row.budget} | {row.status or ''} |"
        for row in figure_rows(report)
    )
    passes = "\n".join(
        f"* `{record.name}`: {record.edits} edits, {len(record.skipped)} skipped" for record in report.passes
    )
    return f"""# Pruned network

Verdict: **{report.verdict}**{"".join(f" ({reason})" for reason in report.reasons)}

| | baseline | candidate | ratio | budget | verdict |
|---|---|---|---|---|---|
{rows}

## How it was made

{passes}
{_searched(report.trials)}
Network: `{recipe.model.loader}: {recipe.model.value}`. The resolved recipe is `recipe.yaml`; every edit, with its reason, is in `plan.json`.

## How to use it

`model.onnx` runs on onnxruntime by itself. The torch network is rebuilt without pickle:

    import secateurs
    model = secateurs.load("FOLDER", build=MyNetwork)  # MyNetwork() returns the original structure
"""


def _searched(trials: Sequence[Trial]) -> str:
    """Return the model card's part about a search, empty where there was none."""
    if not trials:
        return ""
    rows = [TRIAL_HEADINGS, ("---",) * len(TRIAL_HEADINGS), *trial_rows(trials)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"""
A search tried these networks, each judged on validation data before any training at the end; costs are ratios to the baseline:

{table}
"""
