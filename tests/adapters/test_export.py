"""Export: the file does what the network does, or there is no file."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from secateurs.data import Dataset
from secateurs.errors import ExportError
from secateurs_adapters.artifact import sidecar_path
from secateurs_adapters.export import DynamoExporter, dynamo


def rows(*shape, name="x", seed=0, **more):
    return Dataset({name: np.random.default_rng(seed).normal(size=shape).astype(np.float32)}, **more)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.dropout(torch.relu(self.norm(self.conv(x))).mean((2, 3))))


def run(path, **inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


@pytest.mark.parametrize("opset", [18, 20])
def test_the_file_computes_what_the_network_computes(tmp_path, opset, capfd):
    model, example = Small(), rows(4, 3, 6, 6)
    artifact = dynamo(model, example, tmp_path / "new" / "m.onnx", opset=opset)
    assert (artifact.inputs, artifact.outputs, artifact.exporter) == (("x",), ("output",), "dynamo")
    assert artifact.opset == opset == next(e.version for e in onnx.load(artifact.path).opset_import if e.domain == "")
    assert artifact.parity.batch_sizes == [1, 3]
    assert artifact.parity.max_rel < 1e-5
    x = rows(7, 3, 6, 6, seed=5).inputs["x"]
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(run(artifact.path, x=x)[0], expected, atol=1e-5)
    assert sorted(p.name for p in artifact.path.parent.iterdir()) == ["m.onnx", "m.onnx.json"]
    assert sidecar_path(artifact.path).exists()
    assert capfd.readouterr().out == ""


def test_the_network_given_is_untouched(tmp_path):
    model = Small().train()
    model.norm.eval()
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dynamo(model, rows(2, 3, 6, 6), tmp_path / "m.onnx", opset=20)
    assert model.training
    assert model.dropout.training
    assert not model.norm.training
    assert len(model.head._forward_hooks) == 1
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    # Dropout did not survive into the file.
    assert not [node for node in onnx.load(tmp_path / "m.onnx").graph.node if node.op_type == "Dropout"]


def test_tuples_and_dicts_have_numbered_outputs_and_keywords_are_kept(tmp_path):
    class Many(nn.Module):
        def forward(self, left, *, right):
            return {"sum": left + right, "rest": (left * 2, right[:, :1])}

    example = Dataset({"left": rows(3, 4).inputs["x"], "right": rows(3, 4, seed=1).inputs["x"]}, keyword=True)
    artifact = dynamo(Many(), example, tmp_path / "m.onnx", opset=20)
    assert artifact.inputs == ("left", "right")
    assert artifact.outputs == ("output_0", "output_1", "output_2")
    left, right = example.inputs["left"], example.inputs["right"]
    for got, expected in zip(
        run(artifact.path, left=left, right=right), (left + right, left * 2, right[:, :1]), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_the_layout_of_the_example_is_not_traced(tmp_path):
    """Images that lie channels last in memory, as they are read from files."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    pixels = np.random.default_rng(0).standard_normal((4, 6, 6, 3)).astype(np.float32)
    dynamo(model, Dataset({"x": pixels.transpose(0, 3, 1, 2)}), tmp_path / "m.onnx", opset=20)
    kinds = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert kinds == ["Conv", "ReduceMean", "Reshape", "Gemm"]


def test_two_positional_inputs_share_the_batch_and_tokens_work(tmp_path):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(30, 8)

        def forward(self, ids, mask):
            return (self.embed(ids) * mask[..., None]).sum(1)

    generator = np.random.default_rng(0)
    example = Dataset({"ids": generator.integers(0, 30, (4, 6)), "mask": np.ones((4, 6), np.float32)})
    artifact = dynamo(Tokens(), example, tmp_path / "m.onnx", opset=20)
    assert artifact.inputs == ("ids", "mask")


def test_masks_of_torchs_own_pruning_are_folded_in(tmp_path):
    model = nn.Linear(8, 4)
    prune.l1_unstructured(model, "weight", amount=0.5)
    artifact = dynamo(model, rows(3, 8), tmp_path / "m.onnx", opset=20)
    x = rows(3, 8).inputs["x"]
    np.testing.assert_allclose(run(artifact.path, x=x)[0], model(torch.from_numpy(x)).detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path, dtype):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)
    artifact = dynamo(model, rows(3, 8), tmp_path / "m.onnx", opset=20)
    kinds = {tensor.data_type for tensor in onnx.load(artifact.path).graph.initializer}
    # bfloat16 has no kernels on the CPU; float32 holds its values exactly.
    assert kinds == {onnx.TensorProto.FLOAT16 if dtype == torch.float16 else onnx.TensorProto.FLOAT}
    assert next(model.parameters()).dtype == dtype


class HardView(nn.Module):
    def forward(self, x):
        return x.view(2, -1, 4) * 2


class HardBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(x).view(2, 4)


class Decides(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x * 2
        return -x


class Random(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


class Complex(nn.Module):
    def forward(self, x):
        return x, torch.complex(x, -x)


class Unsupported(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (HardView(), (2, 4, 4), r"hard-codes.*x\.shape"),
        (HardView(), (4, 4, 4), r"hard-codes.*x\.shape"),
        (HardBatch(), (2, 8), r"fixes its batch size.*hard-codes"),
        (
            Decides(),
            (2, 8),
            r"decides by the values of its data \(`if x\.sum\(\) > 0:`, test_export\.py line \d+\).*torch\.where",
        ),
        (nn.Linear(7, 2), (2, 8), "network itself fails at batch size 2.*shapes and types"),
        (Random(), (2, 8), "disagrees with the network"),
        (Complex(), (2, 8), r"output 'output_1' is complex \(torch\.complex64\).*torch\.view_as_real"),
        (Unsupported(), (2, 8), "operator prims.bessel_j0 has no ONNX form"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_leaves_no_file(tmp_path, model, shape, message):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"from before")
    with pytest.raises(ExportError, match=message) as caught:
        dynamo(model, rows(*shape), path, opset=20)
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.exit_code == 3
    assert path.read_bytes() == b"from before"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_the_parts_of_complex_numbers_can_be_exported(tmp_path):
    class Parts(nn.Module):
        def forward(self, x):
            return torch.view_as_real(torch.complex(x, -x))

    x = rows(3, 8).inputs["x"]
    artifact = dynamo(Parts(), rows(3, 8), tmp_path / "m.onnx", opset=20)
    np.testing.assert_array_equal(run(artifact.path, x=x)[0], np.stack([x, -x], axis=-1))


@pytest.mark.parametrize("opset", [9, 30])
def test_an_opset_that_was_not_obtained_is_refused(tmp_path, opset):
    # torch returns normally after it wrote opset 18 instead.
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ExportError, match=f"opset {opset} was asked for, but the exporter wrote opset 18"):
        dynamo(model, rows(2, 3, 6, 6), tmp_path / "m.onnx", opset=opset)
    assert list(tmp_path.iterdir()) == []


def test_interruption_leaves_nothing_behind(tmp_path):
    class Interrupted(nn.Linear):
        def forward(self, x):
            if torch.compiler.is_exporting():
                raise KeyboardInterrupt
            return super().forward(x)

    with pytest.raises(KeyboardInterrupt):
        dynamo(Interrupted(4, 4), rows(2, 4), tmp_path / "m.onnx", opset=20)
    assert list(tmp_path.iterdir()) == []


def test_large_weights_go_to_a_second_file(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    artifact = DynamoExporter(single_file_bytes=1000)(model, rows(2, 64), tmp_path / "m.onnx", opset=20)
    assert [file.name for file in artifact.files] == ["m.onnx", "m.onnx.data"]
    assert artifact.artifact_bytes > artifact.weight_bytes >= 2 * 64 * 64 * 4
    x = rows(5, 64).inputs["x"]
    np.testing.assert_allclose(run(artifact.path, x=x)[0], model(torch.from_numpy(x)).detach().numpy(), atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data", "m.onnx.json"]


def test_one_example_is_enough(tmp_path):
    assert dynamo(nn.Linear(4, 2), rows(1, 4), tmp_path / "m.onnx", opset=20).parity.batch_sizes == [1, 3]
