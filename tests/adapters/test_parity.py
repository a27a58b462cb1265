"""Agreement of a file and a network, over every output."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from secateurs.data import Dataset
from secateurs.errors import ExportError
from secateurs_adapters.parity import check_parity, network_outputs, resample

EXAMPLE = Dataset({"x": np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)})


class Two(nn.Module):
    """Returns x w and, as a second output, the index of its largest entry."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.from_numpy(w))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        h = self.dropout(x @ self.w)
        return {"scores": h, "best": h.argmax(-1)}


def weight(seed=0):
    return np.random.default_rng(seed).normal(size=(4, 3)).astype(np.float32)


def save(path, w, largest=1):
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["scores"]),
        helper.make_node("ArgMax" if largest else "ArgMin", ["scores"], ["best"], axis=-1, keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 3]),
            helper.make_tensor_value_info("best", TensorProto.INT64, ["batch"]),
        ],
        [numpy_helper.from_array(w, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_equal_networks_agree_and_the_figures_are_numpys(tmp_path):
    w = weight()
    shifted = w + np.float32(1e-6)
    model = Two(w)
    found = check_parity(save(tmp_path / "m.onnx", shifted), model, EXAMPLE, [1, 3, 9])
    rows = [resample(EXAMPLE, size, index).inputs["x"] for index, size in enumerate([1, 3, 9])]
    expected = max(np.abs(x @ w - x @ shifted).max() for x in rows)
    scale = max(np.abs(x @ w).max() for x in rows)
    assert found.max_abs == pytest.approx(expected, rel=0.2)
    assert found.max_rel == pytest.approx(expected / scale, rel=0.2)
    assert found.batch_sizes == [1, 3, 9]
    assert model.training
    assert model.dropout.training


def test_a_wrong_second_output_is_found(tmp_path):
    w = weight()
    with pytest.raises(ExportError, match="output 'best' differs"):
        check_parity(save(tmp_path / "m.onnx", w, largest=0), Two(w), EXAMPLE, [5])


def test_other_weights_are_found_and_the_tolerance_counts(tmp_path):
    w = weight()
    path = save(tmp_path / "m.onnx", w * np.float32(1.001))
    with pytest.raises(ExportError, match=r"'scores' differs by .*allowed is 0.0001"):
        check_parity(path, Two(w), EXAMPLE, [2])
    assert check_parity(path, Two(w), EXAMPLE, [2], tolerance=1e-2).max_rel == pytest.approx(1e-3, rel=0.01)


def test_values_that_are_not_finite_are_found(tmp_path):
    w = weight()
    broken = w.copy()
    broken[0, 0] = np.nan
    with pytest.raises(ExportError, match="differs by inf"):
        check_parity(save(tmp_path / "m.onnx", broken), Two(w), EXAMPLE, [2])


def test_a_missing_output_is_found(tmp_path):
    w = weight()
    with pytest.raises(ExportError, match="1 outputs, the file 2"):
        check_parity(save(tmp_path / "m.onnx", w), nn.Sequential(nn.Linear(4, 3)), EXAMPLE, [2])


def test_the_first_output_needs_the_examples_first():
    class Flat(nn.Module):
        def forward(self, x):
            return x.view(2, -1)

    class Nothing(nn.Module):
        def forward(self, x):
            return None

    with pytest.raises(ExportError, match=r"shape \(2, 8\) at batch size 4"):
        network_outputs(Flat(), EXAMPLE.take(range(4)))
    with pytest.raises(ExportError, match="holds no tensor"):
        network_outputs(Nothing(), EXAMPLE)


def test_resampling_takes_rows_of_the_example():
    rows = {tuple(row) for row in EXAMPLE.inputs["x"]}
    for size in (1, 6, 20):
        drawn = resample(EXAMPLE, size, 0).inputs["x"]
        assert len(drawn) == size
        assert {tuple(row) for row in drawn} <= rows
    assert len({tuple(row) for row in resample(EXAMPLE, 6, 0).inputs["x"]}) == 6
