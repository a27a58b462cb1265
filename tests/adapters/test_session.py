"""Sessions: providers that are refused rather than replaced, inputs that fit, and processes that stay apart."""

import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from secateurs.errors import DataError, ProviderError, SecateursError
from secateurs_adapters.fresh import in_fresh_process
from secateurs_adapters.session import (
    CPU,
    Session,
    SessionOptions,
    check_provider,
    run_dataset,
    seeded_inputs,
)

W = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)


def save(path, nodes, inputs, outputs, weights=()):
    info = lambda items: [helper.make_tensor_value_info(*item) for item in items]  # noqa: E731
    tensors = [numpy_helper.from_array(value, name) for name, value in weights]
    graph = helper.make_graph(nodes, "g", info(inputs), info(outputs), tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def linear(path, batch="batch"):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    return save(path, nodes, [("x", TensorProto.FLOAT, [batch, 8])], [("y", TensorProto.FLOAT, [batch, 3])], [("w", W)])


def test_an_unavailable_provider_names_those_available_and_the_wheel():
    with pytest.raises(ProviderError) as caught:
        check_provider("CUDAExecutionProvider")
    assert all(name in str(caught.value) for name in onnxruntime.get_available_providers())
    assert "onnxruntime-gpu" in str(caught.value)
    assert "onnx-gpu" in str(caught.value)
    for name, wheel in [
        ("OpenVINOExecutionProvider", "onnxruntime-openvino"),
        ("QNNExecutionProvider", "onnxruntime-qnn"),
    ]:
        with pytest.raises(ProviderError, match=wheel):
            check_provider(name)


def test_an_unknown_provider_suggests_the_nearest():
    for name in ("CudaExecutionProvider", "cuda", "CUDAExecutionProvidr"):
        with pytest.raises(ProviderError, match=f"{name}.*Did you mean 'CUDAExecutionProvider'"):
            check_provider(name)


def test_a_session_never_falls_back_silently(tmp_path):
    path = linear(tmp_path / "m.onnx")
    with pytest.raises(ProviderError, match="not available here"):
        Session(path, SessionOptions(provider="TensorrtExecutionProvider"))
    # Azure is in every wheel and runs no such nodes: onnxruntime puts them on the CPU without a word.
    session = Session(path, SessionOptions(provider="AzureExecutionProvider", record_assignment=True))
    assert session.provider_obtained() == CPU
    assert "AzureExecutionProvider" not in session.nodes_per_provider()


def test_nodes_per_provider_and_outputs(tmp_path):
    session = Session(linear(tmp_path / "m.onnx"), SessionOptions(record_assignment=True))
    assert session.nodes_per_provider() == {CPU: 2}
    x = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    np.testing.assert_allclose(session.run({"x": x})["y"], np.maximum(x @ W, 0), atol=1e-6)


def test_bound_runs_give_the_same(tmp_path):
    session = Session(linear(tmp_path / "m.onnx"))
    feeds = seeded_inputs(session, 4)
    session.bind(feeds, session.run(feeds))()


def test_a_file_that_does_not_load_is_the_users_error(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot load"):
        Session(tmp_path / "m.onnx")
    with pytest.raises(DataError, match="missing"):
        Session(tmp_path / "none.onnx")


def test_every_example_is_run_once_and_in_order(tmp_path):
    session = Session(linear(tmp_path / "m.onnx"))
    x = np.random.default_rng(2).normal(size=(11, 8))
    for size in (1, 4, 11, 64):
        np.testing.assert_allclose(
            run_dataset(session, {"x": x, "extra": x}, size)["y"], np.maximum(x @ W, 0), atol=1e-5
        )


def test_a_fixed_batch_size_is_filled_up(tmp_path):
    session = Session(linear(tmp_path / "m.onnx", batch=4))
    x = np.random.default_rng(2).normal(size=(11, 8))
    np.testing.assert_allclose(run_dataset(session, {"x": x}, 64)["y"], np.maximum(x @ W, 0), atol=1e-5)
    with pytest.raises(DataError, match="fixes its batch size at 4, got 2"):
        seeded_inputs(session, 2)


def test_wrong_names_shapes_and_types_are_explained(tmp_path):
    session = Session(linear(tmp_path / "m.onnx"))
    with pytest.raises(DataError, match=r"needs the inputs \['x'\], but the data has \['images'\]"):
        session.feeds({"images": np.zeros((2, 8))})
    with pytest.raises(DataError, match=r"shape \['batch', 8\], but the data has \[2, 7\]"):
        session.feeds({"x": np.zeros((2, 7))})
    with pytest.raises(DataError, match="shape"):
        session.feeds({"x": np.zeros((2, 8, 1))})
    with pytest.raises(DataError, match="takes float32, but the data is complex128"):
        session.feeds({"x": np.zeros((2, 8), complex)})
    assert session.feeds({"x": np.ones((2, 8), np.uint8)})["x"].dtype == np.float32


def test_integers_are_cast_only_if_they_fit(tmp_path):
    path = save(
        tmp_path / "i.onnx",
        [helper.make_node("Identity", ["i"], ["y"])],
        [("i", TensorProto.INT32, ["batch"])],
        [("y", TensorProto.INT32, ["batch"])],
    )
    session = Session(path)
    assert run_dataset(session, {"i": np.array([1, 2], np.int64)}, 8)["y"].tolist() == [1, 2]
    with pytest.raises(DataError, match="values beyond it"):
        session.feeds({"i": np.array([2**40])})
    with pytest.raises(DataError, match="takes int32, but the data is float64"):
        session.feeds({"i": np.array([0.5])})


def test_seeded_inputs_follow_the_signature(tmp_path):
    inputs = [
        ("ids", TensorProto.INT64, ["batch", "sequence"]),
        ("attention_mask", TensorProto.INT64, ["batch", "sequence"]),
        ("flag", TensorProto.BOOL, ["batch"]),
        ("image", TensorProto.FLOAT16, ["batch", 3, "side", "side"]),
    ]
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name, _, _ in inputs]
    session = Session(save(tmp_path / "m.onnx", nodes, inputs, [(f"{n}_out", t, s) for n, t, s in inputs]))
    made = seeded_inputs(session, 5, seed=3)
    assert {name: array.shape for name, array in made.items()} == {
        "ids": (5, 16),
        "attention_mask": (5, 16),
        "flag": (5,),
        "image": (5, 3, 16, 16),
    }
    assert set(np.unique(made["ids"])) == {0, 1}
    assert made["attention_mask"].all()
    assert (made["flag"].dtype, made["image"].dtype) == (np.bool_, np.float16)
    assert 0.8 < made["image"].std() < 1.2
    again, other = seeded_inputs(session, 5, seed=3), seeded_inputs(session, 5, seed=4)
    assert all(np.array_equal(made[name], again[name]) for name in made)
    assert not np.array_equal(made["image"], other["image"])
    assert session.run(made)["image_out"].shape == (5, 3, 16, 16)


def test_an_input_type_that_cannot_be_fed_is_refused(tmp_path):
    nodes = [helper.make_node("Identity", ["s"], ["y"])]
    path = save(tmp_path / "s.onnx", nodes, [("s", TensorProto.STRING, ["n"])], [("y", TensorProto.STRING, ["n"])])
    with pytest.raises(DataError, match=r"tensor\(string\); allowed are"):
        Session(path)


@pytest.mark.parametrize("module", ["session", "latency", "memory", "commands"])
def test_measuring_processes_import_no_torch(module):
    code = f"import sys, secateurs_adapters.{module}; sys.exit('torch' in sys.modules)"
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment).returncode == 0


def test_an_error_in_a_fresh_process_keeps_its_class(tmp_path):
    request = {"task": "profile", "file": str(tmp_path / "none.onnx"), "provider": CPU, "options": {}, "threads": 1}
    with pytest.raises(DataError, match="missing"):
        in_fresh_process("secateurs_adapters.memory", {**request, "batch_size": 1, "seed": 0})
    with pytest.raises(SecateursError, match=r"exit code 1.*KeyError"):
        in_fresh_process("secateurs_adapters.memory", {"task": "profile"})
