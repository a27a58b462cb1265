"""The whole check: two files, a budget, a verdict."""

import json

import numpy as np
import onnx
import pytest
import typer
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from secateurs.budget import parse_budget
from secateurs.data import Dataset
from secateurs.errors import BudgetError, DataError, ProviderError, RecipeError, UserError
from secateurs.intervals import binomial_interval, paired_difference_interval
from secateurs.report import Report
from secateurs.settings import TargetSettings
from secateurs_adapters.artifact import read_artifact
from secateurs_adapters.commands import validate
from secateurs_adapters.metrics import accuracy
from secateurs_adapters.validate import OnnxRuntimeTarget, validate_files

QUICK = TargetSettings.model_validate({"batch_size": 2, "repeats": 4, "warmup": 1, "memory_repeats": 1})


def save(path, w):
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Softmax", ["h"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", w.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", w.shape[1]])],
        [numpy_helper.from_array(w.astype(np.float32), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def files(tmp_path):
    generator = np.random.default_rng(0)
    w = generator.normal(size=(32, 5))
    x = generator.normal(size=(60, 32)).astype(np.float32)
    labels = (x @ w).argmax(1)
    np.savez(tmp_path / "data.npz", x=x, labels=labels)
    worse = w + generator.normal(size=w.shape)
    return save(tmp_path / "a.onnx", w), save(tmp_path / "b.onnx", worse), Dataset({"x": x}, labels)


def test_a_report_holds_every_figure_and_the_budget_decides(files):
    before, after, data = files
    events = []
    budget = parse_budget({"accuracy_drop": 0.01, "artifact_ratio": 1.0, "latency_ms": 1000, "peak_memory_mib": 500})
    report = validate_files(
        before, after, targets=[QUICK], budget=budget, evaluation=data, metric=accuracy, progress=events.append
    )
    assert Report.model_validate_json(report.to_json()) == report
    figures = report.candidate.targets[0]
    assert figures.provider_obtained == figures.provider == "CPUExecutionProvider"
    assert figures.nodes_per_provider == {"CPUExecutionProvider": 2}
    assert figures.latency_ms.n == 5 * 2 * 4
    assert figures.peak_memory_bytes >= 0
    assert figures.activation_bytes_profiled > 0
    assert report.baseline.accuracy.value == 1.0
    scores = data.inputs["x"] @ numpy_helper.to_array(onnx.load(after).graph.initializer[0])
    assert report.candidate.accuracy.value == pytest.approx((scores.argmax(1) == data.labels).mean())
    assert report.ratios.targets[0].accuracy_drop.value == pytest.approx(1 - report.candidate.accuracy.value)
    assert report.candidate.artifact_bytes == after.stat().st_size
    statuses = {row.name: row.status for row in report.budget}
    assert statuses == {
        "accuracy_drop": "fail",
        "artifact_ratio": "pass",
        "latency_ms": "pass",
        "peak_memory_mib": "pass",
    }
    assert report.verdict == "fail"
    assert report.reasons == []
    assert (events[0].done, events[-1].done, events[-1].total) == (0, 4, 4)


def test_repeated_examples_are_not_independent_ones(files):
    before, _, data = files
    limits = parse_budget({"accuracy_drop": 0.1, "accuracy_confidence": 0.95})
    few = data.take(np.arange(60) % 5)
    given = {"targets": [QUICK], "budget": limits, "metric": accuracy}
    whole, repeated = (validate_files(before, before, evaluation=one, **given) for one in (data, few))
    assert (whole.verdict, whole.ratios.targets[0].accuracy_pairs.n) == ("pass", 60)
    assert not any("distinct" in note for note in whole.notes)
    assert repeated.verdict == "undecided"
    assert any("only 5 of 60 evaluation examples are distinct" in note for note in repeated.notes)
    figures = repeated.candidate.targets[0].accuracy
    assert (figures.value, figures.n) == (1.0, 60), "the metric is still that of all examples"
    assert figures.ci95 == binomial_interval(5, 5)
    assert repeated.ratios.targets[0].accuracy_drop.ci95 == paired_difference_interval(0, 0, 5)


def test_a_provider_that_fell_back_fails_the_verdict(files):
    before, _, data = files
    # Azure is in every wheel, accepts no such node, and leaves all of them to the CPU.
    target = QUICK.model_copy(update={"provider": "AzureExecutionProvider"})
    report = validate_files(before, before, targets=[target], budget=parse_budget({}), evaluation=data, metric=accuracy)
    assert report.verdict == "fail"
    assert report.candidate.targets[0].provider_obtained == "CPUExecutionProvider"
    assert "the candidate was asked to run on AzureExecutionProvider but ran on CPUExecutionProvider" in report.reasons


def test_a_missing_provider_and_a_bad_file_are_refused_before_any_work(files, tmp_path):
    before, _, data = files
    cuda = QUICK.model_copy(update={"provider": "CUDAExecutionProvider"})
    more = {"budget": parse_budget({}), "evaluation": data, "metric": accuracy}
    with pytest.raises(ProviderError, match=r"Available: .*CPUExecutionProvider.*onnxruntime-gpu"):
        validate_files(before, before, targets=[QUICK, cuda], **more)
    bad = tmp_path / "bad.onnx"
    bad.write_text("no model")
    with pytest.raises(UserError, match="not an ONNX file"):
        validate_files(before, bad, targets=[QUICK], **more)


def test_data_that_does_not_fit_is_the_users_error(files):
    before, after, data = files
    wrong = Dataset({"images": data.inputs["x"]}, data.labels)
    with pytest.raises(DataError, match="images"):
        OnnxRuntimeTarget().measure(
            read_artifact(before), read_artifact(after), QUICK, evaluation=wrong, metric=accuracy
        )


def test_more_processes_are_taken_only_for_an_undecided_latency_limit(files):
    before, _, _ = files
    settings = QUICK.model_copy(update={"max_processes": 6})
    for limits, processes in [({}, 5), ({"latency_ratio": 100}, 5), ({"latency_ratio": 0.001}, 5)]:
        report = validate_files(
            before, before, targets=[settings], budget=parse_budget(limits), evaluation=None, metric=accuracy
        )
        assert report.candidate.targets[0].latency_ms.n == processes * 2 * settings.repeats
    assert report.verdict == "fail"
    asked = []
    artifact = read_artifact(before)
    OnnxRuntimeTarget().measure(
        artifact, artifact, settings, evaluation=None, metric=accuracy, decided=lambda found: asked.append(found)
    )
    assert len(asked) == 1


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(validate)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_prints_json_and_exits_with_the_verdict(files, tmp_path, run):
    before, after, _ = files
    limits = tmp_path / "budget.yaml"
    limits.write_text("accuracy_drop: 0.01\n")
    done = run(before, after, "--data", tmp_path / "data.npz", "--budget", limits, "--json", "--batch-size", 4)
    assert done.exit_code == 1
    report = json.loads(done.stdout)
    assert report["verdict"] == "fail"
    assert report["candidate"]["targets"][0]["batch_size"] == 4
    assert report["candidate"]["targets"][0]["fits_bytes"] is None


@pytest.mark.parametrize(
    ("arguments", "metric"), [((), "f1-macro"), (("--metric", "accuracy"), "accuracy")], ids=["recipe", "given"]
)
def test_the_metric_is_that_of_the_recipe_whose_budget_judges(files, tmp_path, run, arguments, metric):
    before, _, _ = files
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("schema: 1\nmetric: f1-macro\nbudget: {accuracy_drop: 0.01}\n")
    done = run(
        before, before, "--data", tmp_path / "data.npz", "--budget", recipe, "--json", "--repeats", 4, *arguments
    )
    assert json.loads(done.stdout)["candidate"]["targets"][0]["accuracy"]["metric"] == metric
    recipe.write_text("metric: [f1]\nbudget: {accuracy_drop: 0.01}\n")
    assert "`metric` in" in str(run(before, before, "--budget", recipe).exception)


def test_the_command_prints_a_table(files, tmp_path, run):
    before, _, _ = files
    done = run(before, before)
    assert done.exit_code == 0
    for word in ("baseline", "candidate", "ratio", "budget", "verdict: pass", "latency", "peak memory", "agreement"):
        assert word in done.stdout
    assert "verdict: pass (no limits were given: `--budget` names a file with some)" in " ".join(done.stdout.split())
    assert "agreement is on seeded random inputs" in " ".join(done.stdout.split())
    assert "measure on" not in done.stderr  # no terminal, no progress


@pytest.mark.parametrize(
    ("option", "content", "kind", "message"),
    [
        ("--budget", "latency_rato: 1", BudgetError, "Did you mean 'latency_ratio'"),
        ("--budget", "- 1", BudgetError, "needs `key: value` lines"),
        ("--budget", None, BudgetError, "cannot read"),
        ("--data", "source: surely-unknown", RecipeError, "unknown data source 'surely-unknown'"),
        ("--data", "file: a.npz", RecipeError, "has no `source`"),
    ],
)
def test_wrong_arguments_are_the_users_errors(files, tmp_path, run, option, content, kind, message):
    before, _, _ = files
    file = tmp_path / "file.yaml"
    if content is not None:
        file.write_text(content)
    done = run(before, before, option, file)
    assert isinstance(done.exception, kind)
    assert done.exception.exit_code == 2
    assert message in str(done.exception)


def test_data_without_labels_says_how_they_are_called(files, run):
    before, _, data = files
    np.savez(before.with_name("unnamed.npz"), x=data.inputs["x"], label=data.labels)
    done = run(before, before, "--data", before.with_name("unnamed.npz"), "--json", "--repeats", 4)
    notes = " ".join(json.loads(done.stdout)["notes"])
    assert "no labels, so that agreement takes the place of accuracy: its arrays are ['label', 'x']" in notes
    assert "in the array `labels`" in notes


def test_other_wrong_arguments(files, tmp_path, run):
    before, _, _ = files
    assert "Did you mean 'accuracy'" in str(run(before, before, "--metric", "acuracy").exception)
    assert "`--threads`" in str(run(before, before, "--threads", 0).exception)
    assert "Did you mean" in str(run(before, before, "--provider", "cpu").exception)
    assert "missing" in str(run(before, before, "--data", tmp_path / "none.npz").exception)
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK no archive")
    assert "not an .npz file" in str(run(before, before, "--data", broken).exception)
