"""Files on an NVIDIA GPU: where they run, what they answer, how fast they are, and what the device holds. Run by hand with `-m gpu`."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from secateurs.budget import parse_budget
from secateurs.data import Dataset
from secateurs.errors import ProviderError
from secateurs.settings import TargetSettings
from secateurs_adapters.metrics import accuracy
from secateurs_adapters.validate import OnnxRuntimeTarget, validate_files

pytestmark = pytest.mark.gpu

CUDA = TargetSettings.model_validate({"provider": "CUDAExecutionProvider", "batch_size": 8, "repeats": 20})
CHANNELS, CLASSES = 128, 10


@pytest.fixture(autouse=True)
def cuda():
    try:
        OnnxRuntimeTarget().check(CUDA)
    except ProviderError as error:
        pytest.skip(str(error))


def convolutions(path, count, last="Relu"):
    """Write a chain of convolutions with a classifier; `last` is the activation before it."""
    generator = np.random.default_rng(0)
    constants, nodes, name = [], [], "x"
    for number in range(count):
        weight = generator.normal(0, 0.03, (CHANNELS, 3 if number == 0 else CHANNELS, 3, 3)).astype(np.float32)
        constants.append(numpy_helper.from_array(weight, f"w{number}"))
        nodes.append(helper.make_node("Conv", [name, f"w{number}"], [f"c{number}"], kernel_shape=[3, 3], pads=[1] * 4))
        nodes.append(helper.make_node(last if number == count - 1 else "Relu", [f"c{number}"], [f"r{number}"]))
        name = f"r{number}"
    head = generator.normal(0, 0.1, (CHANNELS, CLASSES)).astype(np.float32)
    constants.append(numpy_helper.from_array(head, "head"))
    nodes += [
        helper.make_node("GlobalAveragePool", [name], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "head"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", CLASSES])],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_both_files_are_measured_on_the_gpu(tmp_path):
    pytest.importorskip("pynvml", reason="needs nvidia-ml-py")
    before, after = convolutions(tmp_path / "a.onnx", 12), convolutions(tmp_path / "b.onnx", 4)
    images = np.random.default_rng(1).normal(size=(64, 3, 32, 32)).astype(np.float32)
    data = Dataset({"x": images}, np.arange(64) % CLASSES)
    budget = parse_budget({"latency_ratio": 0.8})
    report = validate_files(before, after, targets=[CUDA], budget=budget, evaluation=data, metric=accuracy)
    figures = report.candidate.targets[0]
    assert figures.provider_obtained == "CUDAExecutionProvider"
    assert set(figures.nodes_per_provider) == {"CUDAExecutionProvider"}
    assert report.ratios.targets[0].latency_p50.value < 0.8
    assert figures.memory.device.used_bytes > 0
    assert report.verdict == "pass", report.reasons
    again = validate_files(
        before, after, targets=[TargetSettings(repeats=4)], budget=parse_budget({}), evaluation=data, metric=accuracy
    )
    for side in ("baseline", "candidate"):
        here, there = (getattr(one, side).accuracy.value for one in (again, report))
        assert abs(here - there) <= 2 / 64  # TF32 may turn a close call


def test_an_operator_that_falls_back_fails_the_verdict(tmp_path):
    whole, part = convolutions(tmp_path / "a.onnx", 4), tmp_path / "b.onnx"
    model = onnx.load(whole)
    model.graph.node[-1].output[0] = "scores"
    model.graph.node.append(helper.make_node("Hardmax", ["scores"], ["y"]))  # CUDA has no kernel for it
    onnx.save(model, part)
    report = validate_files(whole, part, targets=[CUDA], budget=parse_budget({}), evaluation=None, metric=accuracy)
    assert report.verdict == "fail"
    assert any("CPUExecutionProvider" in reason for reason in report.reasons)
