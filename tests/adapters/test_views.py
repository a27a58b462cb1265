"""The views of memory beside each other, from the files to the report, the budget and the command line."""

import json
import sys

import numpy as np
import onnx
import pytest
import typer
from onnx import TensorProto, helper, numpy_helper
from shipped import wide
from typer.testing import CliRunner

from secateurs.errors import SecateursError
from secateurs.settings import TargetSettings
from secateurs_adapters.artifact import read_artifact
from secateurs_adapters.commands import validate
from secateurs_adapters.device_memory import measure_device
from secateurs_adapters.views import plan_in_process, take_views

MIB = 2**20
QUICK = TargetSettings(memory_repeats=1)

linux = pytest.mark.skipif(sys.platform != "linux", reason="the fits-test needs RLIMIT_AS and /proc")


def conditional(path):
    """A file whose work depends on its input's values."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")]
    branches = [
        helper.make_graph([helper.make_node(op, ["x"], [op])], op, [], [helper.make_empty_tensor_value_info(op)])
        for op in ("Neg", "Abs")
    ]
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0),
        helper.make_node("Greater", ["most", "zero"], ["flag"]),
        helper.make_node("If", ["flag"], ["y"], then_branch=branches[0], else_branch=branches[1]),
    ]
    zero = numpy_helper.from_array(np.zeros((), np.float32), "zero")
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [zero])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), str(path))
    return path


def test_the_views_of_shipped_files_and_their_differences(exported):
    files = [read_artifact(exported(name)) for name in ("quickstart", "quickstart-pruned")]
    for file, views in zip(files, take_views(files, QUICK), strict=True):
        memory = views.memory
        assert views.planned == views.profiled
        assert memory.planned_minus_profiled == 0
        assert memory.measured_minus_profiled == views.measured.peak_memory_bytes - views.profiled
        assert memory.planned.tensor_bytes <= views.planned
        assert views.measured.peak_memory_bytes > file.weight_bytes
        assert set(memory.reasons) == {"fits"}
        assert "`fits: true`" in memory.reasons["fits"]
        assert views.fits is memory.fits is memory.fits_minus_profiled is memory.device is None
        assert (memory.settings["planned"], memory.settings["measured"].memory_pattern) == (
            memory.settings["profiled"],
            True,
        )


@pytest.mark.alone  # Another process that loads onnxruntime meanwhile takes a share of the pages of its library.
@pytest.mark.skipif(sys.platform != "linux", reason="PSS is read from /proc/self/smaps_rollup")
def test_the_proportional_set_holds_what_the_process_alone_holds(tmp_path):
    [views] = take_views([read_artifact(wide(tmp_path / "big.onnx", 8 * MIB))], QUICK)
    assert 30 * MIB < views.measured.proportional_memory_bytes <= views.measured.resident_memory_bytes + MIB


def test_what_cannot_be_planned_has_no_figure_but_a_reason(tmp_path):
    [views] = take_views([read_artifact(conditional(tmp_path / "if.onnx"))], QUICK)
    assert views.planned is views.memory.planned is views.memory.planned_minus_profiled is None
    assert "If" in views.memory.reasons["planned"]
    assert views.profiled > 0


def test_plans_are_of_the_cpu(tmp_path):
    file = read_artifact(wide(tmp_path / "m.onnx", 1000))
    [views] = take_views([file], QUICK.model_copy(update={"provider": "AzureExecutionProvider"}))
    assert views.planned is None
    assert "not those of AzureExecutionProvider" in views.memory.reasons["planned"]


def test_a_plan_of_its_own_session(exported):
    plan = plan_in_process(exported("quickstart"), QUICK)
    assert plan["peak_bytes"] >= plan["tensor_bytes"] > 0
    assert plan["unknown"] == []


@linux
@pytest.mark.parametrize(("limit", "code"), [(64, 0), (0.5, 1)])
def test_a_limit_on_what_it_must_be_given(exported, tmp_path, limit, code):
    budget = tmp_path / "budget.yaml"
    budget.write_text(f"fits_mib: {limit}\n")
    app = typer.Typer()
    app.command()(validate)
    files = [str(exported("resnet20-pruned"))] * 2
    done = CliRunner().invoke(app, [*files, "--budget", str(budget), "--json", "--repeats", "4"])
    assert done.exit_code == code, done.output
    report = json.loads(done.stdout)
    figures = report["candidate"]["targets"][0]
    [row] = report["budget"]
    assert row["measured"] == pytest.approx(figures["fits_bytes"] / MIB)
    assert row["status"] == ("fail" if code else "pass")
    assert figures["memory"]["fits"]["limit_bytes"]
    assert figures["fits_bytes"] == max(figures["memory"]["fits"]["limit_bytes"])
    assert report["ratios"]["targets"][0]["fits"] == pytest.approx(1, abs=0.05)
    assert figures["activation_bytes_planned"] == figures["activation_bytes_profiled"]


@linux
def test_the_option_takes_the_fits_test(tmp_path):
    app = typer.Typer()
    app.command()(validate)
    file = str(wide(tmp_path / "m.onnx", 1000))
    done = CliRunner(env={"COLUMNS": "160"}).invoke(app, [file, file, "--fits", "--repeats", "4"])
    assert done.exit_code == 0, done.output
    assert "smallest memory limit" in done.stdout


@pytest.mark.gpu
def test_a_gpu_tells_what_it_holds(tmp_path):
    pytest.importorskip("pynvml", reason="needs nvidia-ml-py")
    settings = TargetSettings(provider="CUDAExecutionProvider")
    [views] = take_views([read_artifact(wide(tmp_path / "m.onnx", 32 * MIB))], settings)
    assert views.measured.peak_memory_bytes is None
    assert views.memory.device.used_bytes > 100 * MIB


def test_without_nvml_or_a_gpu_there_is_a_reason(tmp_path):
    with pytest.raises(SecateursError, match=r"nvidia-ml-py|NVML|not available"):
        measure_device(wide(tmp_path / "m.onnx", 10), TargetSettings(provider="CUDAExecutionProvider"))
