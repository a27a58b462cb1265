"""A report as JUnit XML, which CI servers show: one test case per row of the budget and one per other reason to fail."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from secateurs.files import write_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from secateurs.report import BudgetRow, Report

__all__ = ["Case", "junit_xml", "suite_xml", "write_junit"]

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 cannot hold."""


@dataclass(frozen=True)
class Case:
    """One test case.

    Attributes:
        group: where it is listed, behind `secateurs.`.
        name: of the case.
        outcome: failure or error; None if it passed.
        kind: of the outcome, one word.
        message: of the outcome.
        seconds: that it took.
    """

    group: str
    name: str
    outcome: Literal["failure", "error"] | None = None
    kind: str = ""
    message: str = ""
    seconds: float | None = None


def suite_xml(cases: Sequence[Case], seconds: float | None = None) -> str:
    """Return test cases as one JUnit suite, which took as long as they did unless `seconds` says otherwise.

    Characters that XML cannot hold are replaced.
    """
    outcomes = [case.outcome for case in cases]
    counts = {
        "tests": str(len(cases)),
        "failures": str(outcomes.count("failure")),
        "errors": str(outcomes.count("error")),
        "time": _seconds(sum(case.seconds or 0.0 for case in cases) if seconds is None else seconds),
    }
    root = ET.Element("testsuites", counts)
    suite = ET.SubElement(root, "testsuite", {"name": "secateurs", **counts, "skipped": "0"})
    for case in cases:
        time = {} if case.seconds is None else {"time": _seconds(case.seconds)}
        shown = ET.SubElement(
            suite, "testcase", {"classname": f"secateurs.{case.group}", "name": _clean(case.name), **time}
        )
        if case.outcome is not None:
            told = ET.SubElement(shown, case.outcome, {"type": case.kind, "message": _clean(case.message)})
            told.text = _clean(case.message)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def junit_xml(report: Report) -> str:
    """Return the report as JUnit XML.

    A row that passed is a test that passed; one that failed or stayed undecided is a failure of that type, as both end with exit code 1.
    """
    cases = []
    for row in report.budget:
        name = row.name if row.target is None else f"{row.name}, {row.target}"
        passed = row.status == "pass"
        cases.append(Case("budget", name) if passed else Case("budget", name, "failure", row.status, _told(row)))
    cases += [
        Case("reason", f"reason {number}", "failure", "fail", reason) for number, reason in enumerate(report.reasons, 1)
    ]
    return suite_xml(cases, report.seconds)


def write_junit(report: Report, path: Path) -> None:
    """Write the report as JUnit XML, whole or not at all."""
    write_text(path, junit_xml(report))


def _seconds(value: float) -> str:
    return f"{value:.3f}"


def _told(row: BudgetRow) -> str:
    measured = "nothing was measured" if row.measured is None else f"measured {row.measured:.6g}"
    interval = "" if row.ci95 is None else f" [{row.ci95[0]:.6g}, {row.ci95[1]:.6g}]"
    reason = "" if row.reason is None else f": {row.reason}"
    return f"{row.status}: {measured}{interval}, allowed {row.limit:g}{reason}"


def _clean(text: str) -> str:
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
