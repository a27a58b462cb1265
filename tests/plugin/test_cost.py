"""MACs and parameters against formulas written out by hand."""

import pytest
import torch
from networks import NETWORKS, Attention, encoder, images, plain, residual, reused, sequences, tied, tokens, vectors
from torch import nn

from secateurs import cost
from secateurs.data import Dataset
from secateurs.errors import ExportError, ModelError


def inputs(*shape):
    return Dataset({"input": torch.zeros(shape).numpy()})


LAYERS = {
    "linear": (nn.Linear(5, 7), (3, 5), 5 * 7),
    "linear without bias": (nn.Linear(5, 7, bias=False), (3, 5), 5 * 7),
    "linear on sequences": (nn.Linear(5, 7), (2, 4, 5), 4 * 5 * 7),
    "conv2d": (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 6, 5), 6 * 5 * 8 * 3 * 9),
    "strided": (nn.Conv2d(3, 8, 3, stride=2, padding=1), (2, 3, 6, 6), 3 * 3 * 8 * 3 * 9),
    "grouped": (nn.Conv2d(6, 8, 3, groups=2), (1, 6, 5, 5), 3 * 3 * 8 * 3 * 9),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6, padding=1), (1, 6, 5, 5), 5 * 5 * 6 * 9),
    "conv1d": (nn.Conv1d(3, 4, 5), (2, 3, 9), 5 * 4 * 3 * 5),
    "conv3d": (nn.Conv3d(2, 3, 2), (1, 2, 3, 3, 3), 8 * 3 * 2 * 8),
}


@pytest.mark.parametrize(("layer", "shape", "expected"), LAYERS.values(), ids=LAYERS)
def test_macs_of_one_layer_on_one_example(layer, shape, expected):
    assert dict(cost.macs(layer, inputs(*shape))) == {"": expected}


def test_macs_of_attention_count_both_products():
    length, width = 6, 16
    found = cost.macs(Attention(width), sequences(2, length, width))
    projections = dict.fromkeys(("query", "key", "value", "out"), length * width * width)
    assert dict(found) == {**projections, "": 2 * length * length * width}


def test_macs_of_pytorchs_own_encoder_layer_are_seen_through_its_fast_path():
    length, width, hidden = 6, 16, 32
    layer = nn.TransformerEncoderLayer(width, 2, hidden, batch_first=True).eval()
    expected = 4 * length * width**2 + 2 * length**2 * width + 2 * length * width * hidden
    fast = torch.backends.mha.get_fastpath_enabled()
    assert cost.total(cost.macs(layer, sequences(2, length, width))) == expected
    assert torch.backends.mha.get_fastpath_enabled() is fast


@pytest.mark.parametrize(("kind", "gates"), [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)], ids=["rnn", "gru", "lstm"])
def test_macs_of_recurrent_layers(kind, gates):
    found = cost.macs(kind(16, 7, batch_first=True), sequences(2, 6, 16))
    assert cost.total(found) == 6 * gates * 7 * (16 + 7)


def test_macs_of_a_network_are_those_of_its_layers():
    expected = {"0": 64 * 6 * 3 * 9, "2": 16 * 8 * 6 * 9, "5": 128 * 10, "7": 10 * 5}
    found = cost.macs(plain(), images(4))
    assert dict(found) == expected
    assert cost.total(found) == sum(expected.values())


def test_macs_of_a_layer_that_runs_twice_count_twice():
    found = cost.macs(reused(), vectors(2))
    assert cost.total(found) == 12 * 8 + 2 * 8 * 8 + 8 * 9 + 9 * 5


class Pairs(nn.Linear):
    """Compares neighbours in the batch."""

    def forward(self, value):
        value = super().forward(value).view(-1, 2, self.out_features)
        return value[:, 0] - value[:, 1]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(Pairs(12, 6)), 12 * 6),
        (nn.Sequential(nn.Linear(12, 6), nn.BatchNorm1d(6, track_running_stats=False)), 12 * 6),
    ],
    ids=["pairs", "batch statistics"],
)
def test_a_network_that_takes_no_single_example_is_counted_on_more(model, expected):
    assert dict(cost.macs(model.eval(), vectors(5).take(range(4)))) == {"0": expected}
    with pytest.raises(ModelError, match="neither on 1 example nor on 1"):
        cost.macs(model, vectors(1))
    told = cost.change(cost.macs, model, model, vectors(1))
    assert told.counts == (None, None)
    assert "cannot be counted" in told.reason
    assert cost.change(cost.macs, model, model, vectors(2)).counts == (expected, expected)


class Forces(nn.Module):
    """Returns the gradient of an energy, as networks of molecules do."""

    def __init__(self):
        super().__init__()
        self.hidden, self.energy = nn.Linear(12, 8), nn.Linear(8, 1)

    def forward(self, value):
        with torch.enable_grad():
            value = value.detach().requires_grad_()
            energy = self.energy(self.hidden(value).tanh())
            return -torch.autograd.grad(energy.sum(), value)[0]


def test_gradients_in_the_forward_pass_are_counted_on_the_module_that_asks_for_them():
    found = dict(cost.macs(Forces(), vectors(4)))
    assert found == {"hidden": 12 * 8, "energy": 8, "": 12 * 8 + 8}


def test_macs_do_not_depend_on_the_batch_or_on_gradients():
    model = encoder().train()
    first = cost.macs(model, sequences(1))
    assert first == cost.macs(model, sequences(9))
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_are_all_parameters_once(name):
    model = NETWORKS[name][0]()
    found = cost.parameters(model)
    assert cost.total(found) == sum(parameter.numel() for parameter in model.parameters())
    assert set(found) <= set(dict(model.named_modules()))


def test_parameters_by_module():
    found = cost.parameters(residual())
    assert found["stem"] == 8 * 3 * 9
    assert found["bn"] == 16
    assert found["head"] == 16 * 5 + 5


def test_a_shared_tensor_counts_once_where_it_is_first():
    found = cost.parameters(tied(), tokens(2))
    assert found["embedding"] == 20 * 8
    assert "head" not in found


def test_weight_bytes_count_buffers_and_shared_tensors_once():
    assert cost.weight_bytes(tied()) == 4 * (20 * 8 + 8 * 12 + 12 + 12 * 8 + 8)
    norm = nn.BatchNorm2d(3)
    assert cost.weight_bytes(norm) == 4 * 4 * 3 + 8
    assert cost.weight_bytes(norm.half()) == 2 * 4 * 3 + 8


def test_a_change_is_what_both_networks_cost_or_why_nobody_can_tell():
    dense, pruned = nn.Linear(4, 8), nn.Linear(4, 2)
    example = inputs(1, 4)
    found = cost.change(cost.macs, dense, pruned, example)
    assert (found.before, found.after, found.ratio, found.reason) == (32, 8, 0.25, None)

    def untold(network, example):
        raise ExportError("there is a loop in it")

    assert cost.change(untold, dense, pruned, example).reason == "there is a loop in it"
    assert cost.change(cost.macs, nn.Identity(), nn.Identity(), example).ratio == 1.0
