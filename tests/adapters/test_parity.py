"""Agreement of a file and a network, over every output."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from secateurs.data import Dataset
from secateurs.errors import ExportError
from secateurs_adapters.export import dynamo
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
    spread = max(np.abs(x @ w - rows[0][:1] @ w).max() for x in rows)
    assert found.worst == pytest.approx(expected / (1e-4 * spread), rel=0.3)
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
    with pytest.raises(ExportError, match=r"'scores' differs by .*allowed is .*0\.0001 of how far .* for rounding"):
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


def file_of(path, w, b):
    """Write a file that computes x w + b."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", len(w)])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", len(b)])],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(b, "b")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def network_of(w, b):
    linear = nn.Linear(*w.shape)
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(w.T))
        linear.bias.copy_(torch.from_numpy(b))
    return linear


def beside(constants):
    """Return weights and offsets of three outputs that depend on the input, and of others that do not."""
    constants = np.array(constants, np.float32)
    w = np.concatenate([weight(), np.zeros((4, len(constants)), np.float32)], axis=1)
    return w, np.concatenate([np.zeros(3, np.float32), constants])


@settings(max_examples=60, deadline=None)
@given(
    constants=st.lists(st.floats(width=32, allow_nan=False), max_size=5),
    entry=st.integers(0, 2),
    excess=st.floats(2.0, 1e4),
    sign=st.sampled_from([-1.0, 1.0]),
)
def test_a_wrong_entry_is_found_whatever_constants_stand_beside_it(tmp_path_factory, constants, entry, excess, sign):
    w, b = beside(constants)
    x = resample(EXAMPLE, 6, 0).inputs["x"]
    live = (x @ w)[:, :3]
    allowed = 1e-4 * np.abs(live - live[0]).max() + 32 * np.finfo(np.float32).eps * max(1 / 8, np.abs(live).max())
    path = tmp_path_factory.mktemp("beside") / "m.onnx"
    assert check_parity(file_of(path, w, b), network_of(w, b), EXAMPLE, [6]).worst < 0.1
    wrong = b.copy()
    wrong[entry] += np.float32(sign * excess * allowed)
    with pytest.raises(ExportError, match=rf"output 'y' differs by .*entry \[\d, {entry}\] at batch size 6"):
        check_parity(file_of(path, w, wrong), network_of(w, b), EXAMPLE, [6])


class Masked(nn.Module):
    """Scores of five classes, of which two are masked."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(x).masked_fill(torch.tensor([0, 0, 1, 0, 1]).bool(), -1e9)


def test_the_file_of_another_network_is_found_behind_masked_scores(tmp_path):
    model = Masked()
    path = dynamo(model, EXAMPLE, tmp_path / "m.onnx", opset=20).path
    assert check_parity(path, model, EXAMPLE, [1, 3]).worst < 0.1
    with torch.no_grad():
        model.head.weight.mul_(-3)
    with pytest.raises(ExportError, match="disagrees with the network"):
        check_parity(path, model, EXAMPLE, [1, 3])


@pytest.mark.parametrize("fill", [-1e9, float(np.finfo(np.float32).min), -np.inf])
@pytest.mark.parametrize("rows", [1, 6])
def test_a_mask_that_depends_on_the_input_hides_nothing(tmp_path, fill, rows):
    class Moving(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale = scale

        def forward(self, x):
            return (x * self.scale).masked_fill(x < 0, fill)

    example = EXAMPLE.take(range(rows))
    path = dynamo(Moving(1.0), example, tmp_path / "m.onnx", opset=20).path
    assert check_parity(path, Moving(1.0), example, [1, 5]).worst < 0.1
    with pytest.raises(ExportError, match="disagrees with the network"):
        check_parity(path, Moving(1.01), example, [1, 5])


def test_a_large_offset_hides_nothing(tmp_path):
    w, offset = weight(), np.full(3, 1e4, np.float32)
    path = file_of(tmp_path / "m.onnx", w, offset)
    assert check_parity(path, network_of(w, offset), EXAMPLE, [1, 5]).worst <= 0.2
    other = network_of(w, offset)
    with torch.no_grad():
        other.weight.mul_(1.1)
    with pytest.raises(ExportError, match=r"differs by 0\.\d"):
        check_parity(path, other, EXAMPLE, [1, 5])


def test_infinite_entries_must_be_equal(tmp_path):
    w, b = beside([-np.inf, np.inf])
    path = file_of(tmp_path / "m.onnx", w, b)
    assert check_parity(path, network_of(w, b), EXAMPLE, [4]).max_rel < 1e-6
    for wrong in (-1e9, np.inf, np.nan):
        with pytest.raises(ExportError, match=r"differs by inf \(-inf in the file"):
            check_parity(path, network_of(w, np.where(b == -np.inf, np.float32(wrong), b)), EXAMPLE, [4])


def test_one_example_is_held_to_the_range_of_its_entries(tmp_path):
    w, one = weight(), EXAMPLE.take([0])
    b = np.full(3, 5, np.float32)
    path = file_of(tmp_path / "m.onnx", w, b)
    y = one.inputs["x"] @ w + b
    allowed = 1e-4 * np.ptp(y) + 32 * np.finfo(np.float32).eps * np.abs(y).max()
    assert check_parity(path, network_of(w, b + np.float32(allowed / 2)), one, [1, 3]).worst > 0.4
    with pytest.raises(ExportError, match="disagrees with the network"):
        check_parity(path, network_of(w, b + np.float32(2 * allowed)), one, [1, 3])


def test_a_single_number_is_held_to_its_size(tmp_path):
    w, b, one = weight()[:, :1], np.full(1, 5, np.float32), EXAMPLE.take([0])
    path = file_of(tmp_path / "m.onnx", w, b)
    y = abs(float((one.inputs["x"] @ w + b)[0, 0]))
    assert check_parity(path, network_of(w, b + np.float32(0.5e-4 * y)), one, [1]).worst > 0.4
    with pytest.raises(ExportError, match="disagrees with the network"):
        check_parity(path, network_of(w, b + np.float32(2e-4 * y)), one, [1])


class Deep(nn.Module):
    """Twelve layers as torch initialises them, after which examples hardly differ; `last` on their scores."""

    def __init__(self, last):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(12)])
        self.last = last

    def forward(self, x):
        return self.last(self.layers(x))


@pytest.mark.parametrize(
    ("last", "dtype"),
    [
        (nn.Linear(64, 10), torch.float32),
        (nn.Linear(64, 10), torch.float16),
        (lambda h: nn.functional.normalize(h, dim=-1), torch.float32),
        (lambda h: torch.sigmoid(300 * h[:, :32] - 12), torch.float32),
        (lambda h: h - h.mean(-1, keepdim=True), torch.float32),
        (lambda h: (h, h.mean(), torch.arange(8.0).cos()), torch.float32),
    ],
    ids=["plain", "half", "normalised", "sigmoid", "centred", "constants"],
)
def test_rounding_of_the_runtime_is_allowed_where_examples_hardly_differ(tmp_path, last, dtype):
    x = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    found = dynamo(Deep(last).to(dtype), Dataset({"x": x}), tmp_path / "m.onnx", opset=20).parity
    assert found.worst < 1 / 3
