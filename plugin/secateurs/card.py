"""The model card of an output folder."""

from __future__ import annotations

import re
from collections.abc import Sequence

from secateurs.errors import printable
from secateurs.recipe import Recipe
from secateurs.report import Report, Trial, Variant
from secateurs.tables import TRIAL_HEADINGS, VARIANT_HEADINGS, counted, figure_rows, trial_rows, variant_rows

__all__ = ["model_card"]


def model_card(report: Report, recipe: Recipe) -> str:
    """Return the model card of an output folder, as Markdown."""
    rows = "\n".join(
        f"| {row.name} | {row.baseline} | {row.candidate} | {row.ratio} | {row.budget} | {row.status or ''} |"
        for row in figure_rows(report)
    )
    passes = "\n".join(
        f"* `{record.name}`: {counted(record.edits, 'edit')}, {len(record.skipped)} skipped" for record in report.passes
    )
    return f"""# Pruned network

Verdict: **{report.verdict}**{"".join(f" ({_plain(reason)})" for reason in report.reasons)}

| | baseline | candidate | ratio | budget | verdict |
|---|---|---|---|---|---|
{rows}
{_variants(report.variants)}
## How it was made

{passes}
{_searched(report.trials)}
Network: `{recipe.model.loader}: {recipe.model.value}`. The resolved recipe is `recipe.yaml`; every edit, with its reason, is in `plan.json`.

## How to use it

`{report.candidate.file or "model.onnx"}` runs on onnxruntime by itself{_opset(report)}. The torch network is rebuilt without pickle:

    {_loading(recipe)}
"""


def _plain(text: str) -> str:
    """Return text without what Markdown or a browser would take for more than text."""
    return re.sub(r"([\\`*<>\[\]|#])", r"\\\1", " ".join(printable(text).split()))


def _loading(recipe: Recipe) -> str:
    """Return the lines that rebuild the torch network."""
    if recipe.model.loader == "hf":
        return 'from secateurs_adapters.hf_models import load_pruned\n    model = load_pruned("FOLDER")'
    return (
        "import secateurs\n"
        '    model = secateurs.load("FOLDER", build=MyNetwork)  # MyNetwork() returns the original structure'
    )


def _opset(report: Report) -> str:
    side = report.candidate
    return f" (written by {side.exporter}, opset {side.opset})" if side.exporter and side.opset else ""


def _variants(variants: Sequence[Variant]) -> str:
    """Return the model card's table of dense, pruned and quantised files, empty without quantisation."""
    if not variants:
        return ""
    rows = [VARIANT_HEADINGS, ("---",) * len(VARIANT_HEADINGS), *variant_rows(variants)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"""
Pruning and quantisation, each file measured beside the dense one:

{table}
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
