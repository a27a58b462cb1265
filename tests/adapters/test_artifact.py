"""Files as they lie on the disk: sizes, hashes, opset, external data, and everything that is not ONNX."""

import hashlib
import json

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from secateurs.errors import DataError, UserError
from secateurs.report import Parity
from secateurs_adapters.artifact import graph_signature, read_artifact, sidecar_path, write_sidecar


def model_of(weights, opset=17):
    """y = x * w0 + w1 + ... with each array as an initialiser."""
    nodes, last = [], "x"
    for index in range(len(weights)):
        nodes.append(helper.make_node("Mul" if index == 0 else "Add", [last, f"w{index}"], [f"h{index}"]))
        last = f"h{index}"
    nodes.append(helper.make_node("Identity", [last], ["y"]))
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 8])  # noqa: E731
    tensors = [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)]
    graph = helper.make_graph(nodes, "g", [value("x")], [value("y")], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@pytest.fixture
def weights():
    return [np.arange(8, dtype=np.float32), np.ones(8, np.float32)]


def test_describes_a_single_file(tmp_path, weights):
    path = tmp_path / "m.onnx"
    onnx.save(model_of(weights), path)
    found = read_artifact(path)
    assert (found.opset, found.inputs, found.outputs, found.files) == (17, ("x",), ("y",), (path,))
    assert found.weight_bytes == sum(w.nbytes for w in weights)
    assert found.artifact_bytes == path.stat().st_size
    assert found.sha256 == {"m.onnx": hashlib.sha256(path.read_bytes()).hexdigest()}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["f4", "f2", "f8", "i8", "i1", "u2"]), st.integers(0, 40)), max_size=5))
def test_weight_bytes_are_numpys(tmp_path_factory, forms):
    path = tmp_path_factory.mktemp("m") / "m.onnx"
    arrays = [np.zeros(size, dtype) for dtype, size in forms]
    onnx.save(model_of(arrays), path)
    assert read_artifact(path).weight_bytes == sum(a.nbytes for a in arrays)


def test_four_bit_weights_are_packed_and_subgraphs_count(tmp_path, weights):
    model = model_of(weights)
    model.graph.initializer.append(helper.make_tensor("q", TensorProto.INT4, [5], [1, 2, 3, 4, 5]))
    inner = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["o"])],
        "then",
        [],
        [helper.make_tensor_value_info("o", TensorProto.FLOAT, [3])],
        [numpy_helper.from_array(np.zeros(3, np.float32), "c")],
    )
    model.graph.node.append(helper.make_node("If", ["cond"], ["z"], then_branch=inner, else_branch=inner))
    onnx.save(model, tmp_path / "m.onnx")
    assert read_artifact(tmp_path / "m.onnx").weight_bytes == 64 + 3 + 2 * 12


def external(path, weights):
    onnx.save(model_of(weights), path, save_as_external_data=True, location="w/m.data", size_threshold=0)


def test_external_data_ships_too(tmp_path, weights):
    (tmp_path / "w").mkdir()
    path = tmp_path / "m.onnx"
    external(path, weights)
    found = read_artifact(path)
    data = tmp_path / "w" / "m.data"
    assert found.files == (path, data)
    assert found.artifact_bytes == path.stat().st_size + data.stat().st_size
    assert found.weight_bytes == sum(w.nbytes for w in weights)
    assert found.sha256["w/m.data"] == hashlib.sha256(data.read_bytes()).hexdigest()


def test_missing_or_short_external_data_is_refused(tmp_path, weights):
    (tmp_path / "w").mkdir()
    path, data = tmp_path / "m.onnx", tmp_path / "w" / "m.data"
    external(path, weights)
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(DataError, match="copy the whole file again"):
        read_artifact(path)
    data.unlink()
    with pytest.raises(DataError, match="missing"):
        read_artifact(path)


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname", "link/secret.bin"])
def test_external_data_outside_the_folder_is_refused(tmp_path, weights, location):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(b"0" * 100)
    (folder / "link").symlink_to(tmp_path)
    model = model_of(weights)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    onnx.save(model, folder / "m.onnx")
    with pytest.raises(DataError, match="outside its own folder"):
        read_artifact(folder / "m.onnx")


@pytest.mark.parametrize("content", [b"", b"hello, this is no model", bytes(range(256)), b"\x08\x08"])
def test_a_file_that_is_not_onnx_is_the_users_error(tmp_path, content):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"not an ONNX file.*give an \.onnx file") as caught:
        read_artifact(path)
    assert caught.value.exit_code == 2


def test_a_missing_file_and_a_folder_are_the_users_error(tmp_path):
    with pytest.raises(UserError, match="missing"):
        read_artifact(tmp_path / "none.onnx")
    with pytest.raises(UserError, match="folder"):
        read_artifact(tmp_path)


def test_the_sidecar_holds_signature_hashes_and_versions(tmp_path, weights):
    path = tmp_path / "m.onnx"
    onnx.save(model_of(weights, opset=18), path)
    artifact = read_artifact(path)
    parity = Parity(max_abs=1e-7, max_rel=1e-7, tolerance=1e-4, batch_sizes=[1, 3])
    import dataclasses

    where = write_sidecar(dataclasses.replace(artifact, exporter="dynamo", parity=parity))
    assert where == sidecar_path(path) == tmp_path / "m.onnx.json"
    content = json.loads(where.read_text())
    assert content["opset"] == 18
    assert content["signature"] == graph_signature(path)
    assert content["signature"]["inputs"] == [{"name": "x", "dtype": "float", "shape": ["batch", 8]}]
    assert content["sha256"] == dict(artifact.sha256)
    assert content["parity"]["batch_sizes"] == [1, 3]
    assert content["versions"]["onnx"] == onnx.__version__
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.json"]
