"""Files made of other files: fixed shapes in two formats, and quantisation, on networks that were trained."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from secateurs.data import Dataset
from secateurs.errors import ExportError
from secateurs.settings import EdgeSettings, QuantiseSettings
from secateurs_adapters.artifact import graph_signature, read_artifact, sidecar_path
from secateurs_adapters.export import dynamo
from secateurs_adapters.fixed import FixedShapes
from secateurs_adapters.quantize import DynamicQuantiser, StaticQuantiser
from secateurs_adapters.torchscript import TorchScriptExporter

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(path, **inputs):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, inputs)


def made(artifact):
    return json.loads(sidecar_path(artifact.path).read_text())["made"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The trained ResNet of the quickstart as a file, with calibration and evaluation data."""
    pytest.importorskip("sklearn", reason="needs the extra `data`")
    from safetensors.torch import load_file

    from secateurs_adapters.data_settings import DigitsSettings
    from secateurs_adapters.datasets import load_digits

    sys.path.insert(0, str(EXAMPLES))
    try:
        from digits_resnet import build
    finally:
        sys.path.remove(str(EXAMPLES))
    model = build()
    model.load_state_dict(load_file(EXAMPLES / "digits_resnet.safetensors"))
    calibration, evaluation = (load_digits(DigitsSettings(split=split)) for split in ("train", "evaluation"))
    path = tmp_path_factory.mktemp("digits") / "model.onnx"
    return dynamo(model, calibration.take(range(4)), path, opset=20), calibration, evaluation


def accuracy(path, data):
    return (run(path, **data.inputs)[0].argmax(1) == data.labels).mean()


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.head = nn.Embedding(200, 32), nn.Linear(32, 64), nn.Linear(64, 5)

    def forward(self, ids, attention_mask):
        x = torch.tanh(self.mix(self.embed(ids))).reshape(ids.shape[0], -1, 64)
        return self.head((x * attention_mask[..., None]).sum(1))


def sentences(length=12):
    ids = np.random.default_rng(0).integers(0, 200, (8, length))
    mask = np.ones((8, length), np.int64)
    mask[1:4, length // 2 :] = 0
    return Dataset({"ids": ids, "attention_mask": mask})


# --- fixed shapes ---------------------------------------------------------------------------------------------------------------------


def test_every_shape_is_fixed_and_the_variant_does_the_same(digits):
    artifact, calibration, evaluation = digits
    edge = FixedShapes()(
        artifact, artifact.path.with_name("a.edge.onnx"), settings=EdgeSettings(batch_size=2), examples=calibration
    )
    assert graph_signature(edge.path) == {
        "inputs": [{"name": "input", "dtype": "float", "shape": [2, 1, 8, 8]}],
        "outputs": [{"name": "output", "dtype": "float", "shape": [2, 10]}],
    }
    x = evaluation.inputs["input"][:2]
    np.testing.assert_allclose(run(edge.path, input=x)[0], run(artifact.path, input=x)[0], rtol=1e-5, atol=1e-5)
    body = made(edge)
    assert body["of"] == artifact.path.name
    assert body["sha256"] == dict(artifact.sha256)
    assert body["difference"] <= 1e-4
    # onnxruntime's lists say that phones take nothing of a graph with free sizes.
    assert body["mobile"]["NNAPI"]["supported"] == body["mobile"]["NNAPI"]["nodes"] > 0
    assert not list(edge.path.parent.glob("*.ort"))


def test_onnxruntimes_own_format_comes_with_its_operators(digits):
    artifact, calibration, evaluation = digits
    edge = FixedShapes()(
        artifact, artifact.path.with_name("b.edge.onnx"), settings=EdgeSettings(ort=True), examples=calibration
    )
    ort, operators = (edge.path.with_name(f"b.edge.{suffix}") for suffix in ("ort", "required_operators.config"))
    x = evaluation.inputs["input"][:1]
    np.testing.assert_allclose(run(ort, input=x)[0], run(artifact.path, input=x)[0], rtol=1e-5, atol=1e-5)
    assert ort.read_bytes()[4:8] == b"ORTM"
    listed = [line.split(";") for line in operators.read_text().splitlines() if line.startswith(("ai.onnx;", "com."))]
    assert {name for line in listed for name in line[2].split(",")} & {"Gemm", "FusedConv", "Conv"}
    beside = made(edge)["beside"]
    assert {name: one["sha256"] for name, one in beside.items()} == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (ort, operators)
    }
    assert not list(edge.path.parent.glob(".*"))


@pytest.mark.parametrize("length", [None, 7])
def test_the_length_is_fixed_too(tmp_path, length):
    data = sentences()
    artifact = TorchScriptExporter()(Tokens(), data, tmp_path / "m.onnx", opset=18)
    settings = EdgeSettings(batch_size=1, sequence_length=length, ort=True)
    edge = FixedShapes()(artifact, tmp_path / "m.edge.onnx", settings=settings, examples=data)
    assert [one["shape"] for one in graph_signature(edge.path)["inputs"]] == [[1, length or 12]] * 2
    assert graph_signature(edge.path)["outputs"][0]["shape"] == [1, 5]


def test_external_data_stays_beside_the_variant(tmp_path):
    data = Dataset({"x": np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)})
    from secateurs_adapters.export import DynamoExporter

    artifact = DynamoExporter(single_file_bytes=1)(nn.Linear(64, 64), data, tmp_path / "m.onnx", opset=20)
    edge = FixedShapes()(artifact, tmp_path / "m.edge.onnx", settings=EdgeSettings(), examples=data)
    assert [file.name for file in edge.files] == ["m.edge.onnx", "m.edge.onnx.data"]
    (tmp_path / "m.onnx.data").unlink()
    assert run(edge.path, x=data.inputs["x"][:1])[0].shape == (1, 64)


def test_another_size_than_the_file_fixes_is_refused(tmp_path, digits):
    artifact, calibration, _ = digits
    once = FixedShapes()(artifact, tmp_path / "one.onnx", settings=EdgeSettings(), examples=calibration)
    with pytest.raises(ExportError, match=r"asks for sizes that 'one\.onnx' does not take"):
        FixedShapes()(once, tmp_path / "two.onnx", settings=EdgeSettings(batch_size=2), examples=calibration)
    assert not (tmp_path / "two.onnx").exists()


# --- quantisation ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"per_channel": False, "activations": "int8", "calibrate": "percentile"}, {"calibrate": "entropy"}]
)
def test_static_quantisation_keeps_a_trained_network(tmp_path, digits, options):
    artifact, calibration, evaluation = digits
    settings = QuantiseSettings(**options)
    found = StaticQuantiser()(artifact, tmp_path / "m.quantised.onnx", settings=settings, examples=calibration)
    assert accuracy(found.path, evaluation) >= accuracy(artifact.path, evaluation) - 0.02
    assert found.artifact_bytes < artifact.artifact_bytes / 2
    assert found.opset == 20
    assert found.parity is None
    body = made(found)
    assert body["settings"] == settings.model_dump()
    assert body["nodes"]["QuantizeLinear"] > 10
    assert 0 < body["difference"] < 0.1
    assert graph_signature(found.path)["inputs"] == graph_signature(artifact.path)["inputs"]


def test_weights_are_rounded_to_a_scale_per_output_channel(tmp_path, digits):
    """Every int8 weight times its scale is within half a step of the weight it came from."""
    artifact, calibration, _ = digits
    found = StaticQuantiser()(artifact, tmp_path / "q.onnx", settings=QuantiseSettings(), examples=calibration)
    before = {t.name: numpy_helper.to_array(t) for t in onnx.load(artifact.path).graph.initializer}
    after = {t.name: t for t in onnx.load(found.path).graph.initializer}
    name = "head.weight"
    quantised = numpy_helper.to_array(after[f"{name}_quantized"])
    assert after[f"{name}_quantized"].data_type == TensorProto.INT8
    scale = numpy_helper.to_array(after[f"{name}_scale"])
    assert scale.shape == (len(before[name]),)
    np.testing.assert_allclose(scale, np.abs(before[name]).max(1) / 127, rtol=0.02)
    step = scale[:, None]
    assert np.abs(quantised * step - before[name]).max() <= 0.51 * step.max()


def test_ranges_come_from_the_calibration_examples_alone(tmp_path, digits):
    artifact, calibration, _ = digits
    loud = Dataset({"input": calibration.inputs["input"][:200].copy()})
    loud.inputs["input"][150:] *= 50
    scales = []
    for samples in (100, 200):
        path = tmp_path / f"{samples}.onnx"
        StaticQuantiser()(artifact, path, settings=QuantiseSettings(samples=samples), examples=loud)
        initial = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
        scales.append(float(initial["input_scale"]))
    few = loud.inputs["input"][:100]
    assert scales[0] == pytest.approx((max(few.max(), 0) - min(few.min(), 0)) / 255, rel=1e-5)
    assert scales[1] > 10 * scales[0]


def test_dynamic_quantisation_takes_products_and_embeddings(tmp_path):
    data = sentences()
    artifact = dynamo(Tokens(), data, tmp_path / "m.onnx", opset=20)
    settings = QuantiseSettings(mode="dynamic")
    found = DynamicQuantiser()(artifact, tmp_path / "m.quantised.onnx", settings=settings, examples=data)
    assert found.weight_bytes < artifact.weight_bytes / 2.5
    assert made(found)["nodes"]["MatMulInteger"] == 2
    other = sentences(5).inputs
    truth, got = run(artifact.path, **other)[0], run(found.path, **other)[0]
    assert 0 < np.abs(truth - got).max() <= 0.1 * np.abs(truth).max()


def test_excluded_nodes_stay_as_they_are(tmp_path, digits):
    artifact, calibration, _ = digits
    nodes = onnx.load(artifact.path).graph.node
    products = [node.name for node in nodes if node.op_type == "Gemm"]
    assert products
    settings = QuantiseSettings(operators=["Conv", "Gemm"], exclude=products)
    found = StaticQuantiser()(artifact, tmp_path / "q.onnx", settings=settings, examples=calibration)
    kept = {t.name for t in onnx.load(found.path).graph.initializer if t.data_type == TensorProto.FLOAT}
    assert "head.weight" in kept


@pytest.mark.parametrize(
    ("quantiser", "settings", "message"),
    [
        (DynamicQuantiser(), {"mode": "dynamic", "operators": ["LSTM"]}, "nothing of 'model.onnx' was quantised"),
        (StaticQuantiser(), {"operators": ["Einsum"]}, "nothing of 'model.onnx' was quantised"),
    ],
)
def test_a_quantisation_that_does_nothing_is_refused(tmp_path, digits, quantiser, settings, message, capfd):
    artifact, calibration, _ = digits
    with pytest.raises(ExportError, match=message) as caught:
        quantiser(artifact, tmp_path / "q.onnx", settings=QuantiseSettings(**settings), examples=calibration)
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_what_was_quantised_is_described_like_any_file(tmp_path, digits):
    artifact, calibration, _ = digits
    found = StaticQuantiser()(artifact, tmp_path / "q.onnx", settings=QuantiseSettings(), examples=calibration)
    assert read_artifact(found.path).sha256 == found.sha256
    body = json.loads(sidecar_path(found.path).read_text())
    assert (body["exporter"], body["parity"]) == ("dynamo", None)


# --- a published network --------------------------------------------------------------------------------------------------------------


DATA = EXAMPLES.parents[1] / "shared" / "data"


@pytest.fixture(scope="module")
def resnet20():
    """ResNet-20 with published weights, and 1,000 real images that it was not trained on."""
    from secateurs_adapters.data_settings import NpzSettings
    from secateurs_adapters.datasets import load_npz
    from secateurs_adapters.models import load_factory

    files = [
        DATA / f"{name}"
        for name in (
            "weights_resnet20_cifar10.safetensors",
            "cifar10_lossless_test1k.npz",
            "cifar10_lossless_train4k.npz",
        )
    ]
    for file in files:
        if not file.is_file():
            pytest.skip(f"needs {file.name}, which is not in {DATA}")
    model = load_factory("cifar_resnet:build", arguments={"depth": 20}, weights=files[0], folder=EXAMPLES)
    normalise = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    test, train = (load_npz(NpzSettings(file=file, normalise=normalise)) for file in files[1:])
    return model, train, test


@pytest.mark.parametrize("exporter", [dynamo, TorchScriptExporter()], ids=["dynamo", "torchscript"])
def test_resnet20_keeps_its_count_in_8_bits(tmp_path, resnet20, exporter):
    model, train, test = resnet20
    artifact = exporter(model, train.take(range(4)), tmp_path / "m.onnx", opset=18)
    weights = sum(tensor.numel() * 4 for tensor in model.parameters() if tensor.ndim > 1)
    assert weights <= artifact.weight_bytes <= 1.02 * weights, "batch norms are folded or kept, nothing is copied"
    right = round(accuracy(artifact.path, test) * len(test))
    assert right == 915
    found = StaticQuantiser()(artifact, tmp_path / "q.onnx", settings=QuantiseSettings(), examples=train)
    assert abs(round(accuracy(found.path, test) * len(test)) - right) <= 12
    assert found.weight_bytes < 0.3 * artifact.weight_bytes
