"""The report: its schema, what its JSON holds, and how files reach the disk."""

import json
import math
import stat

import jsonschema
import pytest
from pydantic import ValidationError

from secateurs.files import atomic_path, write_text
from secateurs.report import (
    Accuracy,
    BudgetRow,
    Certificate,
    Environment,
    Estimate,
    Latency,
    Parity,
    PassRecord,
    Ratios,
    Report,
    Side,
    Skipped,
    TargetFigures,
    TargetRatios,
    report_schema,
)

ENVIRONMENT = Environment(versions={"python": "3.12", "torch": "2.11"}, cpu="a processor", threads=1, seed=0, git=None)


def full():
    accuracy = Accuracy(value=0.915, ci95=(0.896, 0.9315), n=1000, metric="accuracy")
    figures = TargetFigures(
        provider="CPUExecutionProvider",
        provider_obtained="CPUExecutionProvider",
        threads=1,
        batch_size=1,
        latency_ms=Latency(p50=1.5, p95=1.9, p99=None, n=80, cv=0.05),
        session_ms=12.0,
        first_run_ms=3.0,
        peak_memory_bytes=1 << 20,
        resident_memory_bytes=1 << 24,
        activation_bytes_planned=4096,
        activation_bytes_profiled=4000,
        fits_bytes=8192,
        nodes_per_provider={"CPUExecutionProvider": 12},
        accuracy=accuracy,
    )
    side = Side(params=100, macs=1000, weight_bytes=400, artifact_bytes=900, accuracy=accuracy, targets=[figures])
    ratios = TargetRatios(
        latency_p50=Estimate(value=0.7, ci95=(0.6, 0.8)),
        peak_memory=0.9,
        accuracy_drop=Estimate(value=0.004, ci95=(-0.001, 0.009)),
        agreement=None,
    )
    return Report(
        verdict="undecided",
        reasons=["a target was missed"],
        baseline=side,
        candidate=side,
        ratios=Ratios(params=0.5, macs=0.5, artifact_bytes=0.6, targets=[ratios]),
        passes=[
            PassRecord(
                name="mi-nodes",
                settings={"target_macs": 0.5, "criteria": ["information"]},
                edits=3,
                skipped=[Skipped(where="head", reason="an output")],
                certificate=Certificate(max_abs=1e-7, scale=3.0, batch_sizes=[2, 5]),
                seconds=1.25,
                details={"rounds": [{"edits": 3, "kl": 0.01}]},
            )
        ],
        parity=Parity(max_abs=1e-6, max_rel=1e-5, tolerance=1e-4, batch_sizes=[1, 3]),
        budget=[
            BudgetRow(name="latency_ratio", target="CPU batch 1", limit=0.8, measured=0.7, ci95=(0.6, 0.8), status="pass")
        ],
        notes=["2 duplicates were dropped"],
        environment=ENVIRONMENT,
        seconds=60.0,
    )  # fmt: skip


EMPTY = Report(verdict="fail", environment=ENVIRONMENT)


def test_the_shipped_schema_is_that_of_the_model():
    assert report_schema() == Report.model_json_schema(), "write json.dumps(Report.model_json_schema(), indent=2) anew"


def test_the_shipped_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(report_schema())


@pytest.mark.parametrize("report", [full(), EMPTY], ids=["full", "empty"])
def test_reports_follow_the_shipped_schema_and_read_back(report):
    text = report.to_json()
    jsonschema.Draft202012Validator(report_schema()).validate(json.loads(text))
    assert Report.model_validate_json(text) == report
    assert text.endswith("}\n")


BROKEN = {
    "verdict": lambda data: data.update(verdict="maybe"),
    "version": lambda data: data.update(schema_version=2),
    "extra key": lambda data: data.update(score=1),
    "missing environment": lambda data: data.pop("environment"),
    "interval of three": lambda data: data["baseline"]["accuracy"].update(ci95=[0, 1, 2]),
    "status": lambda data: data["budget"][0].update(status="ok"),
    "text for a number": lambda data: data["passes"][0].update(seconds="long"),
}


@pytest.mark.parametrize("spoil", BROKEN.values(), ids=BROKEN)
def test_the_schema_and_the_model_refuse_the_same(spoil):
    data = json.loads(full().to_json())
    spoil(data)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(report_schema()).validate(data)
    with pytest.raises(ValidationError):
        Report.model_validate(data)


def test_what_was_not_measured_is_null_and_never_absent():
    data = json.loads(EMPTY.to_json())
    assert set(data) == set(Report.model_fields)
    assert set(data["baseline"]) == set(Side.model_fields)
    assert data["baseline"]["params"] is None
    assert data["parity"] is None
    figures = json.loads(TargetFigures(provider="CPU", threads=1, batch_size=1).model_dump_json())
    assert set(figures) == set(TargetFigures.model_fields)
    assert figures["latency_ms"] is None


def test_the_documented_keys_are_there():
    data = json.loads(full().to_json())
    figures = data["candidate"]["targets"][0]
    assert {"provider", "provider_obtained", "threads", "batch_size", "latency_ms", "session_ms"} <= set(figures)
    assert {"p50", "p95", "n", "cv"} <= set(figures["latency_ms"])
    assert {"peak_memory_bytes", "activation_bytes_planned", "fits_bytes", "nodes_per_provider"} <= set(figures)
    assert set(data["ratios"]["targets"][0]) >= {"latency_p50", "peak_memory"}
    assert {"name", "settings", "edits", "skipped", "certificate", "seconds"} <= set(data["passes"][0])
    assert {"name", "target", "limit", "measured", "ci95", "status"} <= set(data["budget"][0])
    assert {"versions", "cpu", "threads", "seed", "git"} <= set(data["environment"])


def test_infinities_in_details_become_null():
    record = PassRecord(name="x", settings={}, edits=0, seconds=0.0, details={"kl": math.inf, "nan": math.nan})
    report = EMPTY.model_copy(update={"passes": [record]})
    assert json.loads(report.to_json())["passes"][0]["details"] == {"kl": None, "nan": None}


@pytest.mark.parametrize(
    ("max_abs", "scale", "holds"),
    [
        (0.0, 1.0, True),
        (1e-4, 1.0, True),
        (1.1e-4, 1.0, False),
        (9e-4, 10.0, True),
        (0.0, 0.0, True),
        (1e-12, 0.0, False),
        (math.inf, 1.0, False),
        (math.nan, 1.0, False),
    ],
)
def test_a_certificate_holds_relative_to_the_scale(max_abs, scale, holds):
    assert Certificate(max_abs=max_abs, scale=scale).holds is holds


# --- files ------------------------------------------------------------------------------------------------------------


def test_text_is_written_whole_and_replaces_what_was_there(tmp_path):
    path = tmp_path / "new" / "report.json"
    write_text(path, "first")
    write_text(path, "zweite Fassung: größer")
    assert path.read_text(encoding="utf-8") == "zweite Fassung: größer"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "report.json"
    write_text(path, "old")

    def fail():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_text("x")
    write_text(tmp_path / "atomic", "x")
    plain, atomic = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "atomic"))
    assert atomic == plain
