"""Verdicts: every limit with a value below, at, above and missing."""

import pytest

from secateurs.budget import MIB, Budget, judge, parse_budget, verdict
from secateurs.errors import BudgetError
from secateurs.intervals import paired_difference_interval
from secateurs.report import BudgetRow, Estimate, Latency, Pairs, Ratios, Side, TargetFigures, TargetRatios


def estimate(value, low=None, high=None):
    return Estimate(value=value, ci95=None if low is None else (low, high))


def judged(limits, *, side=None, ratios=None, latency_ms=None, peak=None, **target_ratios):
    """Judge one target and return the single row."""
    latency = None if latency_ms is None else Latency(p50=latency_ms, n=40, cv=0.1)
    figures = TargetFigures(provider="CPU", threads=1, batch_size=4, latency_ms=latency, peak_memory_bytes=peak)
    candidate = Side(**(side or {}), targets=[figures])
    rows = judge(Budget(**limits), candidate, Ratios(**(ratios or {}), targets=[TargetRatios(**target_ratios)]))
    assert len(rows) == 1
    return rows[0]


POINTS = {
    "artifact_mib": lambda value: {"side": {"artifact_bytes": None if value is None else int(value * MIB)}},
    "artifact_ratio": lambda value: {"ratios": {"artifact_bytes": value}},
    "macs_ratio": lambda value: {"ratios": {"macs": value}},
    "parameters_ratio": lambda value: {"ratios": {"params": value}},
    "latency_ms": lambda value: {"latency_ms": value},
    "peak_memory_mib": lambda value: {"peak": None if value is None else int(value * MIB)},
    "peak_memory_ratio": lambda value: {"peak_memory": value},
    "accuracy_drop": lambda value: {"accuracy_drop": None if value is None else estimate(value, -1, 1)},
    "latency_ratio": lambda value: {"latency_p50": None if value is None else estimate(value)},
}


@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize(
    ("measured", "status"),
    [(0.25, "pass"), (0.5, "pass"), (0.75, "fail"), (None, "undecided")],
    ids=["below", "at the limit", "above", "not measured"],
)
def test_point_limits(name, measured, status):
    row = judged({name: 0.5}, **POINTS[name](measured))
    assert (row.name, row.limit, row.measured, row.status) == (name, 0.5, measured, status)
    assert (row.reason == "not measured") == (measured is None)


INTERVALS = {
    "all allowed": ((0.7, 0.6, 0.79), "pass"),
    "touching": ((0.7, 0.6, 0.8), "pass"),
    "straddling, point below": ((0.79, 0.7, 0.9), "undecided"),
    "straddling, point above": ((0.85, 0.79, 0.9), "undecided"),
    "at the lower end": ((0.85, 0.8, 0.9), "undecided"),
    "none allowed": ((0.9, 0.81, 1.0), "fail"),
}


@pytest.mark.parametrize(("figures", "status"), INTERVALS.values(), ids=INTERVALS)
def test_latency_is_judged_by_its_interval(figures, status):
    row = judged({"latency_ratio": 0.8}, latency_p50=estimate(*figures))
    assert row.status == status
    assert row.ci95 == figures[1:]
    assert (row.reason is not None) == (status == "undecided")


@pytest.mark.parametrize(
    ("lost", "gained", "point", "confident", "confidence"),
    [
        (1, 0, "pass", "pass", 0.95),
        (20, 15, "pass", "undecided", 0.95),
        (30, 15, "fail", "undecided", 0.95),
        (60, 10, "fail", "fail", 0.95),
        (2, 30, "pass", "pass", 0.95),
        (12, 9, "pass", "undecided", 0.95),
        (12, 9, "pass", "pass", 0.6),
    ],
    ids=["clearly within", "noisy within", "noisy beyond", "clearly beyond", "better", "wide", "less confidence"],
)
def test_accuracy_is_judged_by_the_point_unless_confidence_is_asked_for(lost, gained, point, confident, confidence):
    interval = paired_difference_interval(lost, gained, 1000)
    figures = {
        "accuracy_drop": Estimate(value=(lost - gained) / 1000, ci95=interval),
        "accuracy_pairs": Pairs(lost=lost, gained=gained, n=1000),
    }
    assert judged({"accuracy_drop": 0.01}, **figures).status == point
    row = judged({"accuracy_drop": 0.01, "accuracy_confidence": confidence}, **figures)
    assert row.status == confident
    assert row.ci95 == interval, "the interval is always shown"
    assert (row.reason is None) == (confident == "pass")


def test_a_metric_without_pairs_cannot_be_judged_with_confidence():
    row = judged({"accuracy_drop": 0.01, "accuracy_confidence": 0.9}, accuracy_drop=estimate(0.001, 0, 0.002))
    assert row.status == "undecided"
    assert "no exact interval" in row.reason


def test_a_drop_of_exactly_the_limit_passes_whatever_the_division_rounds_to():
    for lost in range(1, 60):
        drop = (900 - (900 - lost)) / 1000
        assert judged({"accuracy_drop": lost / 1000}, accuracy_drop=estimate(drop + 1e-13)).status == "pass"
        assert judged({"accuracy_drop": lost / 1000}, accuracy_drop=estimate((lost + 1) / 1000)).status == "fail"


def test_no_limits_make_no_rows():
    assert judge(Budget(), Side(), Ratios()) == []


def test_limits_per_target_have_a_row_for_each_target():
    figures = [TargetFigures(provider=name, threads=1, batch_size=8) for name in ("A", "B")]
    ratios = Ratios(targets=[TargetRatios(peak_memory=0.5), TargetRatios(peak_memory=0.9)])
    rows = judge(Budget(peak_memory_ratio=0.8, macs_ratio=0.5), Side(targets=figures), ratios)
    assert [(row.name, row.target, row.status) for row in rows] == [
        ("macs_ratio", None, "undecided"),
        ("peak_memory_ratio", "A batch 8", "pass"),
        ("peak_memory_ratio", "B batch 8", "fail"),
    ]


def test_without_targets_their_limits_are_undecided():
    rows = judge(Budget(latency_ms=1.0, accuracy_drop=0.01), Side(), Ratios())
    assert {(row.name, row.status) for row in rows} == {("latency_ms", "undecided"), ("accuracy_drop", "undecided")}


@pytest.mark.parametrize(
    ("statuses", "reasons", "expected"),
    [
        ([], [], "pass"),
        (["pass", "pass"], [], "pass"),
        (["pass", "undecided"], [], "undecided"),
        (["undecided", "fail"], [], "fail"),
        (["pass"], ["the provider fell back"], "fail"),
        ([], ["nothing could be pruned"], "fail"),
        (["undecided"], ["missed"], "fail"),
    ],
)
def test_verdict(statuses, reasons, expected):
    rows = [BudgetRow(name="x", limit=1, measured=None, status=status) for status in statuses]
    assert verdict(rows, reasons) == expected


def test_a_budget_is_read():
    assert parse_budget({"accuracy_drop": 0.01, "artifact_mib": 4}) == Budget(accuracy_drop=0.01, artifact_mib=4.0)
    assert parse_budget(None) == parse_budget({}) == Budget()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"accuracy_dorp": 0.1}, "Did you mean 'accuracy_drop'"),
        ({"latency": 1}, "unknown budget 'latency'"),
        ({"accuracy_drop": 2}, r"`budget.accuracy_drop`: .* \(got 2\); it is the largest drop of the metric"),
        ({"latency_ratio": 0}, "`budget.latency_ratio`"),
        ({"accuracy_drop": 0.1, "accuracy_confidence": 0.4}, r"`budget.accuracy_confidence`: .*\(got 0.4\)"),
        (
            {"accuracy_confidence": 0.95, "accuracy_drop": None},
            "`budget.accuracy_confidence` .*; give `accuracy_drop` too",
        ),
        ({"artifact_mib": "big"}, r"got 'big'"),
        ({"latency_ratio": float("inf")}, r"`budget.latency_ratio`: .*finite.*\(got inf\)"),
        ({"latency_ms": "1e400"}, r"`budget.latency_ms`: .*finite"),
        ({"peak_memory_mib": float("nan")}, r"`budget.peak_memory_mib`: .*\(got nan\)"),
        ({"macs_ratio": True}, r"`budget.macs_ratio`: .*not true or false \(got True\)"),
        ({"accuracy_drop": False}, r"`budget.accuracy_drop`: .*\(got False\)"),
    ],
    ids=[
        "typo",
        "unknown",
        "too large",
        "zero",
        "confidence",
        "confidence alone",
        "text",
        "inf",
        "1e400",
        "nan",
        "true",
        "false",
    ],
)
def test_impossible_budgets_are_refused(data, message):
    with pytest.raises(BudgetError, match=message):
        parse_budget(data)
