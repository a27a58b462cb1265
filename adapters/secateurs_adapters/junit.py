"""A report as JUnit XML, which CI servers show: one test case per row of the budget and one per other reason to fail."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING

from secateurs.report import write_text

if TYPE_CHECKING:
    from pathlib import Path

    from secateurs.report import BudgetRow, Report

__all__ = ["junit_xml", "write_junit"]

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 cannot hold."""


def junit_xml(report: Report) -> str:
    """Return the report as JUnit XML.

    A row that passed is a test that passed; one that failed or stayed undecided is a failure of that type, as both end with exit code 1.
    """
    failed = sum(row.status != "pass" for row in report.budget) + len(report.reasons)
    total = len(report.budget) + len(report.reasons)
    seconds = "0" if report.seconds is None else f"{report.seconds:.3f}"
    counts = {"tests": str(total), "failures": str(failed), "errors": "0", "time": seconds}
    root = ET.Element("testsuites", counts)
    suite = ET.SubElement(root, "testsuite", {"name": "secateurs", **counts, "skipped": "0"})
    for row in report.budget:
        case = _case(suite, "budget", row.name if row.target is None else f"{row.name}, {row.target}")
        if row.status != "pass":
            _fail(case, row.status, _told(row))
    for number, reason in enumerate(report.reasons, 1):
        _fail(_case(suite, "reason", f"reason {number}"), "fail", reason)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def write_junit(report: Report, path: Path) -> None:
    """Write the report as JUnit XML, whole or not at all."""
    write_text(path, junit_xml(report))


def _case(suite: ET.Element, kind: str, name: str) -> ET.Element:
    return ET.SubElement(suite, "testcase", {"classname": f"secateurs.{kind}", "name": _clean(name)})


def _fail(case: ET.Element, kind: str, text: str) -> None:
    failure = ET.SubElement(case, "failure", {"type": kind, "message": _clean(text)})
    failure.text = _clean(text)


def _told(row: BudgetRow) -> str:
    measured = "nothing was measured" if row.measured is None else f"measured {row.measured:.6g}"
    interval = "" if row.ci95 is None else f" [{row.ci95[0]:.6g}, {row.ci95[1]:.6g}]"
    reason = "" if row.reason is None else f": {row.reason}"
    return f"{row.status}: {measured}{interval}, allowed {row.limit:g}{reason}"


def _clean(text: str) -> str:
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
