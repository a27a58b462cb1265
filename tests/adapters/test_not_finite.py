"""Metrics that are NaN or infinite: a candidate fails, a baseline is refused, and whatever is written reads back."""

from __future__ import annotations

import json
import math

import jsonschema
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from secateurs.budget import judge, parse_budget
from secateurs.data import Dataset
from secateurs.errors import DataError
from secateurs.files import write_text
from secateurs.judging import Judge
from secateurs.manager import create_manager
from secateurs.report import Accuracy, Ratios, Report, Side, TargetFigures, TargetRatios, report_schema
from secateurs.settings import TargetSettings
from secateurs_adapters.report_html import write_report_page
from secateurs_adapters.validate import validate_files
from secateurs_adapters.zoo.results import Figures, Job

QUICK = TargetSettings.model_validate({"batch_size": 2, "repeats": 4, "warmup": 1, "memory_repeats": 1})
METRIC = create_manager().registries.metrics["mean-squared-error"].make()


def linear(path, scale):
    """Write y = x w; beyond 1e38, float32 overflows."""
    w = np.full((4, 1), scale, np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1])],
        [numpy_helper.from_array(w, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def files(tmp_path):
    x = np.abs(np.random.default_rng(0).normal(size=(20, 4))).astype(np.float32) + 1
    return linear(tmp_path / "fine.onnx", 1.0), linear(tmp_path / "over.onnx", 3e38), Dataset({"x": x}, x.sum(1))


def compared(before, after, data, limits):
    return validate_files(before, after, targets=[QUICK], budget=parse_budget(limits), evaluation=data, metric=METRIC)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("limits", [{}, {"accuracy_drop": 0.5}])
def test_a_candidate_that_overflows_fails_in_a_report_that_reads_back(files, tmp_path, limits):
    before, after, data = files
    report = compared(before, after, data, limits)
    assert report.verdict == "fail"
    assert report.reasons == ["mean-squared-error of the candidate is not finite on CPUExecutionProvider batch 2"]
    assert [(row.status, row.measured, row.reason) for row in report.budget] == [
        ("fail", None, "mean-squared-error of the candidate is not finite") for _ in limits
    ]
    assert report.candidate.accuracy.value is None
    assert report.baseline.accuracy.value == pytest.approx(0.0, abs=1e-9)
    write_text(tmp_path / "report.json", report.to_json())
    jsonschema.validate(json.loads(report.to_json()), report_schema())
    assert Report.load(tmp_path / "report.json") == report
    write_report_page(report, tmp_path)
    assert "not finite" in (tmp_path / "report.html").read_text()
    job = Job(
        name="a",
        key="k" * 32,
        recipe="",
        source="r.yaml",
        output=tmp_path / "zoo",
        directory=tmp_path,
        environment="e",
        timeout=1,
        memory_mib=None,
        retries=0,
        threads=1,
    )
    job.keep(job.ended(report.verdict, report.reasons, figures=Figures.of(report)))
    assert job.result().status == "fail"


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_a_baseline_that_overflows_is_refused(files):
    before, after, data = files
    with pytest.raises(DataError, match=r"mean-squared-error of 'over\.onnx' is NaN or infinite"):
        compared(after, before, data, {})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_target_may_say_a_value_that_json_has_not(value):
    accuracy = Accuracy(value=value, n=5, metric="perplexity")
    assert Accuracy.model_validate_json(accuracy.model_dump_json()) == accuracy
    figures = TargetFigures(provider="p", threads=1, batch_size=1, accuracy=accuracy)
    (row,) = judge(parse_budget({"accuracy_drop": 1.0}), Side(targets=[figures]), Ratios(targets=[TargetRatios()]))
    assert (row.status, row.reason) == ("fail", "perplexity of the candidate is not finite")


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_search_is_not_begun_from_a_baseline_that_overflows(value):
    with pytest.raises(DataError, match=f"before pruning is {value} on validation data"):
        Judge(parse_budget({"accuracy_drop": 0.1}), lambda _: value, nn.Identity())
