"""Free lengths, and the exporters beside dynamo: tracing, which must not hide a decision, and Optimum."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from secateurs.data import Dataset
from secateurs.errors import ExportError, PluginError, RecipeError
from secateurs.manager import create_manager
from secateurs.recipe import settings_from
from secateurs_adapters.artifact import graph_signature, sidecar_path
from secateurs_adapters.export import DynamoExporter
from secateurs_adapters.export_settings import DynamoSettings, OptimumSettings, TorchScriptSettings
from secateurs_adapters.optimum_export import OptimumExporter
from secateurs_adapters.torchscript import TorchScriptExporter

LENGTH = 8


def rows(*shape, seed=0):
    return Dataset({"x": np.random.default_rng(seed).normal(size=shape).astype(np.float32)})


def tokens(length=LENGTH, n=4):
    mask = np.ones((n, length), np.int64)
    mask[1, length // 2 :] = 0
    return Dataset({"ids": np.random.default_rng(0).integers(0, 30, (n, length)), "attention_mask": mask})


class Tokens(nn.Module):
    """Mean of the embeddings under the mask; `fixed` positions make other lengths impossible."""

    def __init__(self, fixed=False, hard=False):
        super().__init__()
        self.embed, self.fixed, self.hard = nn.Embedding(30, 8), fixed, hard
        self.place = nn.Parameter(torch.randn(LENGTH, 8))

    def forward(self, ids, mask):
        x = self.embed(ids)
        if self.fixed:
            x = x + self.place
        if self.hard:  # runs at every even length; a graph that keeps the size is right at one length only
            x = x + torch.arange(int(x.shape[1]), dtype=torch.float32).mul(0.1)[:, None]
        return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def run(path, **inputs):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, inputs)


@pytest.mark.parametrize("exporter", [DynamoExporter(), TorchScriptExporter()], ids=["dynamo", "torchscript"])
def test_a_free_length_is_proved_at_two_others(tmp_path, exporter):
    model, data = Tokens(), tokens()
    artifact = exporter(model, data, tmp_path / "m.onnx", opset=18)
    assert len(set(artifact.parity.sequence_lengths)) == 2
    assert LENGTH not in artifact.parity.sequence_lengths
    assert [spec["shape"] for spec in graph_signature(artifact.path)["inputs"]] == [["batch", "sequence"]] * 2
    ids = np.random.default_rng(3).integers(0, 30, (5, 21))
    mask = np.tril(np.ones((5, 21), np.int64), 9)
    expected = model.eval()(torch.from_numpy(ids), torch.from_numpy(mask)).detach().numpy()
    np.testing.assert_allclose(run(artifact.path, ids=ids, attention_mask=mask)[0], expected, atol=1e-5)


@pytest.mark.parametrize("exporter", [DynamoExporter(), TorchScriptExporter()], ids=["dynamo", "torchscript"])
def test_a_length_that_the_network_fixes_stays_fixed_and_is_told(tmp_path, exporter):
    artifact = exporter(Tokens(fixed=True), tokens(), tmp_path / "m.onnx", opset=18)
    assert artifact.parity.sequence_lengths == []
    assert any("fixed at 8: the network does not run" in note for note in artifact.notes)
    assert [spec["shape"] for spec in graph_signature(artifact.path)["inputs"]] == [["batch", LENGTH]] * 2
    assert json.loads(sidecar_path(artifact.path).read_text())["notes"] == list(artifact.notes)


def test_a_length_that_only_tracing_fixes_is_found_on_the_file(tmp_path):
    """The tracer keeps `int(x.shape[1])` as the number 8: right at one length, wrong at every other."""
    artifact = TorchScriptExporter()(Tokens(hard=True), tokens(), tmp_path / "m.onnx", opset=18)
    assert artifact.parity.sequence_lengths == []
    assert any("fixed at 8, as with a free one" in note for note in artifact.notes)
    with pytest.raises(ExportError, match="sequence length"):
        TorchScriptExporter(TorchScriptSettings(sequence="free"))(
            Tokens(hard=True), tokens(), tmp_path / "n.onnx", opset=18
        )
    assert DynamoExporter()(Tokens(hard=True), tokens(), tmp_path / "d.onnx", opset=18).parity.sequence_lengths


def test_a_free_length_can_be_demanded_or_declined(tmp_path):
    with pytest.raises(ExportError, match=r"fixed at 8.*two others"):
        DynamoExporter(DynamoSettings(sequence="free"))(Tokens(fixed=True), tokens(), tmp_path / "m.onnx", opset=20)
    fixed = DynamoExporter(DynamoSettings(sequence="fixed"))(Tokens(), tokens(), tmp_path / "m.onnx", opset=20)
    assert (fixed.parity.sequence_lengths, fixed.notes) == ([], ())


def test_lengths_are_cut_and_repeated_and_no_mask_is_empty():
    data = tokens()
    data.inputs["attention_mask"][2, :6] = 0  # padded on the left
    assert data.sequences == ("ids", "attention_mask")
    assert rows(3, 5).sequences == ()
    for length in (3, 8, 19):
        cut = data.at_length(length)
        assert cut.inputs["ids"].shape == (4, length)
        np.testing.assert_array_equal(cut.inputs["ids"], np.tile(data.inputs["ids"], 3)[:, :length])
        assert cut.inputs["attention_mask"].any(1).all()
    assert not data.inputs["attention_mask"][2, :6].any()


class Decides(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x * 2
        return -x


class Item(nn.Module):
    def forward(self, x):
        return x * float(x.abs().max().item())


class Innocent(nn.Module):
    """Decides by a shape and by a constant, neither of which is data."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        x = x * self.scale if self.scale > 1 else x
        return x * 3 if x.shape[0] > 100 else x


class Unsupported(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


class HardView(nn.Module):
    def forward(self, x):
        return x.view(2, -1, 8) * 2


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (Decides(), (2, 8), r"decides by the values of its data \(`if x\.sum\(\) > 0:`, test_exporters\.py line \d+\)"),
        (Item(), (2, 8), r"decides by the values.*item\(\)"),
        (HardView(), (2, 4, 8), r"hard-codes.*x\.shape"),
        (Unsupported(), (2, 8), "operator aten::special_bessel_j0 has no ONNX form"),
    ],
)
def test_tracing_refuses_what_it_would_get_wrong(tmp_path, capfd, model, shape, message):
    with pytest.raises(ExportError, match=message) as caught:
        TorchScriptExporter()(model, rows(*shape), tmp_path / "m.onnx", opset=17)
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_one_branch_is_accepted_on_request_and_recorded(tmp_path):
    data = Dataset({"x": np.abs(rows(4, 8).inputs["x"])})
    artifact = TorchScriptExporter(TorchScriptSettings(traced_branches=True))(
        Decides(), data, tmp_path / "m.onnx", opset=17
    )
    assert "traced at `if x.sum() > 0:`" in artifact.notes[1]
    mixed = rows(8, 8)  # some checks take the other branch
    with pytest.raises(ExportError, match="disagrees"):
        TorchScriptExporter(TorchScriptSettings(traced_branches=True))(Decides(), mixed, tmp_path / "n.onnx", opset=17)


def test_shapes_and_constants_are_no_data(tmp_path):
    artifact = TorchScriptExporter()(Innocent(), rows(3, 8), tmp_path / "m.onnx", opset=17)
    assert "tracing" in artifact.notes[0]
    assert len(artifact.notes) == 1


@pytest.mark.parametrize("opset", [11, 17, 20])
def test_a_traced_network_is_in_evaluation_mode_at_the_opset_asked_for(tmp_path, opset):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 5)
    ).train()
    artifact = TorchScriptExporter()(model, rows(4, 3, 6, 6), tmp_path / "m.onnx", opset=opset)
    file = onnx.load(artifact.path)
    assert artifact.opset == opset == next(entry.version for entry in file.opset_import if entry.domain == "")
    assert artifact.ir_version == file.ir_version
    assert not {"Dropout", "BatchNormalization"} & {node.op_type for node in file.graph.node}
    assert model.training
    x = rows(7, 3, 6, 6, seed=4).inputs["x"]
    expected = model.eval()(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(run(artifact.path, x=x)[0], expected, atol=1e-5)


def test_keywords_keep_their_names_in_a_trace(tmp_path):
    class Difference(nn.Module):
        def forward(self, *, left, right):
            return {"difference": left - right, "both": (left, right[:, :1])}

    values = {"right": rows(3, 4).inputs["x"], "left": rows(3, 4, seed=1).inputs["x"]}
    artifact = TorchScriptExporter()(Difference(), Dataset(values, keyword=True), tmp_path / "m.onnx", opset=17)
    assert set(artifact.inputs) == {"left", "right"}
    np.testing.assert_allclose(run(artifact.path, **values)[0], values["left"] - values["right"], atol=1e-6)


def test_an_opset_beyond_the_tracer_is_refused(tmp_path):
    with pytest.raises(ExportError, match="opset"):
        TorchScriptExporter()(nn.Linear(4, 2), rows(2, 4), tmp_path / "m.onnx", opset=25)


def test_the_sidecar_tells_all_that_is_known(tmp_path):
    artifact = TorchScriptExporter()(nn.Linear(4, 2), rows(2, 4), tmp_path / "m.onnx", opset=17)
    body = json.loads(sidecar_path(artifact.path).read_text())
    assert (body["exporter"], body["opset"], body["ir_version"], body["made"]) == ("torchscript", 17, 8, None)
    assert body["bytes"] == {"m.onnx": artifact.path.stat().st_size}
    assert set(body["sha256"]) == {"m.onnx"}
    assert body["parity"]["batch_sizes"] == [1, 3]
    assert {"torch", "onnx", "onnxruntime"} <= set(body["versions"])
    assert body["signature"]["inputs"] == [{"name": "x", "dtype": "float", "shape": ["batch", 4]}]


def test_recipes_configure_exporters_by_their_options():
    entry = create_manager().registries.exporters["torchscript"]
    settings = settings_from(entry.load_settings(), {"traced_branches": True}, "export.options")
    assert entry.load()(settings).settings == TorchScriptSettings(traced_branches=True)
    with pytest.raises(RecipeError, match=r"export\.options: unknown option 'traced_branch'.*'traced_branches'"):
        settings_from(entry.load_settings(), {"traced_branch": True}, "export.options")


# --- Optimum ------------------------------------------------------------------------------------------------------------------------


def bert(**more):
    transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, **more
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config).eval()


def sentences():
    data = tokens()
    inputs = {"input_ids": data.inputs["ids"], "attention_mask": data.inputs["attention_mask"]}
    return Dataset({**inputs, "token_type_ids": np.zeros_like(inputs["input_ids"])}, keyword=True)


def optimum_works():
    try:
        OptimumExporter()
    except PluginError:
        return False
    return True


needs_optimum = pytest.mark.skipif(
    "not optimum_works()", reason="needs the extra `optimum` and transformers below 4.58"
)


@pytest.mark.hf
@pytest.mark.parametrize(
    "exporter",
    [DynamoExporter(), TorchScriptExporter(), pytest.param("optimum", marks=needs_optimum)],
    ids=["dynamo", "torchscript", "optimum"],
)
def test_a_network_of_uneven_layers_is_written_by_every_exporter(tmp_path, exporter):
    """A feed-forward of another width in one layer, which no configuration describes."""
    model, data = bert(), sentences()
    layer = model.bert.encoder.layer[1]
    layer.intermediate.dense, layer.output.dense = nn.Linear(16, 9), nn.Linear(9, 16)
    chosen = OptimumExporter() if exporter == "optimum" else exporter
    artifact = chosen(model, data, tmp_path / "m.onnx", opset=18)
    assert len(artifact.parity.sequence_lengths) == 2
    other = data.at_length(5).inputs
    with torch.no_grad():
        expected = model.eval()(**{name: torch.from_numpy(array) for name, array in other.items()}).logits.numpy()
    np.testing.assert_allclose(run(artifact.path, **other)[0], expected, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.json"]


@pytest.mark.hf
@needs_optimum
def test_optimum_refuses_other_networks_and_other_inputs_with_the_way_out(tmp_path):
    with pytest.raises(ExportError, match=r"takes Hugging Face networks.*got Linear; use `exporter: dynamo`"):
        OptimumExporter()(nn.Linear(4, 2), rows(2, 4), tmp_path / "m.onnx", opset=18)
    data = sentences()
    del data.inputs["token_type_ids"]
    with pytest.raises(ExportError, match=r"takes the inputs \['token_type_ids'\].*exporter: dynamo"):
        OptimumExporter()(bert(), data, tmp_path / "m.onnx", opset=18)
    with pytest.raises(ExportError, match="dynamo"):
        OptimumExporter(OptimumSettings(task="no-such-task"))(bert(), sentences(), tmp_path / "m.onnx", opset=18)
    assert list(tmp_path.iterdir()) == []


def test_without_optimum_the_wheel_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PluginError, match=r"optimum-onnx, which is not installed.*secateurs\[optimum\]"):
        OptimumExporter()


@pytest.mark.hf
@pytest.mark.skipif("optimum_works()", reason="needs transformers 5 beside the extra `optimum`")
def test_beside_transformers_5_the_way_out_is_named():
    pytest.importorskip("optimum.exporters", exc_type=ImportError)
    with pytest.raises(PluginError, match=r"takes transformers below 4\.58.*exporter: dynamo"):
        OptimumExporter()


class Looping(nn.Module):
    """A network of which a part is written as a graph inside a node."""

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda y: y.sin() + 1, lambda y: y.cos(), (x,))


@pytest.mark.parametrize(
    ("exporter", "network"),
    [
        (DynamoExporter(), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))),
        (DynamoExporter(), Looping()),
        (TorchScriptExporter(), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))),
    ],
    ids=["dynamo", "subgraph", "torchscript"],
)
def test_a_file_says_nothing_of_the_machine_that_wrote_it(tmp_path, exporter, network):
    example = Dataset({"x": np.ones((2, 4), np.float32)})
    path = exporter(network.eval(), example, tmp_path / "m.onnx", opset=18).path
    content = path.read_bytes()
    assert Path(torch.__file__).parent.as_posix().encode() not in content
    assert b".py" not in content
    assert b"metadata_props" not in str(onnx.load(path)).encode()
    expected = network(torch.from_numpy(example.inputs["x"])).detach().numpy()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, example.inputs)[0], expected, atol=1e-6)
