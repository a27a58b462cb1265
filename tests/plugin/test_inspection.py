"""What `inspect` tells where the similarity of some blocks, or of all, cannot be told."""

import pytest
import torch
from networks import encoder, sequences
from rich.console import Console
from torch import nn

from secateurs import cost
from secateurs.data import Roles
from secateurs.inspection import inspect, render
from secateurs.passes.compared import cka_matrix
from secateurs.pipeline import Session


class Constant(nn.Module):
    """Forgets its input, so that nothing behind it depends on the example."""

    def forward(self, x):
        return torch.zeros_like(x) + torch.linspace(-1, 1, x.shape[-1])


def looked_at(model, data):
    found = inspect(Session(model, Roles(data), {"macs": cost.macs}.__getitem__))
    console = Console(width=200)
    with console.capture() as shown:
        for part in render(found):
            console.print(part)
    return found, shown.get()


def test_the_map_is_of_all_blocks():
    model, data = encoder(3), sequences(16)
    found, shown = looked_at(model, data)
    names = ["layers.0", "layers.1", "layers.2"]
    assert found["cka_blocks"] == [block["path"] for block in found["blocks"]] == names
    assert torch.tensor(found["cka"]) == pytest.approx(cka_matrix(model, names, data), abs=1e-6)
    assert found["cka_reason"] == ""
    assert "CKA of the blocks' outputs" in shown


def test_a_block_with_a_constant_output_is_left_out_of_the_map_with_its_reason():
    model = encoder(4)
    model.layers.insert(2, Constant())
    found, shown = looked_at(model, sequences(16))
    assert [block["path"] for block in found["blocks"]] == ["layers.0", "layers.1", "layers.3", "layers.4"]
    assert found["cka_blocks"] == ["layers.0", "layers.1"]
    assert len(found["cka"]) == len(found["cka"][0]) == 2
    reasons = {item["where"]: item["reason"] for item in found["skipped"]}
    assert {"layers.3", "layers.4"} <= set(reasons)
    assert "the same for every example" in reasons["layers.3"]
    assert "1 layers.1" in shown


def test_without_enough_examples_there_is_no_map_and_everything_else():
    found, shown = looked_at(encoder(3), sequences(3))
    assert len(found["blocks"]) == 3
    assert found["groups"]
    assert found["cka"] == found["cka_blocks"] == []
    assert found["cka_reason"] == "CKA needs at least 4 calibration examples, got 3"
    assert "CKA needs at least 4 calibration examples, got 3" in shown
