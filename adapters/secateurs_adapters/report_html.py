"""`report.html`: one self-contained page drawn from a report. No network, no script; light and dark; readable on a phone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from secateurs.report import write_text
from secateurs.tables import TRIAL_HEADINGS, VARIANT_HEADINGS, figure_rows, trial_rows, variant_rows

if TYPE_CHECKING:
    from pathlib import Path

    from secateurs.report import Report

__all__ = ["render", "write_report_page"]

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Secateurs report: {{ report.verdict }}</title>
<style>
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --bad: #cf222e; --open: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --good: #3fb950; --bad: #f85149; --open: #d29922; } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .6rem; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.pass { color: var(--good); } .fail { color: var(--bad); } .undecided { color: var(--open); }
.map td { border: 0; padding: .15rem .3rem; text-align: right; font-size: .75rem; }
code { overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>Verdict: <span class="{{ report.verdict }}">{{ report.verdict }}</span></h1>
{% for reason in report.reasons %}<p class="fail">{{ reason }}</p>{% endfor %}
<div class="scroll"><table>
<thead><tr><th>figure</th><th>baseline</th><th>candidate</th><th>ratio</th><th>budget</th><th>verdict</th></tr></thead>
<tbody>
{% for row in rows %}<tr><td>{{ row.name }}</td><td class="number">{{ row.baseline }}</td>
<td class="number">{{ row.candidate }}</td><td class="number">{{ row.ratio }}</td><td class="number">{{ row.budget }}</td>
<td class="{{ row.status or '' }}">{{ row.status or '' }}</td></tr>
{% endfor %}</tbody></table></div>
{% if variants %}<h2>Pruning and quantisation</h2>
<p>Each file measured beside the dense one, on the first target.</p>
<div class="scroll"><table>
<thead><tr>{% for heading in variant_headings %}<th>{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in variants %}<tr>{% for cell in row %}<td class="number">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endif %}
{% if trials %}<h2>Search</h2>
<p>The networks that were tried, judged on validation data before any training at the end. Costs are ratios to the baseline.</p>
<div class="scroll"><table>
<thead><tr>{% for heading in trial_headings %}<th>{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in trials %}<tr>{% for cell in row %}<td class="number">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endif %}
{% for record in report.passes %}
<h2>{{ record.name }}</h2>
<p>{{ record.edits }} edits in {{ '%.1f' % record.seconds }} s.
{% if record.certificate %}Certified: differs from the masked original by {{ '%.2g' % record.certificate.max_abs }} on an output scale of
{{ '%.3g' % record.certificate.scale }}.{% endif %}</p>
{% if record.details.cka %}<h3>CKA of the blocks' outputs</h3>
<div class="scroll"><table class="map"><tbody>
{% for name in record.details.blocks %}{% set values = record.details.cka[loop.index0] %}<tr><th scope="row">{{ name }}</th>
{% for value in values %}<td style="background: rgb(31 119 180 / {{ '%.2f' % ([value, 0] | max) }})">{{ '%.2f' % value }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endif %}
{% if record.skipped %}<h3>Left alone</h3><ul>{% for item in record.skipped %}<li><code>{{ item.where }}</code>: {{ item.reason }}</li>
{% endfor %}</ul>{% endif %}
{% endfor %}
{% if report.notes %}<h2>Notes</h2><ul>{% for note in report.notes %}<li>{{ note }}</li>{% endfor %}</ul>{% endif %}
<h2>Measured with</h2>
<p>{{ report.environment.cpu }}, seed {{ report.environment.seed }}{% if report.environment.git %}, revision
<code>{{ report.environment.git }}</code>{% endif %}.</p>
<ul>{% for name, version in report.environment.versions.items() %}<li>{{ name }} {{ version }}</li>{% endfor %}</ul>
</body>
</html>
"""


def render(report: Report) -> str:
    """Return the page as HTML text; everything that comes from the report is escaped."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    data: dict[str, Any] = report.model_dump()
    for record in data["passes"]:
        record["details"].setdefault("cka", None)
    return environment.from_string(_TEMPLATE).render(
        report=data,
        rows=figure_rows(report),
        trials=trial_rows(report.trials),
        trial_headings=TRIAL_HEADINGS,
        variants=variant_rows(report.variants),
        variant_headings=VARIANT_HEADINGS,
    )


def write_report_page(report: Report, folder: Path) -> None:
    """Write `report.html` into `folder`, whole or not at all."""
    write_text(folder / "report.html", render(report))
