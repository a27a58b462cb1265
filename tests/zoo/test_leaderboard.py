"""The leaderboard in all its forms, from results that say the worst."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from rich.console import Console

from secateurs.report import Accuracy, BudgetRow, Estimate, Latency, Ratios, Side, TargetFigures, TargetRatios
from secateurs_adapters.zoo.leaderboard import leaderboard_csv, leaderboard_json, leaderboard_junit, rows
from secateurs_adapters.zoo.page import leaderboard_page
from secateurs_adapters.zoo.results import Figures, Job
from secateurs_adapters.zoo.table import LiveTable, leaderboard_table, live_table

EVIL = '=1+1</script><script>alert("x")</script>\x00'


def job(name: str, key: str) -> Job:
    return Job(
        name=name,
        key=key * 32,
        recipe="",
        source="r.yaml",
        output=Path("/zoo"),
        directory=Path("/"),
        environment="",
        timeout=10,
        memory_mib=None,
        retries=1,
        threads=1,
    )


def side(right: float, ms: float, memory: int) -> Side:
    targets = [
        TargetFigures(
            provider="CPUExecutionProvider",
            threads=threads,
            batch_size=1,
            latency_ms=Latency(p50=ms, n=4, cv=0.1),
            peak_memory_bytes=memory,
            accuracy=Accuracy(value=right, n=100, metric="accuracy"),
        )
        for threads in (1, 2)
    ]
    return Side(targets=targets)


FIGURES = Figures(
    baseline=side(0.9, 2.0, 2**21),
    candidate=side(0.88, 1.0, 2**20),
    ratios=Ratios(
        macs=0.5,
        params=0.6,
        artifact_bytes=0.7,
        targets=[
            TargetRatios(latency_p50=Estimate(value=0.5), peak_memory=0.5, accuracy_drop=Estimate(value=0.02))
            for _ in range(2)
        ],
    ),
    budget=[BudgetRow(name="accuracy_drop", limit=0.01, measured=0.02, status="fail")],
)
JOBS = [job(name, key) for name, key in (("good", "a"), ("bad", "b"), ("evil", "c"), ("late", "d"))]
RESULTS = {
    "a" * 32: JOBS[0].ended("pass", [], figures=FIGURES, seconds=3.0),
    "b" * 32: JOBS[1].ended("fail", ["accuracy_drop: measured 0.02, allowed 0.01"], figures=FIGURES),
    "c" * 32: JOBS[2].ended("crashed", [EVIL], kind="X"),
}
ROWS = rows(JOBS, RESULTS)


def test_there_is_a_row_for_every_model_and_target_in_order():
    assert [(row.name, row.status) for row in ROWS] == [
        ("good", "pass"),
        ("good", "pass"),
        ("bad", "fail"),
        ("bad", "fail"),
        ("evil", "crashed"),
        ("late", "not run"),
    ]
    assert [row.target for row in ROWS[:2]] == [
        "CPUExecutionProvider batch 1",
        "CPUExecutionProvider batch 1 threads 2",
    ]
    first = ROWS[0]
    assert (first.accuracy_baseline, first.accuracy, first.accuracy_drop) == (0.9, 0.88, 0.02)
    assert (first.latency_ms, first.latency_ratio) == (1.0, 0.5)
    assert (first.peak_memory_bytes, first.peak_memory_ratio) == (2**20, 0.5)
    assert (first.macs_ratio, first.parameters_ratio, first.artifact_ratio) == (0.5, 0.6, 0.7)


def test_the_csv_reads_back_and_holds_no_formula():
    read = list(csv.DictReader(io.StringIO(leaderboard_csv(ROWS))))
    assert [row["name"] for row in read] == [row.name for row in ROWS]
    assert float(read[0]["accuracy_drop"]) == 0.02
    assert read[4]["reason"] == "'" + EVIL


def test_the_json_has_rows_counts_and_budgets():
    body = json.loads(leaderboard_json(ROWS, RESULTS))
    assert body["counts"] == {"pass": 1, "fail": 1, "crashed": 1, "not run": 1}
    assert body["rows"] == [row.model_dump(mode="json") for row in ROWS]
    assert body["budgets"]["b" * 32][0]["status"] == "fail"


def test_the_page_is_escaped_and_self_contained():
    page = leaderboard_page(ROWS)
    assert page.count("<script>") == 1
    assert "&lt;script&gt;alert" in page
    assert "prefers-color-scheme: dark" in page
    assert "://" not in page
    script = page.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page
    assert "<script" not in script
    assert 'href="models/good-aaaaaaaa/report.html"' in page
    assert 'href="logs/evil-cccccccc.log"' in page
    assert page.count("<tr ") == len(ROWS)
    assert "4 models" in page


def test_junit_has_a_case_per_model():
    root = ET.fromstring(leaderboard_junit(ROWS))
    assert float(root.get("time")) == 3.0, "of a model on two targets, once"
    assert {name: root.get(name) for name in ("tests", "failures", "errors")} == {
        "tests": "4",
        "failures": "1",
        "errors": "2",
    }
    cases = {case.get("name"): [(child.tag, child.get("type")) for child in case] for case in root.iter("testcase")}
    assert cases == {
        "good": [],
        "bad": [("failure", "fail")],
        "evil": [("error", "crashed")],
        "late": [("error", "not run")],
    }


@pytest.mark.parametrize("table", [leaderboard_table(ROWS), LiveTable(JOBS, RESULTS)], ids=["leaderboard", "live"])
def test_the_terminal_shows_every_finished_model(table):
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(table)
    shown = console.export_text()
    assert "1 crashed, 1 fail, 1 not run, 1 pass" in shown
    for name in ("good", "bad", "evil"):
        assert name in shown


def test_the_live_table_says_how_long_the_rest_takes(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("secateurs_adapters.zoo.table.time.monotonic", lambda: now[0])
    jobs = [one.model_copy(update={"output": tmp_path}) for one in JOBS]
    results = {jobs[0].key: RESULTS[jobs[0].key]}  # of a run before: no measure of the pace
    live = LiveTable(jobs, results)
    jobs[1].stage_path.parent.mkdir(parents=True)
    jobs[1].stage_path.write_text("pruning")
    assert "left" not in live.__rich__().title
    now[0] += 40
    results[jobs[1].key] = RESULTS[jobs[1].key]
    assert live.__rich__().title.endswith("; about 1:20 left"), "two models, 40 seconds each"
    results |= {one.key: RESULTS[jobs[0].key] for one in jobs}
    assert "left" not in live.__rich__().title


def test_a_log_gets_a_line_now_and_then(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("secateurs_adapters.zoo.table.PAUSE", 0.02)
    jobs = [one.model_copy(update={"output": tmp_path}) for one in JOBS]
    jobs[1].stage_path.parent.mkdir(parents=True)
    jobs[1].stage_path.write_text("pruning")
    with live_table(jobs, {jobs[0].key: RESULTS[jobs[0].key]}):
        time.sleep(0.5)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1
    assert set(lines) == {f"3 not run, 1 pass; now {jobs[1].name} (pruning)"}
    monkeypatch.setenv("CI", "true")
    with live_table(jobs, {}):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_a_result_is_settled_until_the_limit_that_it_broke_changes(tmp_path):
    one = JOBS[0].model_copy(update={"output": tmp_path})
    assert not one.settled()
    for status, settled in (("timeout", "timeout"), ("out-of-memory", "memory_mib")):
        one.keep(one.ended(status, ["why"]))
        assert one.settled()
        assert not one.settled(retry_failed=True)
        assert not one.model_copy(update={settled: 99}).settled()
    one.keep(one.ended("error", ["why"]))
    assert one.model_copy(update={"timeout": 99}).settled()
    one.result_path.write_text("{")
    assert not one.settled()
