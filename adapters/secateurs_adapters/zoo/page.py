"""The leaderboard as one self-contained page: no network; light and dark; sorted by a click on a heading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from secateurs_adapters.zoo.leaderboard import Row, counts

__all__ = ["leaderboard_page"]

_MIB = 2**20
_COLUMNS: tuple[tuple[str, str, float, str], ...] = (
    # column of the row, heading, divisor, format
    ("macs_ratio", "MACs", 1, ".3f"),
    ("parameters_ratio", "parameters", 1, ".3f"),
    ("artifact_ratio", "files", 1, ".3f"),
    ("accuracy_baseline", "accuracy before", 1, ".4f"),
    ("accuracy", "accuracy", 1, ".4f"),
    ("accuracy_drop", "drop", 1, ".4f"),
    ("agreement", "agreement", 1, ".4f"),
    ("latency_ms", "latency p50, ms", 1, ".4g"),
    ("latency_ratio", "latency", 1, ".3f"),
    ("peak_memory_bytes", "peak memory, MiB", _MIB, ".3f"),
    ("peak_memory_ratio", "peak memory", 1, ".3f"),
    ("seconds", "seconds", 1, ".1f"),
)

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Secateurs zoo: {{ total }} models</title>
<style>
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --bad: #cf222e; --open: #9a6700; }
@media (prefers-color-scheme: dark) { :root { --good: #3fb950; --bad: #f85149; --open: #d29922; } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0; padding: 1rem; }
h1 { font-size: 1.5rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .6rem; text-align: left; vertical-align: top; }
th { padding: 0; } th button { all: unset; cursor: pointer; padding: .35rem .6rem; font-weight: 600; }
th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\25B2"; } th[aria-sort=descending] button::after { content: " \\25BC"; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.reason { min-width: 20rem; overflow-wrap: anywhere; }
.pass { color: var(--good); } .undecided, .open { color: var(--open); } .bad { color: var(--bad); }
</style>
</head>
<body>
<h1>{{ total }} models: {% for status, count in counts.items() %}{{ ", " if not loop.first }}{{ count }} {{ status }}{% endfor %}</h1>
<p>Ratios are candidate over baseline, on the exported files. A click on a heading sorts.</p>
<div class="scroll"><table id="zoo">
<thead><tr>{% for heading in headings %}<th scope="col"><button type="button">{{ heading }}</button></th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}<tr><td>{% if row.link %}<a href="{{ row.link }}">{{ row.name }}</a>{% else %}{{ row.name }}{% endif %}</td>
<td class="{{ row.kind }}">{{ row.status }}</td><td>{{ row.target }}</td>
{% for value, text in row.numbers %}<td class="number" data-value="{{ value }}">{{ text }}</td>{% endfor %}
<td class="number" data-value="{{ row.attempts }}">{{ row.attempts }}</td><td class="reason">{{ row.reason }}</td></tr>
{% endfor %}</tbody></table></div>
<script>
const table = document.getElementById("zoo"), body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
function compare(one, other) {
  if (one === "" || other === "") return (one === "") - (other === "");
  return isNaN(one) || isNaN(other) ? one.localeCompare(other) : one - other;
}
heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
  const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  heads.forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
  const empty = row => value(row, column) === "";
  const sorted = [...body.rows].sort((one, other) =>
    (empty(one) || empty(other) ? 1 : sign) * compare(value(one, column), value(other, column)));
  body.append(...sorted);
}));
</script>
</body>
</html>
"""


def leaderboard_page(found: Sequence[Row]) -> str:
    """Return the rows as an HTML page; everything in them is escaped.

    Raises:
        ImportError: jinja2 is not installed.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    shown = [_shown(row) for row in found]
    how_many = counts(found)
    headings = ["model", "status", "target", *(heading for _, heading, _, _ in _COLUMNS), "attempts", "reason"]
    return environment.from_string(_TEMPLATE).render(
        rows=shown, headings=headings, counts=how_many, total=sum(how_many.values())
    )


def _shown(row: Row) -> dict[str, Any]:
    kinds = {"pass": "pass", "undecided": "undecided", "not run": "open"}
    values = [(getattr(row, column), divisor, form) for column, _, divisor, form in _COLUMNS]
    return {
        "name": row.name,
        "status": row.status,
        "kind": kinds.get(row.status, "bad"),
        "target": row.target,
        "reason": row.reason,
        "link": f"{row.folder}/report.html" if row.folder else row.log,
        "attempts": "" if row.attempts is None else row.attempts,
        "numbers": [
            ("", "") if value is None else (value / divisor, format(value / divisor, form))
            for value, divisor, form in values
        ],
    }
