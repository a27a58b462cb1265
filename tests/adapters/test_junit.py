"""Reports as JUnit XML."""

import xml.etree.ElementTree as ET

from hypothesis import given
from hypothesis import strategies as st

from secateurs.report import BudgetRow, Environment, Report
from secateurs_adapters.junit import junit_xml, write_junit


def report(rows, reasons=()):
    environment = Environment(versions={}, cpu="", threads=1, seed=0)
    return Report(verdict="fail", reasons=list(reasons), budget=rows, environment=environment, seconds=1.5)


def test_each_row_and_each_reason_is_a_case(tmp_path):
    rows = [
        BudgetRow(name="latency_ratio", target="CPU batch 1", limit=0.8, measured=0.7, ci95=(0.6, 0.75), status="pass"),
        BudgetRow(name="latency_ms", target="CPU batch 1", limit=5, measured=5.1, ci95=(4.9, 5.3), status="undecided"),
        BudgetRow(name="artifact_mib", limit=1, measured=2, status="fail"),
        BudgetRow(name="peak_memory_mib", limit=1, measured=None, status="undecided", reason="not measured"),
    ]
    write_junit(report(rows, ["fell <back> & ran"]), tmp_path / "junit.xml")
    root = ET.parse(tmp_path / "junit.xml").getroot()
    suite = root.find("testsuite")
    assert {key: suite.get(key) for key in ("tests", "failures", "errors", "time")} == {
        "tests": "5",
        "failures": "4",
        "errors": "0",
        "time": "1.500",
    }
    cases = {case.get("name"): case.find("failure") for case in suite.findall("testcase")}
    assert list(cases) == [
        "latency_ratio, CPU batch 1",
        "latency_ms, CPU batch 1",
        "artifact_mib",
        "peak_memory_mib",
        "reason 1",
    ]
    assert cases["latency_ratio, CPU batch 1"] is None
    assert cases["latency_ms, CPU batch 1"].get("type") == "undecided"
    assert "measured 5.1 [4.9, 5.3], allowed 5" in cases["latency_ms, CPU batch 1"].text
    assert cases["artifact_mib"].get("type") == "fail"
    assert "nothing was measured" in cases["peak_memory_mib"].text
    assert cases["reason 1"].text == "fell <back> & ran"


@given(st.text())
def test_whatever_a_reason_holds_the_file_is_xml(reason):
    root = ET.fromstring(junit_xml(report([], [reason])).encode())
    assert len(root.findall("testsuite/testcase/failure")) == 1
