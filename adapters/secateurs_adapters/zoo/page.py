"""The leaderboard as one self-contained page: no network; light and dark; sorted by a click on a heading, filtered by words and status.

A policy in the page lets it run its own script, known by its hash, and nothing else; without the script the page is the whole table.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
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

_TEMPLATE = "leaderboard.html.jinja"
_SCRIPT = "leaderboard.js"


def leaderboard_page(found: Sequence[Row]) -> str:
    """Return the rows as an HTML page; everything in them is escaped."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    columns = [column for column in _COLUMNS if any(getattr(row, column[0]) is not None for row in found)]
    how_many = counts(found)
    script = _packaged(_SCRIPT)
    return environment.from_string(_packaged(_TEMPLATE)).render(
        rows=[_shown(row, columns) for row in found],
        headings=["model", "status", "reason", "target", *(heading for _, heading, _, _ in columns), "attempts"],
        counts=how_many,
        total=sum(how_many.values()),
        script=Markup(script),  # noqa: S704 (our own file)
        hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _packaged(name: str) -> str:
    return importlib.resources.files("secateurs_adapters.zoo").joinpath(name).read_text(encoding="utf-8")


def _shown(row: Row, columns: Sequence[tuple[str, str, float, str]]) -> dict[str, Any]:
    kinds = {"pass": "pass", "undecided": "undecided", "not run": "open"}
    values = [(getattr(row, column), divisor, form) for column, _, divisor, form in columns]
    return {
        "name": row.name,
        "status": row.status,
        "kind": kinds.get(row.status, "bad"),
        "target": row.target.replace("ExecutionProvider", ""),
        "reason": row.reason,
        "link": f"{row.folder}/report.html" if row.folder else row.log,
        "attempts": "" if row.attempts is None else row.attempts,
        "numbers": [
            ("", "") if value is None else (value / divisor, format(value / divisor, form))
            for value, divisor, form in values
        ],
    }
